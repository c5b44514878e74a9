"""The ledger: an append-only, hash-chained list of everything that ever left this device.

One SQLite file. An entry is written, durably, before its bytes are sent, and confirmed by a second
row once they are; an entry without that row may or may not have arrived, and counts as sent. Every
row is one canonical JSON object, and its hash covers the hash of the row before, so a change
anywhere shows. Rows cut off at the end only show against a `Head` that was noted elsewhere.
"""

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from proxymoe.client.entries import Entry
from proxymoe.common.errors import DataError, IntegrityError
from proxymoe.common.files import canonical_json, digest_of

APPLICATION_ID = int.from_bytes(b"PxmL")
"""Stands in the file's header, and tells a ledger from any other database."""
VERSION = 1
BUSY_SECONDS = 10.0
"""How long to wait for another process that is writing."""
FIRST = "0" * 64
"""What stands for the hash of the row before the first."""
SCHEMA = (
    """CREATE TABLE rows (
        number   INTEGER PRIMARY KEY,
        confirms INTEGER UNIQUE REFERENCES rows (number),
        content  TEXT NOT NULL,
        hash     TEXT NOT NULL
    ) STRICT""",
    *(
        f"CREATE TRIGGER no_{change} BEFORE {change} ON rows "
        "BEGIN SELECT RAISE (ABORT, 'the ledger is append-only'); END"
        for change in ("UPDATE", "DELETE")
    ),
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {VERSION}",
)
NEWEST = """
    SELECT entry.number, entry.content, entry.hash, mark.number IS NOT NULL
    FROM rows AS entry LEFT JOIN rows AS mark ON mark.confirms = entry.number
    WHERE entry.confirms IS NULL ORDER BY entry.number DESC LIMIT ?"""
SUMS = """
    SELECT COUNT(*), TOTAL(json_extract(content, '$.entry.epsilon')),
        COALESCE(SUM(json_extract(content, '$.entry.num_bytes')), 0),
        COALESCE(SUM(json_extract(content, '$.entry.fetched_bytes')), 0),
        TOTAL(json_extract(content, '$.entry.exposure')),
        substr(json_extract(content, '$.time'), 1, 7) AS month
    FROM rows WHERE confirms IS NULL AND month >= ?"""
DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_ERROR", "SQLITE_FORMAT", "SQLITE_MISMATCH")
"""SQLite's words for a file that is not, or no longer, what it should be."""


class _Row(BaseModel):
    """What one row says: that something leaves, or that it has left."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    time: datetime
    entry: Entry | None = None
    confirms: int | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """An entry in the ledger."""

    number: int
    time: datetime
    """When it was written, UTC."""
    entry: Entry
    is_confirmed: bool
    """Whether it was sent for certain; if not, it may or may not have arrived."""
    hash: str


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over entries, confirmed or not."""

    num_entries: int
    epsilon: float
    sent_bytes: int
    fetched_bytes: int
    exposure: float = 0.0


@dataclass(frozen=True, slots=True)
class Head:
    """The newest row of a ledger; whoever notes it can prove later that nothing was cut off."""

    number: int
    hash: str


