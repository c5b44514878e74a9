"""What a coordinator's run directory tells: rounds, versions, devices, processes, disk.

Everything is read from files and databases, so it can be told whether the service runs or not, and
by any process. Nothing is changed, and nothing heavy is imported.
"""

import dataclasses
import json
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxymoe.common.errors import CheckpointError
from proxymoe.common.supervise import STATE
from proxymoe.server.devices import Devices
from proxymoe.server.enrolment import Standing
from proxymoe.server.lock import is_held
from proxymoe.server.run_directory import RunDirectory

OVER = ("committed", "abandoned", "rolled back")


@dataclass(frozen=True, slots=True)
class RoundEntry:
    """One round as it stands; see `server.store.Round`."""

    number: int
    phase: str
    version: int
    """The version that it started from."""
    cohort: tuple[str, ...]
    updates: int
    """How many of the cohort have answered."""
    canary: float | None
    reason: str | None
    skipped: int | None

    @property
    def over(self) -> bool:
        """Whether nothing more happens in the round."""
        return self.phase in OVER


@dataclass(frozen=True, slots=True)
class VersionEntry:
    """A committed version, the one it came from, and the round that made it."""

    version: int
    parent: int
    number: int
    digest: str


@dataclass(frozen=True, slots=True)
class Rounds:
    """All rounds and versions so far."""

    rounds: tuple[RoundEntry, ...] = ()
    versions: tuple[VersionEntry, ...] = ()
    current: int = 0
    """The version that the next round starts from."""
    size: int | None = None
    """P of the full layout; None before the first round."""

    def finished(self, wanted: int) -> bool:
        """Whether that many rounds are over."""
        return bool(self.rounds) and self.rounds[-1].over and self.rounds[-1].number >= wanted

    def as_json(self) -> dict[str, Any]:
        """The same for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Engine:
    """The process that runs the rounds, as it announced itself."""

    pid: int
    run: int
    """Number of the Flower run that it serves."""
    state: str
    """running, stopped, finished or failed, by its own word."""
    alive: bool


@dataclass(frozen=True, slots=True)
class ChildEntry:
    """One process of the service."""

    name: str
    pid: int | None
    ready: bool
    failures: int
    """In a row."""


@dataclass(frozen=True, slots=True)
class Status:
    """Everything at one moment."""

    run: str
    serving: bool
    """Whether a `serve` holds the run directory."""
    finished: bool
    rounds_wanted: int
    round: RoundEntry | None
    version: int
    devices: dict[str, int]
    """How many names there are, by standing."""
    engine: Engine | None
    children: tuple[ChildEntry, ...]
    ports: dict[str, int]
    run_bytes: int
    """Size of the run directory."""
    free_bytes: int
    """Left on its disk."""

    def as_json(self) -> dict[str, Any]:
        """The same for JSON."""
        return dataclasses.asdict(self)


def serve_lock(run: RunDirectory) -> Path:
    """Held by the one `serve` of a run directory."""
    return run.path / "serve.lock"


def engine_file(run: RunDirectory) -> Path:
    """Where the process that runs the rounds announces itself."""
    return run.path / "engine.json"


def engine_lock(run: RunDirectory) -> Path:
    """Held by that process for as long as it lives."""
    return run.path / "engine.lock"


def status(run: RunDirectory) -> Status:
    """How things stand.

    Raises:
        ConfigError: no run directory, or its settings are damaged.
        CheckpointError: a database is damaged.
    """
    settings, found = run.settings, rounds(run)
    network, serving = settings.network, is_held(serve_lock(run))
    return Status(
        run=settings.run,
        serving=serving,
        finished=found.finished(settings.federation.rounds),
        rounds_wanted=settings.federation.rounds,
        round=found.rounds[-1] if found.rounds else None,
        version=found.current,
        devices=standings(run),
        engine=engine(run),
        children=_children(run) if serving else (),
        ports={
            "gateway": network.gateway_port,
            "blobs": network.blob_port,
            "status": network.status_port,
            "superlink": network.superlink_port,
        },
        run_bytes=_size(run.path),
        free_bytes=shutil.disk_usage(run.path).free,
    )


def rounds(run: RunDirectory) -> Rounds:
    """Rounds and versions, from the round engine's database; CheckpointError if it is damaged."""
    path = run.path / "state.db"
    if not path.exists():
        return Rounds()
    with readable(path) as database:
        if database.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
            return Rounds()  # it is being made
        facts = dict(database.execute("SELECT key, value FROM facts").fetchall())
        entries = database.execute(
            "SELECT number, phase, version, cohort, "
            "(SELECT count(*) FROM updates WHERE updates.number = rounds.number), canary, reason, "
            "skipped FROM rounds ORDER BY number"
        ).fetchall()
        versions = database.execute("SELECT * FROM versions ORDER BY version").fetchall()
    return Rounds(
        rounds=tuple(
            RoundEntry(number, phase, version, tuple(json.loads(cohort)), *rest)
            for number, phase, version, cohort, *rest in entries
        ),
        versions=tuple(VersionEntry(*row) for row in versions),
        current=int(facts.get("version", 0)),
        size=int(facts["size"]) if "size" in facts else None,
    )


def standings(run: RunDirectory) -> dict[str, int]:
    """How many device names there are, by standing."""
    if not run.devices_db.exists():
        return {}
    with readable(run.devices_db), closing(Devices(run.devices_db)) as devices:
        counts = Counter(word_of(entry.standing) for entry in devices.entries())
    return dict(sorted(counts.items()))


def word_of(standing: Standing) -> str:
    """A device's standing for people: who is unknown and on our list was invited."""
    return "invited" if standing is Standing.UNKNOWN else str(standing)


def engine(run: RunDirectory) -> Engine | None:
    """The process that runs the rounds, or ran them last; None if there never was one."""
    try:
        known = json.loads(engine_file(run).read_bytes())
        alive = is_held(engine_lock(run))
        return Engine(int(known["pid"]), int(known["run"]), str(known["state"]), alive)
    except (OSError, ValueError, TypeError, KeyError):
        return None  # it is written atomically; what else is there is nobody's


@contextmanager
def readable(path: Path) -> Iterator[sqlite3.Connection]:
    """A database to read from; CheckpointError, in the block too, if it is damaged."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            yield database
    except sqlite3.Error as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); restore the run directory from a backup"
        ) from error


def _children(run: RunDirectory) -> tuple[ChildEntry, ...]:
    with suppress(OSError, ValueError, TypeError):
        state = json.loads((run.log / STATE).read_bytes())
        return tuple(ChildEntry(name, **child) for name, child in state.items())
    return ()


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # files come and go
            total += path.lstat().st_size
    return total
