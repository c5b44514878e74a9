"""The table of the fault matrix: what was injected, what was survived, what was checked."""

import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

MAX_TOLD = 5
"""Complaints of one scenario that are told; more are counted."""


class Ground:
    """Where a scenario does its damage: fresh folders, and chance that a seed repeats."""

    def __init__(self, root: Path, rng: np.random.Generator) -> None:
        self.rng = rng
        self._root = root
        self._count = 0

    def folder(self) -> Path:
        """A new folder, with nothing in it."""
        self._count += 1
        path = self._root / f"{self._count:04d}"
        path.mkdir()
        return path


Inject = Callable[[Ground], Iterator[str]]
"""Injects one fault after another, and tells of each what did not hold after it: "" if all did."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A class of faults."""

    level: str
    fault: str
    checked: str
    """What was looked at, after each fault unless it says otherwise."""
    inject: Inject


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the faults of one scenario."""

    level: str
    fault: str
    checked: str
    injected: int
    survived: int
    seconds: float
    complaints: tuple[str, ...]
    """The first that did not hold; an error that ended the scenario is one of them."""

    @property
    def is_sound(self) -> bool:
        """Whether faults were injected, and everything held after each."""
        return 0 < self.injected == self.survived and not self.complaints


def selected(scenarios: Sequence[Scenario], only: str | None) -> list[Scenario]:
    """The scenarios with `only` in their level or their fault; all without it."""
    word = (only or "").lower()
    return [s for s in scenarios if word in s.level.lower() or word in s.fault.lower()]


def suffer(scenario: Scenario, seed: int, told: Callable[[int], None]) -> Outcome:
    """Injects the faults of one scenario in a temporary folder; `told` hears how many so far."""
    started = time.monotonic()
    complaints: list[str] = []
    injected = survived = 0
    rng = np.random.default_rng([seed, zlib.crc32(scenario.fault.encode())])
    with tempfile.TemporaryDirectory(prefix="proxymoe-faults-") as root:
        try:
            for complaint in scenario.inject(Ground(Path(root), rng)):
                injected += 1
                survived += not complaint
                complaints += [f"fault {injected}: {complaint}"] if complaint else []
                told(injected)
        except Exception as error:  # noqa: BLE001  one broken scenario must not hide the others
            complaints.append(f"after fault {injected}: {type(error).__name__}: {error}")
    seconds = time.monotonic() - started
    return Outcome(
        scenario.level,
        scenario.fault,
        scenario.checked,
        injected,
        survived,
        seconds,
        tuple(complaints[:MAX_TOLD]),
    )


def table_of(outcomes: Sequence[Outcome]) -> Table:
    """The outcomes, one row each, and their sums."""
    table = Table(title="fault matrix", show_footer=True)
    injected, survived = (sum(getattr(o, n) for o in outcomes) for n in ("injected", "survived"))
    table.add_column("level", no_wrap=True)
    table.add_column("class of fault", "all")
    table.add_column("injected", str(injected), justify="right")
    table.add_column("survived", str(survived), justify="right")
    table.add_column("what was checked")
    table.add_column("seconds", f"{sum(o.seconds for o in outcomes):.1f}", justify="right")
    for outcome in outcomes:
        colour = "green" if outcome.is_sound else "red"
        table.add_row(
            outcome.level,
            outcome.fault,
            str(outcome.injected),
            f"[{colour}]{outcome.survived}[/]",
            outcome.checked,
            f"{outcome.seconds:.1f}",
        )
    return table


def report_of(outcomes: Sequence[Outcome], seed: int) -> dict[str, Any]:
    """The outcomes as plain data for a JSON file."""
    return {
        "seed": seed,
        "injected": sum(outcome.injected for outcome in outcomes),
        "survived": sum(outcome.survived for outcome in outcomes),
        "sound": all(outcome.is_sound for outcome in outcomes),
        "scenarios": [asdict(outcome) for outcome in outcomes],
    }
