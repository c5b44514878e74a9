"""Remembers the digests of chunks, so that a blob is hashed for the first device and not for all.

Wrong bytes never pass for right ones because of it: devices check every chunk, and the whole blob
against its name. Bytes that rot under a digest are even found sooner, at the chunk and not at the
end. What must not happen is that a file that was restored is refused for ever under the digests
of its damage, so they are kept for a file as it is now, and only if it has not just been written.
"""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

SETTLED_SECONDS = 2.0
"""Age of a file from which on another write to it has another time; file systems count coarsely."""


class ChunkDigests:
    """SHA-256 of chunks, by blob and offset; many threads may ask.

    It takes some 200 bytes for every chunk of the blobs that were sent: 20 MB for 100 GB in chunks
    of 1 MiB. Offsets that no chunk of a whole blob has are not kept, or any number would be.

    Args:
        chunk_bytes: length of all chunks but the last of a blob.
        clock: unix seconds.
    """

    def __init__(self, chunk_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self._chunk_bytes = chunk_bytes
        self._clock = clock
        self._known: dict[str, tuple[tuple[int, ...], dict[int, bytes]]] = {}

    def of(self, blob: str, path: Path) -> Callable[[int, bytes], bytes]:
        """What tells the digest of a blob's chunk, given its offset and its bytes.

        Raises:
            OSError: the file that the blob lies in is not there.
        """
        status = path.stat()
        if self._clock() - max(status.st_mtime, status.st_ctime) < SETTLED_SECONDS:
            return lambda _, data: hashlib.sha256(data).digest()
        known = self._of_file(blob, status)

        def digest(offset: int, data: bytes) -> bytes:
            found = known.get(offset)
            if found is None:
                found = hashlib.sha256(data).digest()
                if offset % self._chunk_bytes == 0:
                    known[offset] = found
            return found

        return digest

    def _of_file(self, blob: str, status: os.stat_result) -> dict[int, bytes]:
        now = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        stamp, known = self._known.get(blob, ((), {}))
        if stamp != now:
            known = {}
            self._known[blob] = now, known
        return known
