"""A group of child processes that is started, kept running and stopped as one.

Children start in their order, each when all before it are ready. One that exits, or is not ready
in time, is started again, each time later. SIGTERM or SIGINT stops all, in reverse order. None
is left when the supervisor ends, however it ends (see `common/processes.py`).
"""

import contextlib
import logging
import secrets
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxymoe.common.backoff import backoff_seconds
from proxymoe.common.errors import ProxyMoEError
from proxymoe.common.files import write_json
from proxymoe.common.processes import Group, Guard, hide

log = logging.getLogger(__name__)

TICK_SECONDS = 0.2
STATE = "children.json"
uniform = secrets.SystemRandom().random


class ChildFailed(ProxyMoEError):
    """A child kept failing, or ended for good, and its group was stopped; names its log file.

    `code` is the exit code that it ended for good with, None if it kept failing.
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Child:
    """One process of a group, as it should be."""

    name: str
    """Names it in logs, and its log file."""
    command: tuple[str, ...]
    ready: Callable[[], bool] = lambda: True
    """Whether it does its work yet: asked often while it starts, answers at once; OSError is no."""
    ready_seconds: float = 60.0
    """How long it may take until it is."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Added to the supervisor's own."""
    secrets: tuple[str, ...] = field(default=(), repr=False)
    """Never to be seen in a log, neither in the command line nor in what the child prints."""
    gives_up: Mapping[int, str] = field(default_factory=dict)
    """Exit codes after which starting it again is of no use, each with what it means."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """When a child that failed is started again."""

    first_seconds: float = 0.5
    factor: float = 2.0
    cap_seconds: float = 60.0
    healthy_seconds: float = 60.0
    """A failure after being ready for so long counts as the first."""
    max_failures: int | None = None
    """One more in a row gives up on the whole group; None never does."""

    def delay(self, failures: int, draw: float) -> float:
        """Seconds to wait after `failures` ≥ 1 in a row; see `backoff_seconds`."""
        return backoff_seconds(self.first_seconds, self.cap_seconds, failures, draw, self.factor)


def listening(host: str, port: int) -> Callable[[], bool]:
    """A readiness check: whether something accepts connections there."""

    def ready() -> bool:
        with socket.create_connection((host, port), timeout=TICK_SECONDS):
            return True

    return ready


class Supervisor:
    """Keeps a group of children running until it is told to stop.

    Args:
        children: in the order in which they start.
        folder: for `<name>.log` of each child, and `children.json`: who runs, as which process.
        grace_seconds: from SIGTERM to SIGKILL, for each child.
        max_log_bytes: of one log file; one older is kept beside it.
        clock: seconds, of any origin, never backwards.
        draw: a uniform number in [0, 1).
        pause: waits for so many seconds.
    """

    def __init__(
        self,
        children: Sequence[Child],
        folder: Path,
        backoff: Backoff = Backoff(),
        grace_seconds: float = 10.0,
        max_log_bytes: int = 4 << 20,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = uniform,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        assert len({child.name for child in children}) == len(children), "names are distinct"
        folder.mkdir(parents=True, exist_ok=True)
        self._parts = [_Part(child, folder, max_log_bytes) for child in children]
        self._state_file = folder / STATE
        self._backoff = backoff
        self._grace_seconds = grace_seconds
        self._clock = clock
        self._draw = draw
        self._pause = pause
        self._guard = Guard()
        self._published: Any = None
        self._stopping = False

    def stop(self) -> None:
        """Makes `run` stop all children and return; for other threads and signal handlers."""
        self._stopping = True

    def run(self) -> None:
        """Runs the children until SIGTERM, SIGINT or `stop`; none is left when it returns.

        Raises:
            ChildFailed: one of them failed too often in a row, or with a code that gives up.
        """
        with self._told_by_signals():
            try:
                while not self._stopping:
                    self._step()
                    self._publish()
                    self._pause(TICK_SECONDS)
                log.info("stopping %d children", len(self._parts))
            finally:
                for part in reversed(self._parts):
                    self._end(part)
                self._publish()
                self._guard.dismiss()

    @contextlib.contextmanager
    def _told_by_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        told = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, lambda *_: self.stop()) for number in told}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _step(self) -> None:
        """Looks at every child once, in their order."""
        with contextlib.suppress(OSError):  # a guard that cannot be replaced now can be later
            self._guard.hold(self._pids())
        all_ready = True
        for part in self._parts:
            if part.group.pid is not None:
                self._look(part)
            elif all_ready and self._clock() >= part.due:
                self._start(part)
            all_ready = all_ready and part.is_ready

    def _look(self, part: "_Part") -> None:
        code = part.group.code()
        if code is not None and code in part.child.gives_up:
            why = part.child.gives_up[code]
            raise ChildFailed(f"{part.child.name}: {why}; see {part.log_file}", code)
        if code is not None:
            self._fail(part, f"was killed by signal {-code}" if code < 0 else f"exited with {code}")
        elif part.is_ready:
            return
        elif _says_ready(part.child):
            part.is_ready, part.since = True, self._clock()
            log.info("%s: ready", part.child.name)
        elif self._clock() - part.since > part.child.ready_seconds:
            self._fail(part, f"was not ready within {part.child.ready_seconds:.0f} s")

    def _start(self, part: "_Part") -> None:
        child, part.since = part.child, self._clock()
        try:
            part.group.start(
                child.command, child.environment, lambda: self._guard.hold(self._pids())
            )
        except OSError as error:
            self._fail(part, f"cannot be started: {error}")
            return
        command = hide(shlex.join(child.command), child.secrets)
        log.info("%s: started as process %d: %s", child.name, part.group.pid, command)

    def _fail(self, part: "_Part", what: str) -> None:
        """Clears away what is left of a child, and says when it is started again."""
        now, name = self._clock(), part.child.name
        if part.is_ready and now - part.since >= self._backoff.healthy_seconds:
            part.failures = 0
        part.failures += 1
        part.is_ready = False
        part.group.kill()  # also what it started and left behind: never two of the same
        most = self._backoff.max_failures
        if most is not None and part.failures > most:
            raise ChildFailed(
                f"{name} {what}; {part.failures} failures in a row, the limit is {most}; "
                f"see {part.log_file}"
            )
        delay = self._backoff.delay(part.failures, self._draw())
        part.due = now + delay
        log.warning("%s %s; again in %.1f s; see %s", name, what, delay, part.log_file)

    def _end(self, part: "_Part") -> None:
        """Stops a child and all that it started: asks, waits for the grace period, kills."""
        part.group.signal(signal.SIGTERM)
        deadline = self._clock() + self._grace_seconds
        while part.group.is_alive() and self._clock() < deadline:
            self._pause(TICK_SECONDS / 4)
        if part.group.is_alive():
            log.warning("%s: killed after %.0f s of grace", part.child.name, self._grace_seconds)
        part.group.kill()
        part.group.close()
        part.is_ready = False

    def _pids(self) -> list[int]:
        return [part.group.pid for part in self._parts if part.group.pid is not None]

    def _publish(self) -> None:
        state = {
            part.child.name: {
                "pid": part.group.pid,
                "ready": part.is_ready,
                "failures": part.failures,
            }
            for part in self._parts
        }
        if state != self._published:
            self._published = state
            try:
                write_json(self._state_file, state)
            except OSError as error:  # a full disk is no reason to stop what still works
                log.warning("%s: cannot be written: %s", self._state_file, error)


class _Part:
    """A child as it is."""

    def __init__(self, child: Child, folder: Path, max_log_bytes: int) -> None:
        self.child = child
        self.log_file = folder / f"{child.name}.log"
        self.group = Group(self.log_file, max_log_bytes, child.secrets)
        self.is_ready = False
        self.since = 0.0
        """When it was started, or when it became ready."""
        self.due = float("-inf")
        """When it may be started."""
        self.failures = 0
        """In a row."""


def _says_ready(child: Child) -> bool:
    try:
        return child.ready()
    except OSError:
        return False
