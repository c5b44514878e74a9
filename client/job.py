"""Process edge: a job process that answers bytes with bytes, and may die without harm.

It starts when it is needed and stays warm: what one job imports and opens, the next one finds. A
native crash, or the end of memory, takes this process and not the one that asked. It lives only
as long as the other end of its line, whatever it is doing; and nothing that it says is unpickled.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from proxymoe.common.errors import ProxyMoEError

Pair = tuple[bytes, bytes]
Work = Callable[[Pair], Pair]
"""Answers two byte strings with two. It travels by name, so it must be picklable and no part of
`__main__`; what is heavy, it imports when it is called."""

MAIN = "import sys; from proxymoe.client.job import main; main(int(sys.argv[1]))"
FIRST_TO_GO = "1000"
"""Of Linux's scores for who is killed when memory ends, the one that goes first."""


class JobDied(ProxyMoEError):
    """The job process ended before it answered; the next job gets another one."""


class JobProcess:
    """A process that does one job after another: `ask`, `poll` until True, `answer`.

    All of these return at once or as soon as said, so that the caller can look after other things
    meanwhile, or `close`, which ends the process. After that, `ask` starts another one.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._process: subprocess.Popen[bytes] | None = None
        self._line: Connection[Any, Any]
        self._writer: threading.Thread
        self._used = time.monotonic()

    @property
    def pid(self) -> int | None:
        """Of the process; None if there is none."""
        return self._process.pid if self._process else None

    @property
    def idle_seconds(self) -> float:
        """Time since the last `ask` or `answer`."""
        return time.monotonic() - self._used

    def ask(self, job: Pair) -> None:
        """Hands a job to the process, which is started if it is not there."""
        self._used = time.monotonic()
        if self._process and self._process.poll() is not None:
            self.close()  # it died while it had nothing to do
        is_new = self._process is None
        if is_new:
            self._line, theirs = Pipe()
            with theirs:
                self._process = subprocess.Popen(  # noqa: S603  the command is a constant
                    [sys.executable, "-P", "-c", MAIN, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
        # A new process reads only when its imports are done, and a job is more than a pipe holds.
        self._writer = threading.Thread(target=self._write, args=[is_new, job], daemon=True)
        self._writer.start()

    def poll(self, seconds: float) -> bool:
        """Whether `answer` has something to say within this time."""
        assert self._process is not None, "asked before it is polled"
        return self._line.poll(seconds) or self._process.poll() is not None

    def answer(self) -> Pair:
        """The answer to the job.

        Raises:
            JobDied: the process ended before.
        """
        assert self._process is not None, "asked before it answers"
        self._used = time.monotonic()
        try:
            if not self._line.poll():
                raise EOFError
            return self._line.recv_bytes(), self._line.recv_bytes()
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
            end = self._process.poll()
            self.close()
            raise JobDied(f"the job process {_told(end)}") from None

    def close(self) -> None:
        """Ends the process at once, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._writer.join()
            self._line.close()

    def _write(self, is_new: bool, job: Pair) -> None:
        with contextlib.suppress(OSError):  # `answer` tells how it ended
            if is_new:
                self._line.send(self._work)
            for part in job:
                self._line.send_bytes(part)


def main(descriptor: int) -> None:
    """Does jobs until the other end of the line closes; the job process's main function."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for who asked, who then ends us
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(FIRST_TO_GO)
    line: Connection[Any, Any] = Connection(descriptor)
    work: Work = line.recv()
    jobs = SimpleQueue[Pair]()
    threading.Thread(target=_read, args=[line, jobs], daemon=True).start()
    while True:
        for part in work(jobs.get()):
            line.send_bytes(part)


def _read(line: "Connection[Any, Any]", jobs: "SimpleQueue[Pair]") -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            jobs.put((line.recv_bytes(), line.recv_bytes()))
    os._exit(0)  # in the middle of a job, too: nobody is left to answer


def _told(end: int | None) -> str:
    if end == -signal.SIGKILL:
        return "was killed, perhaps for want of memory"
    if end is None or end >= 0:
        return f"ended with exit code {end}"
    return f"was ended by {signal.Signals(-end).name}"
