"""Process edge: a process with all that it starts, its log, and the guard that outlives us.

No process outlives its supervisor, not even a `kill -9` of it. Each leads a process group, and a
tiny shell, the guard, reads from a pipe that only the supervisor holds open: when that closes,
however it closes, the guard kills the groups. A process waits for a word before it becomes its
command, so that the guard knows of it first. PR_SET_PDEATHSIG would be shorter, but it is Linux
only, fires when the thread that forked ends, does not reach what processes start themselves (a
SuperExec starts our round engine), and needs code between fork and exec, unsafe beside threads.
"""

import contextlib
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO

import psutil

SHELL = "/bin/sh"
HELD = 'read -r go && exec "$@" </dev/null'
GUARD = (
    "trap '' HUP INT TERM; while read -r line; do groups=$line; done; "
    'for group in $groups; do kill -s KILL -- "-$group"; done'
)
KILL_SECONDS = 5.0
"""How long a killed process may take to vanish before it is left to the system."""
MAX_LINE_BYTES = 64 << 10
HIDDEN = "***"


def hide(text: str, hidden: Sequence[str]) -> str:
    """The text with everything in `hidden` blotted out."""
    for secret in sorted(filter(None, hidden), key=len, reverse=True):  # one may hold another
        text = text.replace(secret, HIDDEN)
    return text


class Guard:
    """The shell that kills the groups it was last told of, when its standard input closes."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._held: list[int] | None = None

    def hold(self, groups: Sequence[int]) -> None:
        """Returns when a guard lives and has these groups, and no others, to read.

        Raises:
            OSError: that cannot be now.
        """
        if self._process is None or self._process.poll() is not None:
            self._forget()
            self._process = _shell(GUARD, stdout=subprocess.DEVNULL)
        if groups != self._held:
            assert self._process.stdin is not None
            self._process.stdin.write(b"%s\n" % " ".join(map(str, groups)).encode())
            self._held = list(groups)

    def dismiss(self) -> None:
        """Ends the guard; what it held is left alone."""
        with contextlib.suppress(OSError):
            self.hold([])
        self._forget()

    def _forget(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
        self._process = self._held = None


class Group:
    """A process and all that it starts, with a log file of bounded size for what they print.

    Args:
        log_file: one older file is kept beside it.
        max_log_bytes: of one file.
        hidden: secrets, blotted out in the log file.
    """

    def __init__(self, log_file: Path, max_log_bytes: int, hidden: Sequence[str]) -> None:
        self._lines = _Lines(
            log_file,
            maxBytes=max_log_bytes,
            backupCount=1,
            encoding="utf-8",
            delay=True,
            errors="replace",
        )
        self._hidden = hidden
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, which is the number of its group too; None if there is none."""
        return self._process.pid if self._process is not None else None

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        announce: Callable[[], None] = lambda: None,
    ) -> None:
        """Runs `command`, after `announce` has told the guard of the group that this will be.

        Raises:
            OSError: the system has no room for it, or it could not be announced; nothing runs.
        """
        assert self._process is None, "one process at a time"
        self._process = process = _shell(
            HELD, *command, environment=environment, stdout=subprocess.PIPE
        )
        self._reader = threading.Thread(
            target=self._keep_output, args=[process.stdout], daemon=True
        )
        self._reader.start()
        try:
            announce()
        except BaseException:
            self.kill()
            raise
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as gate:
            gate.write(b"go\n")

    def code(self) -> int | None:
        """What the process ended with: an exit code, or minus a signal; None while it runs."""
        return None if self._process is None else self._process.poll()

    def is_alive(self) -> bool:
        """Whether the process, or one that it started, still runs."""
        if self._process is None:
            return False
        return self._process.poll() is None or _has_members(self._process.pid)

    def signal(self, number: int) -> None:
        """Sends a signal to the process and all that it started, as far as they still run."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """Ends all of it at once; there is no process afterwards, and its log is complete."""
        self.signal(signal.SIGKILL)
        if self._process is not None and self._reader is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(KILL_SECONDS)
            self._reader.join(KILL_SECONDS)
        self._process = self._reader = None

    def close(self) -> None:
        """Closes the log file; call it last."""
        self._lines.close()

    def _keep_output(self, output: IO[bytes]) -> None:
        """Writes what is printed to the log file, until nobody is left who could print."""
        with output:
            while line := output.readline(MAX_LINE_BYTES):
                text = hide(line.decode(errors="replace").rstrip("\n"), self._hidden)
                self._lines.handle(logging.makeLogRecord({"msg": text}))


def _has_members(group: int) -> bool:
    """Whether anything in the group runs; the dead that nobody has buried do not count.

    Who loses its parent is for the init process to bury, and containers often have none.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


class _Lines(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's own name
        """Drops the line: a full disk costs lines, and must never block or end the process."""


def _shell(
    script: str, *arguments: str, stdout: int, environment: Mapping[str, str] | None = None
) -> "subprocess.Popen[bytes]":
    """A shell that leads a group of its own, and whose standard input is ours alone."""
    return subprocess.Popen(  # noqa: S603  scripts are constants, and arguments stay arguments
        [SHELL, "-c", script, SHELL, *arguments],
        bufsize=0 if stdout == subprocess.DEVNULL else -1,
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        env={**os.environ, **(environment or {})},
        start_new_session=True,
    )
