"""A proxy submodel as a manifest over content-addressed tensors.

Kept experts are byte ranges of the base checkpoint, so cutting a proxy submodel is a listing, not
a copy. A device reads the blobs it lacks, checks each against its digest, and materialises one
fused safetensors file that it can map into memory.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoConfig, PretrainedConfig

from proxymoe.common.checkpoint import (
    DTYPE_NAMES,
    WEIGHTS,
    Span,
    bytes_of,
    tensor_from,
    write_checkpoint,
)
from proxymoe.common.errors import CheckpointError, IntegrityError, UnsupportedModel
from proxymoe.common.files import digest_of, write_bytes, write_json
from proxymoe.common.plan import PLAN_FILE, Plan, Precision, RouterMode
from proxymoe.common.quantised import (
    CODE_TYPES,
    SCALE_TYPE,
    quantise,
    quantised_bytes,
    quantised_shapes,
)

Part = Literal["whole", "gate", "up", "down"]
HASHING_THREADS = min(4, os.cpu_count() or 1)
UNCHECKED_BYTES = 64 << 20
"""Read and not yet checked at one time, unless a single piece is larger."""
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""Small files beside the weights that a device needs too."""


class Piece(BaseModel):
    """One tensor of the base checkpoint, or an expert's part of it: what it is, and its digest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    """Name on disk."""
    offset: int = 0
    """First byte within the tensor on disk, where that holds all experts at once."""
    target: str
    """Name of the parameter in memory that it is, or is part of."""
    part: Part = "whole"
    layer: int | None = None
    """Decoder layer, for tensors of a router or an expert."""
    expert: int | None = None
    expert_dim: int | None = None
    """Dimension indexed by expert, for tensors of a router."""
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    digest: str


class Manifest(BaseModel):
    """Everything a device needs to build its proxy submodel, by digest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: Plan
    config: dict[str, Any]
    """The model's config.json, marked with the plan."""
    pieces: tuple[Piece, ...]
    companions: dict[str, str] = Field(default_factory=dict)
    """{file name: digest} of tokenizer and the like."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights of the proxy submodel."""
        if self.plan.router is RouterMode.SLICED:
            return sum(_sliced_bytes(piece, self.plan) for piece in self.pieces)
        return sum(held_bytes(piece, self.plan.experts) for piece in self.pieces)


def materialise(
    manifest: Manifest,
    folder: Path,
    read_piece: Callable[[Piece], bytes],
    read_companion: Callable[[str], bytes],
    span_of: Callable[[Piece], Span] | None = None,
) -> Path:
    """Writes the proxy submodel as a fused checkpoint that transformers can map; returns `folder`.

    The weights file appears last and atomically, so a folder that has it is whole.

    Args:
        manifest: of the submodel.
        folder: made if it is not there.
        read_piece, read_companion: the bytes.
        span_of: where the bytes of pieces lie that have been held against their digests before, and
            have not changed since: they are copied. A device knows of none.

    Raises:
        IntegrityError: bytes from `read_piece` or `read_companion` do not match their digest.
    """
    plan, groups = manifest.plan, by_target(manifest.pieces)
    for name, digest in manifest.companions.items():
        content = read_companion(name)
        _require_digest(name, content, digest)
        write_bytes(folder / name, content)
    write_json(folder / "config.json", manifest.config)
    write_bytes(folder / PLAN_FILE, plan.model_dump_json(indent=1).encode())
    specs = {name: spec for ps in groups.values() for name, spec in _specs(ps, plan).items()}
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        # Contents first: what is checked last is checked when they are asked once too often.
        checked = zip(_checked(groups.values(), read_piece, pool), groups.values(), strict=True)
        contents: Iterable[Iterable[bytes | Span]] = (
            tensor for parts, pieces in checked for tensor in _tensors(pieces, parts, plan)
        )
        if span_of is not None and _is_copied(plan):
            contents = (map(span_of, pieces) for pieces in groups.values())
        write_checkpoint(folder / WEIGHTS, specs, contents)
    return folder


def by_target(pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    """The pieces of each parameter, in the order in which their bytes make it up."""
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.target, []).append(piece)
    for group in groups.values():
        group.sort(key=lambda p: (p.expert if p.expert is not None else -1, p.part == "up"))
    return groups


def read_config(folder: Path) -> PretrainedConfig:
    """The model config of a checkpoint folder; UnsupportedModel for a family nobody knows."""
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: no config.json; is this a checkpoint?")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: {str(error).splitlines()[0]}") from error
    except (ValueError, KeyError) as error:
        raise UnsupportedModel(f"{folder}: {str(error).splitlines()[0]}") from error
    return config


