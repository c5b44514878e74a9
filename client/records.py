"""Disk edge of masked sums on a device: whose keys it knows, and what it must never forget.

One SQLite file. A peer's key is pinned when it is first seen, and never changes: who could put
another in its place could pretend to be that peer. What this device has consented to is on record
before anybody hears of it; see `common/secagg.py`, rule 4.
"""

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple
from pathlib import Path

from proxymoe.common.contribution import Record
from proxymoe.common.directory import PinnedKeys
from proxymoe.common.errors import DataError, ProtocolError
from proxymoe.common.identity import key_digest
from proxymoe.common.secagg import Phase

SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS peers (
    device TEXT PRIMARY KEY, key TEXT NOT NULL, since REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS records (
    run TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL, phase TEXT NOT NULL,
    transcript TEXT NOT NULL, digest TEXT NOT NULL
) STRICT;
COMMIT;
"""
BUSY_SECONDS = 10.0


class Records:
    """What one device knows of its peers, and of the sums that it was part of.

    Args:
        path: the file; made when it is first needed.
        clock: unix seconds.

    Raises:
        DataError: in any method, if the file cannot be read or written now.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock

    def pinned(self, keys: Mapping[str, str]) -> PinnedKeys:
        """A directory of these devices, {name: PEM}; who is new is pinned from now on.

        Raises:
            ProtocolError: a key that is none, or not the one that was pinned; then nothing is.
        """
        digests = {name: key_digest(pem.encode()) for name, pem in keys.items()}
        with self._transaction() as database:
            known = dict(database.execute("SELECT device, key FROM peers").fetchall())
            for name, digest in digests.items():
                if (pin := known.get(name, digest)) != digest:
                    raise ProtocolError(
                        f"device {name!r}: key {digest[:16]}, pinned was {pin[:16]}; a device that "
                        "was set up anew enrols under a new name"
                    )
            database.executemany(
                "INSERT OR IGNORE INTO peers VALUES (?, ?, ?)",
                [(name, digest, self._clock()) for name, digest in digests.items()],
            )
        return PinnedKeys({name: pem.encode() for name, pem in keys.items()})

    def peers(self) -> dict[str, str]:
        """{name: digest of its key}, of all that were ever pinned; for the owner to compare."""
        with self._transaction() as database:
            rows = database.execute("SELECT device, key FROM peers ORDER BY device").fetchall()
        return dict(rows)

    def keep(self, record: Record) -> None:
        """Notes a record; it is on the disk when this returns."""
        with self._transaction() as database:
            database.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?)", astuple(record))

    def all(self) -> list[Record]:
        """Everything that was ever kept."""
        with self._transaction() as database:
            rows = database.execute("SELECT * FROM records").fetchall()
        found = []
        try:
            for run, number, attempt, phase, transcript, update in rows:
                found.append(Record(run, number, attempt, Phase(phase), transcript, update))
        except ValueError as error:
            raise DataError(f"{self._path}: damaged ({error}); restore it") from error
        return found

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._path.touch(mode=0o600)
            database = sqlite3.connect(self._path, BUSY_SECONDS, isolation_level=None)
            with contextlib.closing(database):
                database.execute("PRAGMA synchronous = FULL")
                database.executescript(SCHEMA)
                database.execute("BEGIN IMMEDIATE")  # what is not committed is undone on closing
                yield database
                database.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            raise DataError(
                f"{self._path}: cannot be used now ({error}), and no sum is taken part in without "
                "it; check rights and free space, or restore it"
            ) from error
