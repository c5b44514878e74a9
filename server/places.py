"""Where every blob of a coordinator lies, by digest."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from proxymoe.common.files import digest_of
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.blobs import BlobPlace

DIGEST = re.compile(r"[0-9a-f]{64}")


class Places(Mapping[str, BlobPlace]):
    """A live view: the base checkpoint's byte ranges, its small files, and what was written since.

    Args:
        base: has the pieces, and the small files beside them.
        folder: of files that are named after their digest; more may appear at any time.
        tables: files that are shipped to every device, as they are.
    """

    def __init__(self, base: BaseCheckpoint, folder: Path, tables: Iterable[Path] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._fixed: dict[str, BlobPlace] = {}
        for piece in base.pieces:
            found = base.checkpoint.ranges[piece.source]
            first = found.offset + piece.offset
            place = BlobPlace(base.folder / found.file, first, piece.num_bytes)
            self._fixed[piece.digest] = place
        companions = base.manifest(base.keep_all()).companions
        files = {digest: base.folder / name for name, digest in companions.items()}
        files |= {digest_of(table.read_bytes()): table for table in tables}
        self._fixed |= {digest: _whole(path) for digest, path in files.items()}

    def __getitem__(self, digest: str) -> BlobPlace:
        if (fixed := self._fixed.get(digest)) is not None:
            return fixed
        path = self._folder / digest
        if not DIGEST.fullmatch(digest) or not path.exists():
            raise KeyError(digest)
        return _whole(path)

    def __iter__(self) -> Iterator[str]:
        yield from self._fixed
        yield from (path.name for path in self._folder.iterdir() if DIGEST.fullmatch(path.name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _whole(path: Path) -> BlobPlace:
    return BlobPlace(path, 0, path.stat().st_size)
