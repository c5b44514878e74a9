"""Disk edge of the round engine: what has happened, in SQLite, and the vectors beside it.

Every change of a phase is one transaction, with its entry in the audit log. Vectors are files that
are written and flushed before the row that names them: a row never promises what is not there, and
a file without a row is nobody's.
"""

import json
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from proxymoe.common.checkpoint import read_tensors, write_tensors
from proxymoe.common.errors import CheckpointError, ConfigError, IntegrityError
from proxymoe.common.files import digest_of, write_bytes
from proxymoe.server import audit, spending
from proxymoe.server.journal import initial_state
from proxymoe.server.round import Candidate, FederationState
from proxymoe.server.strategy import StrategyState

SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS rounds (
    number INTEGER PRIMARY KEY, phase TEXT NOT NULL, version INTEGER NOT NULL,
    cohort TEXT NOT NULL, canary REAL, reason TEXT, skipped INTEGER
) STRICT;
CREATE TABLE IF NOT EXISTS updates (
    number INTEGER NOT NULL, device TEXT NOT NULL, digest TEXT NOT NULL,
    PRIMARY KEY (number, device)
) STRICT;
CREATE TABLE IF NOT EXISTS attempts (
    number INTEGER NOT NULL, attempt INTEGER NOT NULL, PRIMARY KEY (number, attempt)
) STRICT;
CREATE TABLE IF NOT EXISTS versions (
    version INTEGER PRIMARY KEY, parent INTEGER NOT NULL, number INTEGER NOT NULL,
    digest TEXT NOT NULL
) STRICT;
"""
BUSY_SECONDS = 30.0


class Phase(StrEnum):
    """Where a round is; the last three are ends."""

    PLANNED = "planned"
    SELECTING = "selecting"
    DISTRIBUTING = "distributing"
    TRAINING = "training"
    COLLECTING = "collecting"
    AGGREGATED = "aggregated"
    EVALUATED = "evaluated"
    COMMITTED = "committed"
    ABANDONED = "abandoned"
    ROLLED_BACK = "rolled back"

    @property
    def over(self) -> bool:
        """Whether nothing more happens in the round."""
        return self in (Phase.COMMITTED, Phase.ABANDONED, Phase.ROLLED_BACK)


@dataclass(frozen=True, slots=True)
class Round:
    """One round as it stands."""

    number: int
    phase: Phase
    version: int
    """The version that it started from."""
    cohort: tuple[str, ...]
    canary: float | None
    """The candidate's loss on public text; None before it was measured, or if not finite."""
    reason: str | None
    skipped: int | None
    """Blocks that no update, or too few, covered; None before the sum is known."""


@dataclass(frozen=True, slots=True)
class Version:
    """A committed adapter; version 0 is the adapter that changes nothing."""

    version: int
    parent: int
    number: int
    """The round that made it."""
    digest: str


