"""The index of a checkpoint: every tensor's pieces with their digests; damage is found on the way.

Every byte is read once, in chunks, by a few threads. What is known of a shard is kept, under the
shard's size and time: an interrupted index goes on with the next shard, and the next start is free.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from proxymoe.common.checkpoint import Checkpoint
from proxymoe.common.errors import CheckpointError
from proxymoe.common.files import canonical_json, digest_of, write_json
from proxymoe.common.manifest import Piece
from proxymoe.server.roles import Role, Roles

Progress = Callable[[int, int], None]
"""Told how many bytes are read, and of how many."""

VERSION = 2
"""Of what is kept in the cache."""
CHUNK_BYTES = 1 << 20
"""Read, hashed and looked through while it is in the processor's cache."""
MAX_THREADS = 4
EXPONENTS = {
    "F64": ("<u8", 0x7FF << 52),
    "F32": ("<u4", 0xFF << 23),
    "BF16": ("<u2", 0xFF << 7),
    "F16": ("<u2", 0x1F << 10),
}
"""Numbers whose exponent has all bits set are infinite or NaN."""


def index(
    checkpoint: Checkpoint,
    roles: Roles,
    settings: object,
    cache: Path | None,
    progress: Progress = lambda *_: None,
) -> tuple[Piece, ...]:
    """The pieces of all tensors that the model loads.

    Args:
        checkpoint: whose headers have been read.
        roles: of its tensors.
        settings: of the model; what was kept under others is not used.
        cache: folder for what is known of each shard; None keeps nothing.
        progress: told while bytes are read.

    Raises:
        CheckpointError: a tensor is missing, belongs nowhere, has another shape than the model's or
            holds NaN or infinity; or tied weights differ.
        UnsupportedModel: experts in a layout that cannot be cut.
    """
    found = _checked_roles(checkpoint, roles)
    shards: dict[str, dict[str, Role]] = {}
    for name, role in found.items():
        shards.setdefault(checkpoint.ranges[name].file, {})[name] = role
    done, total = 0, sum(checkpoint.ranges[name].num_bytes for name in found)
    pieces: list[Piece] = []
    for file, own in shards.items():
        path = None if cache is None else cache / _name(checkpoint.folder / file, settings)
        if path is not None and path.exists():
            new = [Piece.model_validate(entry) for entry in json.loads(path.read_bytes())]
        else:
            new = list(_read(checkpoint, own, partial(_advance, progress, done, total)))
            if path is not None:
                write_json(path, [piece.model_dump(exclude_defaults=True) for piece in new])
        pieces += new
        done += sum(piece.num_bytes for piece in new)
        progress(done, total)
    _require_ties(checkpoint, roles)
    return tuple(pieces)


def _checked_roles(checkpoint: Checkpoint, roles: Roles) -> dict[str, Role]:
    """The role of every tensor that the model loads; what can be told without reading is told."""
    places, provided = checkpoint.ranges, set[str]()
    found = {name: role for name in places if (role := roles.of(name)) is not None}
    for name, role in found.items():
        if places[name].shape != (expected := roles.shape(role)):
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {name} has shape {places[name].shape}, config.json "
                f"asks for {expected}; is it of another model?"
            )
        provided |= roles.provides(role)
    if missing := sorted(roles.required() - provided):
        raise CheckpointError(
            f"{checkpoint.folder}: {len(missing)} tensors are missing, the first is {missing[0]}; "
            "is a shard absent, or config.json of another model?"
        )
    if strange := sorted(name for name in places.keys() - found if not roles.needless(name)):
        raise CheckpointError(
            f"{checkpoint.folder}: {len(strange)} tensors have no place in the model, the first is "
            f"{strange[0]}; is config.json of another model, or are the weights quantised?"
        )
    return found


def _read(
    checkpoint: Checkpoint, roles: dict[str, Role], advance: Callable[[int], None]
) -> Iterator[Piece]:
    """The pieces of these tensors, with digests."""
    bare = [
        piece
        for name, role in roles.items()
        for piece in role.pieces(name, checkpoint.ranges[name])
    ]
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        read = 0
        for piece, digest in zip(bare, pool.map(partial(_digest, checkpoint), bare), strict=True):
            yield piece.model_copy(update={"digest": digest})
            read += piece.num_bytes
            advance(read)


def _digest(checkpoint: Checkpoint, piece: Piece) -> str:
    """SHA-256 of a piece whose numbers are all finite."""
    state, buffer = hashlib.sha256(), memoryview(bytearray(min(CHUNK_BYTES, piece.num_bytes)))
    for first in range(0, piece.num_bytes, CHUNK_BYTES):
        chunk = buffer[: piece.num_bytes - first]
        checkpoint.read_into(piece.source, chunk, piece.offset + first)
        state.update(chunk)
        if piece.dtype in EXPONENTS and not _is_finite(chunk, *EXPONENTS[piece.dtype]):
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {piece.source} holds NaN or infinity; fetch it again"
            )
    return state.hexdigest()


def _is_finite(content: memoryview, kind: str, exponent: int) -> bool:
    numbers = np.frombuffer(content, kind)
    return bool((numbers & numbers.dtype.type(exponent)).max() != exponent)


def _require_ties(checkpoint: Checkpoint, roles: Roles) -> None:
    """Raises CheckpointError if a weight is stored twice, tied, and not the same both times."""
    for names in roles.tied_copies(checkpoint.ranges):
        digests = {digest_of(checkpoint.read_bytes(name)) for name in names}
        if len(digests) > 1:
            raise CheckpointError(
                f"{checkpoint.folder}: {' and '.join(names)} are one weight by config.json, and "
                "differ; set tie_word_embeddings to false there if they should"
            )


def _name(shard: Path, settings: object) -> str:
    seen = shard.stat()
    key = [VERSION, str(shard), seen.st_size, seen.st_mtime_ns, settings]
    return f"pieces-{digest_of(canonical_json(key))[:24]}.json"


def _advance(progress: Progress, before: int, total: int, read: int) -> None:
    progress(before + read, total)
