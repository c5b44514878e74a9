"""Disk edge: one process at a time does what a lock file stands for.

The lock is the system's, so that it ends with the process, however that ends; the file stays.
"""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from proxymoe.common.errors import ConfigError

GLANCE_SECONDS = 0.5
"""Who looks whether the lock is held has it for an instant; longer is somebody who works."""


@contextmanager
def held(path: Path, refusal: str) -> Iterator[None]:
    """Holds the lock while the block runs.

    Raises:
        ConfigError: another process holds it; `refusal` says what that means.
    """
    with path.open("ab") as file:
        deadline = time.monotonic() + GLANCE_SECONDS
        while not _taken(file, fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                raise ConfigError(refusal)
            time.sleep(GLANCE_SECONDS / 20)
        yield


def is_held(path: Path) -> bool:
    """Whether a process, perhaps this one, holds the lock now."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        return not _taken(file, fcntl.LOCK_SH)


def _taken(file: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