class RoundStore:
    """The durable state of one coordinator; one process writes at a time.

    Args:
        folder: the coordinator's run directory.
        run: the run's name; a folder that holds another run is refused.
        size: P of the full layout.

    Raises:
        ConfigError: the folder holds another run or layout.
    """

    def __init__(self, folder: Path, run: str, size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._size = folder, size
        self.database = sqlite3.connect(folder / "state.db", BUSY_SECONDS, isolation_level=None)
        self.database.execute("PRAGMA journal_mode = WAL")
        self.database.execute("PRAGMA synchronous = FULL")
        # All at once: who reads meanwhile finds nothing yet, and not half of it.
        schema = SCHEMA + audit.SCHEMA + spending.SCHEMA
        self.database.executescript(f"BEGIN IMMEDIATE; {schema} COMMIT;")
        for key, value in {"run": run, "size": str(size), "version": "0"}.items():
            self.database.execute("INSERT OR IGNORE INTO facts VALUES (?, ?)", (key, value))
        for key, wanted in {"run": run, "size": str(size)}.items():
            if (found := self._fact(key)) != wanted:
                raise ConfigError(
                    f"{folder} belongs to a federation with {key} {found!r}, not {wanted!r}; "
                    "use another folder"
                )

    def close(self) -> None:
        """Closes the database."""
        self.database.close()

    @contextmanager
    def change(self, time: float, event: str, **body: Any) -> Iterator[sqlite3.Connection]:
        """One transaction with its audit entry: all of the block's changes happen, or none."""
        self.database.execute("BEGIN IMMEDIATE")
        try:
            yield self.database
            audit.append(self.database, time, event, **body)
        except BaseException:
            self.database.execute("ROLLBACK")
            raise
        self.database.execute("COMMIT")

    def latest(self) -> Round | None:
        """The newest round; None before the first."""
        row = self.database.execute("SELECT * FROM rounds ORDER BY number DESC LIMIT 1").fetchone()
        return None if row is None else _round(row)

    def rounds(self) -> list[Round]:
        """All rounds in order."""
        return [
            _round(row) for row in self.database.execute("SELECT * FROM rounds ORDER BY number")
        ]

    def begin(self, number: int, time: float) -> None:
        """Plans a round on the current version."""
        version = self.current()
        with self.change(time, Phase.PLANNED, round=number, version=version) as database:
            database.execute(
                "INSERT INTO rounds VALUES (?, ?, ?, '[]', NULL, NULL, NULL)",
                (number, Phase.PLANNED, version),
            )

    def enter(
        self,
        number: int,
        phase: Phase,
        time: float,
        *,
        cohort: Sequence[str] | None = None,
        canary: float | None = None,
        reason: str | None = None,
        skipped: int | None = None,
    ) -> None:
        """Moves a round to a phase, with what was found out on the way."""
        found = {"cohort": cohort, "canary": canary, "reason": reason, "skipped": skipped}
        known = {key: value for key, value in found.items() if value is not None}
        members = None if cohort is None else json.dumps(list(cohort))
        with self.change(time, phase, round=number, **known) as database:
            database.execute(
                "UPDATE rounds SET phase = ?, cohort = coalesce(?, cohort), "
                "canary = coalesce(?, canary), reason = coalesce(?, reason), "
                "skipped = coalesce(?, skipped) WHERE number = ?",
                (phase, members, canary, reason, skipped, number),
            )

    def keep_update(
        self, number: int, device: str, content: bytes, digest: str, time: float
    ) -> None:
        """Makes a device's reply durable; at most one per round and device."""
        write_bytes(self._update_path(number, device), content)
        with self.change(time, "update", round=number, device=device, digest=digest) as database:
            database.execute("INSERT INTO updates VALUES (?, ?, ?)", (number, device, digest))

    def updates(self, number: int) -> dict[str, str]:
        """{device: digest} of the updates that were kept for a round."""
        rows = self.database.execute(
            "SELECT device, digest FROM updates WHERE number = ? ORDER BY device", (number,)
        )
        return dict(rows.fetchall())

    def update(self, number: int, device: str) -> bytes:
        """The reply that was kept."""
        return self._update_path(number, device).read_bytes()

    def begin_attempt(self, number: int, devices: Sequence[str], time: float) -> int:
        """The number of a new attempt, at a masked sum or at collecting; none is given twice."""
        (last,) = self.database.execute(
            "SELECT max(attempt) FROM attempts WHERE number = ?", (number,)
        ).fetchone()
        attempt = 0 if last is None else int(last) + 1
        body = {"round": number, "attempt": attempt, "devices": list(devices)}
        with self.change(time, "attempt", **body) as database:
            database.execute("INSERT INTO attempts VALUES (?, ?)", (number, attempt))
        return attempt

    def forget(self, number: int) -> None:
        """Deletes the vectors of a round that is over, but for a committed one's adapter.

        That they came, and what became of them, stays on record.
        """
        folder = self._folder / "updates" / f"{number:06d}"
        if folder.exists():
            shutil.rmtree(folder)
        if number not in {version.number for version in self.versions()}:
            self._candidate_path(number).unlink(missing_ok=True)

    def keep_candidate(self, number: int, candidate: Candidate) -> None:
        """Makes a candidate durable; nothing is committed by that."""
        tensors = {
            "adapter": candidate.adapter,
            "momentum": candidate.strategy.momentum,
            "variance": candidate.strategy.variance,
        }
        write_tensors(self._candidate_path(number), tensors)

    def candidate(self, number: int, digest: str | None = None) -> Candidate:
        """The candidate of a round.

        Raises:
            IntegrityError: it differs from its digest.
            CheckpointError: it is missing or damaged.
        """
        path = self._candidate_path(number)
        if not path.exists():
            raise CheckpointError(f"{path}: missing; roll back to a version that is whole")
        if digest is not None and digest_of(path.read_bytes()) != digest:
            raise IntegrityError(f"{path}: damaged; roll back to a version that is whole")
        tensors = read_tensors(path)
        memory = StrategyState(tensors["momentum"], tensors["variance"])
        return Candidate(tensors["adapter"], memory)

    def commit(self, number: int, time: float) -> int:
        """Makes a round's candidate the current version, and returns its number."""
        parent, digest = self.current(), digest_of(self._candidate_path(number).read_bytes())
        (last,) = self.database.execute("SELECT max(version) FROM versions").fetchone()
        version = (last or 0) + 1
        body = {"round": number, "version": version, "parent": parent, "digest": digest}
        with self.change(time, Phase.COMMITTED, **body) as database:
            database.execute(
                "INSERT INTO versions VALUES (?, ?, ?, ?)", (version, parent, number, digest)
            )
            database.execute(
                "UPDATE rounds SET phase = ? WHERE number = ?", (Phase.COMMITTED, number)
            )
            self._set_current(version)
        return version

    def roll_back(self, version: int, time: float) -> None:
        """Makes an older version the current one; what came after it stays on disk.

        Raises:
            ConfigError: there is no such version.
            IntegrityError, CheckpointError: its vectors are damaged or missing.
        """
        self.version_state(version)
        with self.change(time, "roll back", version=version, before=self.current()):
            self._set_current(version)

    def versions(self) -> list[Version]:
        """All committed versions in order."""
        rows = self.database.execute("SELECT * FROM versions ORDER BY version")
        return [Version(*row) for row in rows]

    def current(self) -> int:
        """The current version."""
        return int(self._fact("version"))

    def version_state(self, version: int) -> Candidate:
        """Adapter and strategy memory of a version; see `roll_back` for what it raises."""
        if version == 0:
            initial = initial_state(self._size)
            return Candidate(initial.adapter, initial.strategy)
        row = self.database.execute(
            "SELECT number, digest FROM versions WHERE version = ?", (version,)
        ).fetchone()
        if row is None:
            known = [0, *(v.version for v in self.versions())]
            raise ConfigError(f"no version {version}; there are {known}")
        return self.candidate(*row)

    def state(self, number: int, version: int) -> FederationState:
        """What round `number` starts from, on that version."""
        found = self.version_state(version)
        return FederationState(number - 1, found.adapter, found.strategy)

    def _fact(self, key: str) -> str:
        (value,) = self.database.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
        return str(value)

    def _set_current(self, version: int) -> None:
        self.database.execute("UPDATE facts SET value = ? WHERE key = 'version'", (str(version),))

    def _update_path(self, number: int, device: str) -> Path:
        # A device's name may hold anything; a file's may not.
        return self._folder / "updates" / f"{number:06d}" / f"{digest_of(device.encode())[:32]}.pxm"

    def _candidate_path(self, number: int) -> Path:
        return self._folder / "versions" / f"{number:06d}.safetensors"


def _round(row: tuple[Any, ...]) -> Round:
    number, phase, version, cohort, *found = row
    return Round(number, Phase(phase), version, tuple(json.loads(cohort)), *found)