def _checked(
    groups: Iterable[list[Piece]], read_piece: Callable[[Piece], bytes], pool: Executor
) -> Iterator[Iterator[tuple[Piece, bytes]]]:
    """For each parameter its pieces with their bytes, which are checked beside the writing.

    What is handed out may still turn out wrong, but not after the last parameter was taken.
    """
    waiting: deque[tuple[int, Future[None]]] = deque()

    def settle(room: int) -> None:
        while waiting and sum(size for size, _ in waiting) > room:
            waiting.popleft()[1].result()

    def parts(pieces: list[Piece]) -> Iterator[tuple[Piece, bytes]]:
        for piece in pieces:
            settle(max(0, UNCHECKED_BYTES - piece.num_bytes))
            content = read_piece(piece)
            check = pool.submit(_require_digest, piece.source, content, piece.digest)
            waiting.append((len(content), check))
            if piece.expert_dim is not None or len(content) != piece.num_bytes:
                settle(-1)  # it is not just copied: make sure that it can be understood
            yield piece, content

    for pieces in groups:
        yield parts(pieces)
    settle(-1)


def _require_digest(name: str, content: bytes, digest: str) -> None:
    if (found := digest_of(content)) != digest:
        raise IntegrityError(
            f"{name}: digest {found[:16]} instead of {digest[:16]}; fetch it again"
        )


def held_bytes(piece: Piece, experts: Precision) -> int:
    """Bytes of a piece as a device holds it: matrices of experts may be quantised."""
    is_quantised = experts is not Precision.BF16 and _is_expert_matrix(piece)
    return quantised_bytes(piece.shape, experts) if is_quantised else piece.num_bytes


def _specs(pieces: list[Piece], plan: Plan) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name: (dtype name, shape)} of what is written for the pieces of one target."""
    first, shape = pieces[0], _fused_shape(pieces, plan)
    if not _is_quantised(first, plan):
        return {first.target: (first.dtype, shape)}
    codes, scales = quantised_shapes(shape, plan.experts)
    types = DTYPE_NAMES[CODE_TYPES[plan.experts]], DTYPE_NAMES[SCALE_TYPE]
    return {
        f"{first.target}.codes": (types[0], codes),
        f"{first.target}.scales": (types[1], scales),
    }


def _tensors(
    pieces: list[Piece], parts: Iterable[tuple[Piece, bytes]], plan: Plan
) -> Iterator[Iterable[bytes]]:
    """The bytes of each tensor that is written for the pieces of one target; see `_specs`."""
    if not _is_quantised(pieces[0], plan):
        yield (_cut(piece, content, plan) for piece, content in parts)
        return
    weights = (tensor_from(content, piece.dtype, piece.shape) for piece, content in parts)
    quantised = [tuple(map(bytes_of, quantise(each, plan.experts))) for each in weights]
    yield from zip(*quantised, strict=True)


def _cut(piece: Piece, content: bytes, plan: Plan) -> bytes:
    """The bytes of a piece in this plan: router tensors lose rows under a sliced router."""
    if piece.expert_dim is None or piece.layer is None or plan.router is not RouterMode.SLICED:
        return content
    kept = torch.tensor(plan.layers[piece.layer].kept)
    tensor = tensor_from(content, piece.dtype, piece.shape)
    return bytes_of(tensor.index_select(piece.expert_dim, kept))


def _is_copied(plan: Plan) -> bool:
    """Whether a submodel has its pieces just as the base model has them."""
    return plan.router is not RouterMode.SLICED and plan.experts is Precision.BF16


def _is_quantised(piece: Piece, plan: Plan) -> bool:
    return plan.experts is not Precision.BF16 and _is_expert_matrix(piece)


def _is_expert_matrix(piece: Piece) -> bool:
    return piece.expert is not None and len(piece.shape) == 2


def _sliced_bytes(piece: Piece, plan: Plan) -> int:
    if piece.expert_dim is None or piece.layer is None:
        return held_bytes(piece, plan.experts)
    layer = plan.layers[piece.layer]
    return piece.num_bytes * len(layer.kept) // layer.num_experts


def _fused_shape(pieces: list[Piece], plan: Plan) -> tuple[int, ...]:
    first = pieces[0]
    if first.expert is not None:
        num_experts = len({piece.expert for piece in pieces})
        rows, *columns = first.shape
        return (num_experts, rows * len(pieces) // num_experts, *columns)
    sliced = plan.router is RouterMode.SLICED and first.expert_dim is not None
    if sliced and first.layer is not None:
        kept = len(plan.layers[first.layer].kept)
        return tuple(kept if i == first.expert_dim else n for i, n in enumerate(first.shape))
    return first.shape