class Ledger:
    """The ledger in a file; threads and processes may write to it at once.

    Raises:
        IntegrityError: the file is missing, damaged, or no ledger.
        DataError: it cannot be opened, read or written now (rights, a full disk, a long wait).
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        if not path.exists():
            raise IntegrityError(f"{path}: the ledger is missing; restore it, or wipe this device")
        with self._connection() as connection:
            kind = connection.execute("PRAGMA application_id").fetchone()[0]
            version = connection.execute("PRAGMA user_version").fetchone()[0]
        if (kind, version) != (APPLICATION_ID, VERSION):
            raise IntegrityError(f"{path}: no ledger of version {VERSION}; name another file")

    @classmethod
    def create(cls, path: Path, clock: Callable[[], float] = time.time) -> Self:
        """The ledger in a file, which is made if there is none or none was finished."""
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            with contextlib.closing(_connect(path)) as connection:
                connection.execute("BEGIN EXCLUSIVE")
                if not connection.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()[0]:
                    for statement in SCHEMA:
                        connection.execute(statement)
                connection.execute("COMMIT")
        ledger = cls(path, clock)
        with ledger._connection() as connection:
            connection.execute("PRAGMA journal_mode = WAL")
        return ledger

    def write(self, entry: Entry) -> int:
        """The number of the entry, which is on the disk when this returns: now it may be sent."""
        return self._append(_Row(time=self._now(), entry=entry))

    def confirm(self, number: int) -> None:
        """Notes that an entry was sent for certain; a second time changes nothing.

        Raises:
            DataError: there is no entry with this number.
        """
        self._append(_Row(time=self._now(), confirms=number))

    @contextlib.contextmanager
    def sending(self, entry: Entry) -> Iterator[int]:
        """Writes the entry, lets the block send it, and confirms it if the block succeeds."""
        number = self.write(entry)
        yield number
        self.confirm(number)

    def newest(self, limit: int | None = None) -> list[Record]:
        """The newest entries first, at most `limit` of them.

        Raises:
            IntegrityError: an entry cannot be read.
        """
        with self._connection() as connection:
            rows = connection.execute(NEWEST, (-1 if limit is None else max(limit, 0),)).fetchall()
        records = []
        for number, content, row_hash, confirmed in rows:
            row = self._parsed(number, content)
            if row.entry is None:
                raise self._damage(number, "tells of nothing that left")
            records.append(Record(number, row.time, row.entry, bool(confirmed), row_hash))
        return records

    def totals(self, since: str = "") -> Totals:
        """Totals of a month such as "2026-11" (UTC) and all later ones, or of everything.

        Months to come have entries if the clock was wrong; they count, so that setting the clock
        back frees no budget.
        """
        with self._connection() as connection:
            *sums, _ = connection.execute(SUMS, (since,)).fetchone()
        return Totals(*sums)

    def monthly(self) -> dict[str, Totals]:
        """Totals of each month with entries, the newest first."""
        query = f"{SUMS} GROUP BY month ORDER BY month DESC"
        with self._connection() as connection:
            return {month: Totals(*sums) for *sums, month in connection.execute(query, ("",))}

    def month(self) -> str:
        """The current month, as `totals` and `monthly` call it."""
        return f"{self._now():%Y-%m}"

    def verify(self, known: Head | None = None) -> Head:
        """The newest row, after checking every row of the chain.

        Raises:
            IntegrityError: a row was changed, removed or put in; or `known`, a head noted
                earlier, is no longer part of the chain.
        """
        head = Head(0, FIRST)
        found = known is None or known == head
        with self._connection() as connection:
            query = "SELECT number, confirms, content, hash FROM rows ORDER BY number"
            for number, confirms, content, row_hash in connection.execute(query):
                if (number, row_hash) != (head.number + 1, _hash(head.hash, content)):
                    raise self._damage(number, "does not follow from the row before")
                row = self._parsed(number, content)
                if row.confirms != confirms or (row.entry is None) == (confirms is None):
                    raise self._damage(number, "was changed")
                head = Head(number, row_hash)
                found = found or known == head
        if known is not None and not found:
            raise self._damage(known.number, "is missing, or not the one that was noted")
        return head

    def _append(self, row: _Row) -> int:
        content = canonical_json(row.model_dump(mode="json", exclude_none=True)).decode()
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")  # what is not committed is undone on closing
            if row.confirms is not None:
                query = "SELECT confirms FROM rows WHERE number = ?1 OR confirms = ?1"
                found = connection.execute(query, (row.confirms,)).fetchall()
                if (None,) not in found:
                    raise DataError(f"{self.path}: there is no entry {row.confirms} to confirm")
                if len(found) > 1:
                    return row.confirms
            query = "SELECT number + 1, hash FROM rows ORDER BY number DESC LIMIT 1"
            number, last = connection.execute(query).fetchone() or (1, FIRST)
            values = (number, row.confirms, content, _hash(last, content))
            connection.execute("INSERT INTO rows VALUES (?, ?, ?, ?)", values)
            connection.execute("COMMIT")
        return int(number)

    def _parsed(self, number: int, content: str) -> _Row:
        try:
            return _Row.model_validate_json(content)
        except ValidationError as error:
            raise self._damage(number, "cannot be read") from error

    def _damage(self, number: int, what: str) -> IntegrityError:
        return IntegrityError(
            f"{self.path}: row {number} {what}; the ledger is damaged or was tampered with, keep "
            "it as it is and ask who had access"
        )

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with _explained(self.path), contextlib.closing(_connect(self.path)) as connection:
            yield connection


def _hash(before: str, content: str) -> str:
    return digest_of(before.encode(), content.encode())


def _connect(path: Path) -> sqlite3.Connection:
    """A connection for one task: nothing is shared between threads or forks."""
    uri = f"{path.absolute().as_uri()}?mode=rw"
    connection = sqlite3.connect(uri, timeout=BUSY_SECONDS, isolation_level=None, uri=True)
    connection.execute("PRAGMA synchronous = FULL")
    return connection


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: the ledger cannot be written ({error.strerror})") from error
    except sqlite3.Error as error:
        if str(getattr(error, "sqlite_errorname", "")).startswith(DAMAGED):
            raise IntegrityError(f"{path}: damaged, or no ledger ({error}); restore it") from error
        raise DataError(
            f"{path}: the ledger cannot be used now ({error}), and nothing is sent without it; "
            "check rights, free space and other processes"
        ) from error
