"""Processes that are killed: forked from one that has imported everything, so each costs little."""

import multiprocessing
import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from typing import Any

from proxymoe.common.errors import ProxyMoEError

PRELOADED = [f"proxymoe.simulations.faults.{name}" for name in ("device", "rounds", "transfer")]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = frozenset({"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"})
"""Audit events of calls that change a folder; `os.replace` is an `os.rename`."""
LONG = 600.0
"""Seconds after which a child that neither ended nor was killed hangs."""

Tell = Callable[[Any], None]
Work = Callable[..., None]
"""What a child does; its first argument tells the parent something. It travels by name."""


class ChildFailed(ProxyMoEError):
    """A child ended with an error of its own, and not because it was killed."""


class Tripwire:
    """Kills its own process at the n-th step that changes something on disk; 0 never does.

    Steps are SQL statements, files opened for writing, renames, removals, and the two ends of
    every sync. A write at an offset breaks off in its middle.
    """

    def __init__(self, deadly: int) -> None:
        self.count = 0
        self._deadly = deadly
        self._lock = threading.Lock()

    def arm(self) -> None:
        """Watches this process from here on; there is no way back."""
        for name in ("fsync", "fdatasync"):
            setattr(os, name, self._around(getattr(os, name)))
        setattr(os, "pwrite", self._torn(os.pwrite))  # noqa: B010  mypy guards what os holds
        setattr(sqlite3, "connect", self._watched(sqlite3.connect))  # noqa: B010
        sys.addaudithook(self._audit)

    def step(self, _: object = None) -> None:
        """Counts one step, and is the last thing that happens if it was the deadly one."""
        if self._is_deadly():
            os.kill(os.getpid(), signal.SIGKILL)

    def _is_deadly(self) -> bool:
        with self._lock:
            self.count += 1
            return self.count == self._deadly

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and arguments[2] & WRITES):
            self.step()

    def _watched(self, connect: Callable[..., sqlite3.Connection]) -> Callable[..., Any]:
        def tripped(*arguments: Any, **options: Any) -> sqlite3.Connection:
            connection = connect(*arguments, **options)
            connection.set_trace_callback(self.step)
            return connection

        return tripped

    def _around(self, sync: Callable[[int], None]) -> Callable[[int], None]:
        def tripped(descriptor: int) -> None:
            self.step()
            sync(descriptor)
            self.step()

        return tripped

    def _torn(self, write: Callable[..., int]) -> Callable[..., int]:
        def tripped(descriptor: int, content: bytes, offset: int) -> int:
            if self._is_deadly():
                write(descriptor, content[: len(content) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return write(descriptor, content, offset)

        return tripped


def start_forkserver() -> ForkServerContext:
    """Starts what children are forked from, if it does not run, without waiting for its imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ensure_running()
    return context


class Child:
    """A process that does one piece of work; it may be killed, or kill itself.

    Args:
        work: called in the process with `Tell` and the arguments.
        deadly: of its `Tripwire`.
    """

    def __init__(self, work: Work, *arguments: Any, deadly: int = 0) -> None:
        context = start_forkserver()
        self._line, theirs = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_live, args=(theirs, deadly, work, arguments), daemon=True
        )
        self._process.start()
        theirs.close()

    def hear(self, seconds: float = LONG) -> Any:
        """What the child tells next; EOFError if it ends before, TimeoutError if it is silent."""
        if not self._line.poll(seconds):
            raise TimeoutError(f"a child has said nothing for {seconds:.0f} s")
        return self._line.recv()

    def told(self) -> list[Any]:
        """Everything that the child told and nobody has heard; waits until it has ended."""
        heard = []
        try:
            while True:
                heard.append(self.hear())
        except (EOFError, OSError):
            return heard

    def kill_after(self, seconds: float) -> bool:
        """Kills the child after so long; False if it had ended by itself before."""
        time.sleep(seconds)
        return self.kill()

    def kill(self) -> bool:
        """Kills the child now; False if it had ended by itself before."""
        self._process.kill()
        return self.was_killed()

    def was_killed(self) -> bool:
        """Whether the child, which is waited for, was killed; False if it came to its end.

        Raises:
            ChildFailed: neither: it ended with an error, or never.
        """
        self._process.join(LONG)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
        if code not in (0, -signal.SIGKILL):
            raise ChildFailed(f"a child ended with {code}, expected an end or SIGKILL")
        return code != 0


def steps_of(work: Work, *arguments: Any) -> int:
    """How many steps of a `Tripwire` the work takes when nobody disturbs it."""
    child = Child(_counted, work, arguments)
    (steps,) = child.told()
    child.was_killed()
    return int(steps)


def _live(
    line: "Connection[Any, Any]", deadly: int, work: Work, arguments: tuple[Any, ...]
) -> None:
    if deadly:
        Tripwire(deadly).arm()
    work(line.send, *arguments)


def _counted(tell: Tell, work: Work, arguments: tuple[Any, ...]) -> None:
    tripwire = Tripwire(0)
    tripwire.arm()
    work(lambda _: None, *arguments)
    tell(tripwire.count)
