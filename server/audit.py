"""An append-only, hash-chained record of what the coordinator did, in its own database.

Every entry's hash covers the entry and the hash before it, so that nobody can change, drop or
insert one without all later hashes giving it away. Entries are written in the transaction of what
they record.
"""

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from proxymoe.common.errors import IntegrityError
from proxymoe.common.files import canonical_json, digest_of

SCHEMA = """
CREATE TABLE IF NOT EXISTS audit (
    seq INTEGER PRIMARY KEY, time REAL NOT NULL, event TEXT NOT NULL, body TEXT NOT NULL,
    hash TEXT NOT NULL
) STRICT;
"""
BEGINNING = "0" * 64


@dataclass(frozen=True, slots=True)
class Entry:
    """One recorded event."""

    seq: int
    time: float
    """Seconds since 1970."""
    event: str
    body: dict[str, Any]
    hash: str


def append(database: sqlite3.Connection, time: float, event: str, **body: Any) -> None:
    """Adds an entry; part of the caller's transaction."""
    row = database.execute("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1").fetchone()
    last, before = row or (0, BEGINNING)
    text = canonical_json(body).decode()
    values = (last + 1, time, event, text)
    database.execute("INSERT INTO audit VALUES (?, ?, ?, ?, ?)", (*values, _hash(before, *values)))


def entries(database: sqlite3.Connection) -> Iterator[Entry]:
    """All entries in order, each checked.

    Raises:
        IntegrityError: an entry was changed, dropped or inserted; the message names it.
    """
    before, expected = BEGINNING, 1
    for seq, time, event, body, found in database.execute("SELECT * FROM audit ORDER BY seq"):
        if seq != expected or found != _hash(before, seq, time, event, body):
            raise IntegrityError(f"the audit log was changed at entry {expected}")
        yield Entry(seq, time, event, json.loads(body), found)
        before, expected = found, expected + 1


def _hash(before: str, seq: int, time: float, event: str, body: str) -> str:
    return digest_of(canonical_json([before, seq, time, event, body]))
