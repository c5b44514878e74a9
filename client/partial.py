"""Disk edge of the device: a blob on its way, of which a crash takes nothing that was verified.

Beside the chunks received so far lies a record of their lengths and digests. Whoever opens them
again checks each chunk, so nothing has to be durable to be right; what is synced now and then
only bounds what a power loss costs.
"""

import errno
import fcntl
import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Self

from proxymoe.common.errors import IntegrityError, ProxyMoEError
from proxymoe.common.files import sync_folder

MAX_CHUNK_BYTES = 4 << 20
"""No chunk is longer; a record that says so is damaged."""
SYNC_BYTES = 32 << 20
"""What a power loss costs at most."""
RECORD = struct.Struct("<I32s")
"""A received chunk: its length and its SHA-256."""


class StoreError(ProxyMoEError):
    """The folder of the store cannot be used as asked; often its disk is full."""


class Partial:
    """A blob on its way: what was received and verified, and the sole right to add to it.

    The right ends with the `with` block; the chunks stay for the next attempt. Whatever a crash
    or a power loss left is verified at opening, and cut behind the last sound chunk.
    """

    def __init__(self, data: FileIO, path: Path, target: Path, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.num_verified = 0
        """Bytes of the blob that are here: where the next chunk begins."""
        self._path, self._target = path, target
        self._data = data
        self._chunks = _open(path.with_suffix(".chunks"), os.O_CREAT)
        self._num_chunks = 0
        self._state = hashlib.sha256()
        self._recover()
        self._num_synced = self.num_verified

    def append(self, content: bytes, digest: bytes) -> None:
        """Adds the next chunk.

        Raises:
            IntegrityError: it differs from its SHA-256, or does not fit; nothing is added.
            StoreError: the disk is full; what was added before is kept.
        """
        if not 0 < len(content) <= self._most():
            raise IntegrityError(f"{len(content)} bytes at byte {self.num_verified} do not fit")
        if hashlib.sha256(content).digest() != digest:
            raise IntegrityError(f"the chunk at byte {self.num_verified} differs from its digest")
        with explained(self._path):
            # At explicit offsets, so that the rest of a failed write is overwritten by the next.
            _write_at(self._data, content, self.num_verified)
            record = RECORD.pack(len(content), digest)
            _write_at(self._chunks, record, self._num_chunks * RECORD.size)
            self._count(content)
            if self.num_verified - self._num_synced >= SYNC_BYTES:
                self._sync()

    def finish(self) -> None:
        """Verifies the whole blob and moves it into its place; durable when this returns.

        Raises:
            IntegrityError: it is not whole yet, or differs from its digest and was thrown away.
        """
        if self.num_verified != self.num_bytes:
            raise IntegrityError(f"the blob ends at byte {self.num_verified} of {self.num_bytes}")
        with explained(self._path):
            if self._state.hexdigest() != self._path.name:
                self._data.truncate(0)
                self._chunks.truncate(0)
                self._state = hashlib.sha256()
                self.num_verified = self._num_chunks = self._num_synced = 0
                raise IntegrityError(f"{self.num_bytes} bytes differ from the blob's digest")
            os.fsync(self._data.fileno())
            self._path.replace(self._target)
            sync_folder(self._target.parent)
            self._path.with_suffix(".chunks").unlink(missing_ok=True)
            self._num_synced = self.num_verified

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what is not durable will be fetched again, no worse
            self._sync()
        self._chunks.close()
        self._data.close()  # the lock goes last

    def _most(self) -> int:
        return min(MAX_CHUNK_BYTES, self.num_bytes - self.num_verified)

    def _recover(self) -> None:
        while len(record := self._chunks.read(RECORD.size)) == RECORD.size:
            length, digest = RECORD.unpack(record)
            if not 0 < length <= self._most():
                break
            content = self._data.read(length)
            if hashlib.sha256(content).digest() != digest:
                break
            self._count(content)
        self._data.truncate(self.num_verified)
        self._chunks.truncate(self._num_chunks * RECORD.size)

    def _count(self, content: bytes) -> None:
        self._state.update(content)
        self.num_verified += len(content)
        self._num_chunks += 1

    def _sync(self) -> None:
        if self.num_verified > self._num_synced:
            os.fdatasync(self._data.fileno())
            os.fdatasync(self._chunks.fileno())
            sync_folder(self._path.parent)
            self._num_synced = self.num_verified


@contextmanager
def explained(path: Path, remedy: str = "may this user write there?") -> Iterator[None]:
    """Turns what the disk says into a StoreError that tells what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "make room on the disk and go on; what was received is kept"
        raise StoreError(f"{error.filename or path}: {error.strerror}; {remedy}") from error


def lock_file(path: Path, flags: int = 0) -> FileIO | None:
    """The file, open for its sole writer; None if it has one, or has gone."""
    try:
        file = _open(path, flags)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    file.close()
    return None


def _open(path: Path, flags: int = 0) -> FileIO:
    return FileIO(os.open(path, os.O_RDWR | flags, 0o600), "r+")


def _write_at(file: FileIO, content: bytes, offset: int) -> None:
    while content:
        written = os.pwrite(file.fileno(), content, offset)
        content, offset = content[written:], offset + written
