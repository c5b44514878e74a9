"""Level 1: the coordinator's round engine, in a real process, killed wherever it stands."""

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from proxymoe.server.engine import RoundEngine, Rules
from proxymoe.server.round import FederationState
from proxymoe.server.store import Round, RoundStore
from proxymoe.simulations.faults.children import Child, Tell, steps_of
from proxymoe.simulations.faults.cohort import DevicesOf, in_memory, plain, small_federation
from proxymoe.simulations.faults.law import Law
from proxymoe.simulations.faults.report import Ground, Scenario

LEVEL = "rounds"
PHASES = 8
"""Announced in a round that is committed."""
DISK_KILLS, RANDOM_KILLS = 56, 24
LIVES = 4
"""How often one run is killed at random moments before it is left in peace."""

federation_of = partial(small_federation, rounds=4, strategy="fedadam", momentum=0.5)
"""With a memory in the strategy, so that a round that counts twice shows in every later one."""


def coordinate(tell: Tell, folder: Path, last: int = 0, devices_of: DevicesOf = in_memory) -> None:
    """A coordinator's life: runs the rounds that are left, and dies at the announcement `last`."""
    federation, count = federation_of(), 0
    store = RoundStore(folder, federation.run, federation.layout.size)
    devices = devices_of(federation, store)

    def passed(now: Round) -> None:
        nonlocal count
        devices.passed(now)
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)

    summation, rules = plain(federation), Rules(quorum=1.0)
    engine = RoundEngine(
        federation, store, devices, summation, rules, passed=passed, opened=devices.opened
    )
    tell("running")
    engine.run()
    store.close()


def undisturbed(folder: Path) -> FederationState:
    """Where the run ends if nothing happens to it."""
    coordinate(lambda _: None, folder)
    federation = federation_of()
    store = RoundStore(folder, federation.run, federation.layout.size)
    state = store.state(federation.settings.rounds + 1, store.current())
    store.close()
    return state


def killed_at_transitions(ground: Ground, devices_of: DevicesOf = in_memory) -> Iterator[str]:
    """One run per transition, killed as soon as it is durable, then continued."""
    expected = undisturbed(ground.folder())
    for last in range(1, federation_of().settings.rounds * PHASES + 1):
        folder = ground.folder()
        law = Law(federation_of(), folder)
        missed = not Child(coordinate, folder, last, devices_of).was_killed()
        complaint = f"transition {last} never came" if missed else law.broken()
        yield complaint or _continued(folder, law, expected, devices_of)


def killed_in_writes(ground: Ground) -> Iterator[str]:
    """One run per kill, at steps spread over all that change the disk, then continued."""
    expected = undisturbed(ground.folder())
    steps = steps_of(coordinate, ground.folder())
    chosen = np.linspace(1, steps, DISK_KILLS).round().astype(int)
    for step in chosen.tolist():
        folder = ground.folder()
        law = Law(federation_of(), folder)
        missed = not Child(coordinate, folder, deadly=step).was_killed()
        complaint = f"step {step} of {steps} never came" if missed else law.broken()
        yield complaint or _continued(folder, law, expected)


def killed_at_random(ground: Ground) -> Iterator[str]:
    """Runs that are killed after random times, several times each, then continued."""
    started = time.monotonic()
    expected = undisturbed(ground.folder())
    whole = time.monotonic() - started
    killed = 0
    while killed < RANDOM_KILLS:
        folder = ground.folder()
        law = Law(federation_of(), folder)
        for life in range(LIVES):
            child = Child(coordinate, folder)
            child.hear()
            if not child.kill_after(ground.rng.uniform(0, whole / 2)):
                break  # it was quicker than we; the run is over
            killed += 1
            is_last = life == LIVES - 1
            yield law.broken() or (_continued(folder, law, expected) if is_last else "")
        else:
            continue
        if complaint := law.unfinished(expected):
            yield complaint


def _continued(
    folder: Path, law: Law, expected: FederationState, devices_of: DevicesOf = in_memory
) -> str:
    """Runs what is left in this process, and compares."""
    coordinate(lambda _: None, folder, devices_of=devices_of)
    return law.unfinished(expected)


HELD = "no commit lost, nothing counted twice, chain verifies, run ends in the undisturbed bits"
SCENARIOS = (
    Scenario(LEVEL, "coordinator killed at each transition", HELD, killed_at_transitions),
    Scenario(LEVEL, "coordinator killed in its writes", HELD, killed_in_writes),
    Scenario(LEVEL, "coordinator killed at random moments", HELD, killed_at_random),
)
