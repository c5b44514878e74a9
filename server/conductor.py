"""Sees to it that the rounds are being run while there are any left.

A Flower run of our bundle starts the ServerApp, which runs the rounds. When that process dies
before they are over, its run is ended and the next one started; the round engine goes on where it
was. What to do is a pure function of what is seen; doing it takes Flower's commands.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from proxymoe.common.supervise import Backoff

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
BEGIN_SECONDS = 300.0
"""How long a new run's ServerApp may take to announce itself, on a busy machine."""


class Step(StrEnum):
    """What to do next."""

    WAIT = "wait"
    START = "start"
    """End what is left of earlier runs, and start one."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What is seen."""

    finished: bool
    """Whether no rounds are left."""
    alive: bool
    """Whether a process runs the rounds."""
    run: int | None
    """Of the process that ran them last: the Flower run that it served."""


@dataclass(frozen=True, slots=True)
class Watch:
    """What the conductor remembers; nothing, when it has just been started."""

    run: int | None = None
    """The run that it started last, if that worked."""
    since: float = 0.0
    """When it tried that."""
    failures: int = 0
    """How many runs in a row did not last."""


class Runs(Protocol):
    """Flower's runs; see `server.flower.SuperLink`. OSError: not now."""

    def start_run(self) -> int: ...
    def stop_run(self, number: int) -> None: ...
    def unfinished_runs(self) -> list[int]: ...


def next_step(scene: Scene, watch: Watch, now: float, backoff: Backoff) -> Step:
    """What the scene asks for; `now` and `watch.since` are seconds on one clock."""
    if scene.finished or scene.alive:
        return Step.WAIT
    if not watch.failures:
        return Step.START
    age = now - watch.since
    if watch.run is not None and scene.run != watch.run and age < BEGIN_SECONDS:
        return Step.WAIT  # its ServerApp is still starting
    return Step.START if age >= backoff.delay(watch.failures, draw=0.0) else Step.WAIT


def begun(watch: Watch, run: int | None, now: float, backoff: Backoff) -> Watch:
    """The watch after one more attempt to start a run; the number is None if that failed."""
    lasted = now - watch.since >= backoff.healthy_seconds
    return Watch(run, now, 1 if lasted else watch.failures + 1)


class Conductor:
    """Looks, decides and acts, until it is told to stop.

    Args:
        runs: starts and ends Flower runs.
        look: what is seen now.
        clock: seconds, of any origin, never backwards.
    """

    def __init__(
        self,
        runs: Runs,
        look: Callable[[], Scene],
        clock: Callable[[], float],
        backoff: Backoff | None = None,
    ) -> None:
        self._runs, self._look, self._clock = runs, look, clock
        self._backoff = backoff or Backoff()
        self._watch = Watch()

    def run(self, pause: Callable[[float], bool]) -> None:
        """Conducts until `pause`, which waits for so many seconds, says that it is enough."""
        while not pause(LOOK_SECONDS):
            self.step()

    def step(self) -> Step:
        """Looks once, and does what that asks for."""
        scene = self._look()
        step = next_step(scene, self._watch, self._clock(), self._backoff)
        if step is Step.START:
            self._start()
        return step

    def _start(self) -> None:
        begun_at, number = self._clock(), None
        try:
            last = self._watch.run
            for old in self._runs.unfinished_runs() if last is None else [last]:
                log.info("run %d: ended", old)
                self._runs.stop_run(old)
            number = self._runs.start_run()
            log.info("run %d: started", number)
        except OSError as error:
            log.warning("no run could be started: %s", error)
        self._watch = begun(self._watch, number, begun_at, self._backoff)
