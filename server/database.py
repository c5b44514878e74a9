"""An SQLite database that threads and processes use at once, with an audit log of every change."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from proxymoe.server import audit

BUSY_SECONDS = 30.0
"""How long a call waits for the change of another."""

Row = tuple[Any, ...]


class Database:
    """Each call has a connection of its own; what it reads is what was committed last.

    Args:
        path: the file; made if it is missing.
        schema: statements that may run again.
        clock: unix seconds, for the records.
    """

    def __init__(self, path: Path, schema: str, clock: Callable[[], float]) -> None:
        self._path, self.clock = path, clock
        # Stays open: the last connection to close would tidy up, and each call closes one.
        self._open = sqlite3.connect(path, BUSY_SECONDS, check_same_thread=False)
        self._open.execute("PRAGMA journal_mode = WAL")
        self._open.executescript(schema + audit.SCHEMA)

    def close(self) -> None:
        """Lets go of the file."""
        self._open.close()

    def rows(self, query: str, *values: Any) -> list[Row]:
        """All rows of a query."""
        with self._connected() as connection:
            return connection.execute(query, values).fetchall()

    def row(self, query: str, *values: Any) -> Row | None:
        """The first row of a query."""
        found = self.rows(query, *values)
        return found[0] if found else None

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of the block's changes happen, or none; it records them with `audit.append`."""
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    @contextmanager
    def change(self, event: str, **body: Any) -> Iterator[sqlite3.Connection]:
        """A transaction with this entry in the audit log."""
        with self.transaction() as connection:
            yield connection
            audit.append(connection, self.clock(), event, **body)

    def history(self) -> list[audit.Entry]:
        """Everything that ever changed; IntegrityError if the record was tampered with."""
        with self._connected() as connection:
            return list(audit.entries(connection))

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self._path, BUSY_SECONDS, isolation_level=None)
        with closing(connection):
            connection.execute("PRAGMA synchronous = FULL")
            yield connection
