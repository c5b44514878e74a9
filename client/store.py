"""Disk edge of the device: blobs under their digests, whole or partial, within a quota.

    blobs/<digest>            whole and verified; its time is when it was last used
    partial/<digest>          the chunks received so far, each verified
    partial/<digest>.chunks   length and SHA-256 of each of them
    pins/<generation>.json    {digest: num_bytes} of what a generation needs

What a generation pins stays; the rest is a cache that gives way. Any number of processes may use
a store: its lock guards pins and removal, and a lock on a partial blob is the right to write it.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from proxymoe.client.partial import Partial, StoreError, explained, lock_file
from proxymoe.common.errors import ProtocolError
from proxymoe.common.files import sync_folder, write_json

DIGEST = re.compile(r"[0-9a-f]{64}")
GENERATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class QuotaError(StoreError):
    """What generations pin exceeds the quota of the store."""


class Store:
    """The blobs of a device, in a folder of their own.

    Args:
        folder: made if it does not exist.
        quota_bytes: what pinned blobs, here or still to come, and cached ones may take together.

    Raises:
        StoreError: in any method, when the disk refuses.
        ProtocolError: in any method, when a digest is not one.
    """

    def __init__(self, folder: Path, quota_bytes: int) -> None:
        self.quota_bytes = quota_bytes
        self._lock = folder / "lock"
        self._blobs, self._partial, self._pins = (folder / n for n in ("blobs", "partial", "pins"))
        with explained(folder):
            for part in (folder, self._blobs, self._partial, self._pins):
                part.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync_folder(folder)

    def pin(self, generation: str, needs: Mapping[str, int]) -> None:
        """Keeps {digest: num_bytes} for a generation, in place of what it pinned before.

        Room for all of it is made now, by dropping blobs that nothing pins. A refusal changes
        nothing.

        Raises:
            QuotaError: with what other generations pin, it is more than the quota.
            ProtocolError: a digest, a size or the name cannot be one.
        """
        _require_generation(generation)
        for digest, num_bytes in needs.items():
            _require_blob(digest, num_bytes)
        with self._locked():
            self._make_room({**self._read_pins(), generation: dict(needs)})
            write_json(self._pins / f"{generation}.json", dict(needs))
            sync_folder(self._pins)

    def unpin(self, generation: str) -> None:
        """Forgets a generation, if it is known; its blobs stay until their room is needed."""
        _require_generation(generation)
        with self._locked():
            (self._pins / f"{generation}.json").unlink(missing_ok=True)
            sync_folder(self._pins)

    def pins(self) -> dict[str, dict[str, int]]:
        """{generation: {digest: num_bytes}} of all generations."""
        with self._locked():
            return self._read_pins()

    def collect(self) -> int:
        """Drops unpinned blobs, least recently used first, until the quota holds; bytes freed.

        Raises:
            QuotaError: pinned blobs alone exceed it; nothing is dropped.
        """
        with self._locked():
            return self._make_room(self._read_pins())

    def require_pinned(self, needs: Mapping[str, int]) -> None:
        """StoreError unless all of {digest: num_bytes} is pinned, which means: has room."""
        pinned = _union(self.pins())
        loose = [digest for digest, size in needs.items() if pinned.get(digest, -1) < size]
        if loose:
            raise StoreError(f"{len(loose)} blobs, {loose[0][:12]} first, are not pinned; pin them")

    def lacking(self, needs: Mapping[str, int]) -> dict[str, int]:
        """Those of {digest: num_bytes} that are not here whole, in their order."""
        return {digest: size for digest, size in needs.items() if not self.holds(digest, size)}

    def holds(self, digest: str, num_bytes: int) -> bool:
        """Whether a whole blob of that size is here."""
        _require_blob(digest, num_bytes)
        path = self._blobs / digest
        with explained(path), suppress(FileNotFoundError):
            return path.stat().st_size == num_bytes
        return False

    def path(self, digest: str) -> Path:
        """The file of a whole blob, which is used as of now; StoreError if it is not here."""
        _require_blob(digest)
        with explained(self._blobs / digest, "fetch it first"):
            os.utime(self._blobs / digest)
        return self._blobs / digest

    def verify(self, digest: str) -> bool:
        """Reads a blob again: whether it is here and sound. A damaged one is dropped."""
        _require_blob(digest)
        path = self._blobs / digest
        with explained(path):
            try:
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EIO):
                    raise
                found = "unreadable"
            if found != digest:
                with self._locked():
                    path.unlink(missing_ok=True)
                    sync_folder(self._blobs)
        return found == digest

    def begin(self, digest: str, num_bytes: int) -> "Partial | None":
        """The sole right to write a blob, from where earlier attempts stopped.

        None if another writer has that right, or has just used it: look again, with `holds`.
        """
        path = self._partial / digest
        whole = self.holds(digest, num_bytes)
        with explained(path):
            file = None if whole else lock_file(path, os.O_CREAT)
            if file is None:
                return None
            try:
                if not self.holds(digest, num_bytes):
                    return Partial(file, path, self._blobs / digest, num_bytes)
                path.unlink()  # another writer has finished a moment ago
            except BaseException:
                file.close()
                raise
            file.close()
        return None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with explained(self._lock), self._lock.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _read_pins(self) -> dict[str, dict[str, int]]:
        return {path.stem: _read_pins(path) for path in sorted(self._pins.glob("*.json"))}

    def _make_room(self, pins: Mapping[str, Mapping[str, int]]) -> int:
        """Drops what `pins` does not name, oldest first, until what it names has room."""
        pinned = _union(pins)
        room = self.quota_bytes - sum(pinned.values())
        if room < 0:
            raise QuotaError(
                f"generations {sorted(pins)} need {self.quota_bytes - room} bytes, the quota of "
                f"the store is {self.quota_bytes}; raise the quota, or give up a generation"
            )
        loose = []
        for path in (*self._blobs.iterdir(), *self._partial.iterdir()):
            if path.name not in pinned and not path.suffix:
                with suppress(FileNotFoundError):  # its writer has just finished
                    stat = path.stat()
                    loose.append((stat.st_mtime_ns, path, stat.st_size))
        excess = sum(size for _, _, size in loose) - room
        freed = 0
        for _, path, size in sorted(loose):
            if freed >= excess:
                break
            freed += size if _drop(path) else 0
        return freed


def _require_blob(digest: str, num_bytes: int = 0) -> None:
    if not DIGEST.fullmatch(digest):
        raise ProtocolError(f"{digest[:80]!r} is no SHA-256 in lower-case hex")
    if num_bytes < 0:
        raise ProtocolError(f"blob {digest[:12]} of {num_bytes} bytes")


def _require_generation(name: str) -> None:
    if not GENERATION.fullmatch(name):
        raise ProtocolError(f"generation {name[:160]!r}: up to 128 letters, digits and '._-'")


def _read_pins(path: Path) -> dict[str, int]:
    with explained(path):
        content = path.read_bytes()
    try:
        return {str(digest): int(size) for digest, size in json.loads(content).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}: damaged ({error}); remove it and pin again") from error


def _union(pins: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """{digest: num_bytes} of all generations; what several need counts once."""
    union: dict[str, int] = {}
    for needs in pins.values():
        for digest, num_bytes in needs.items():
            union[digest] = max(num_bytes, union.get(digest, 0))
    return union


def _drop(path: Path) -> bool:
    """Removes a whole or partial blob; False for one that is being written."""
    file = lock_file(path)
    if file is None:
        return False
    with file:
        path.with_suffix(".chunks").unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    return True
