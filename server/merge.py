"""★ Brings an adapter home: into the full model's weights, shard by shard.

What was learned on proxy submodels fits the full model by identity, because kept experts are
bit-identical to the base model's. The merged checkpoint has the base model's own names, shards
and types; only tensors with a delta differ: W + s·B·A, computed in fp32, rounded once.

Memory: one tensor, of fused experts one expert. The folder appears whole or not at all; a merge
that was interrupted goes on with the first shard that is missing, if it is asked for again.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from proxymoe.common.adapter import AdapterLayout, Block, delta_weight
from proxymoe.common.checkpoint import INDEX, TensorRange, bytes_of, tensor_from, write_checkpoint
from proxymoe.common.errors import CheckpointError, LayoutMismatch
from proxymoe.common.files import digest_of
from proxymoe.common.manifest import COMPANIONS, Piece
from proxymoe.server.base import BaseCheckpoint


def merge(
    base: BaseCheckpoint,
    layout: AdapterLayout,
    vector: Tensor,
    target: Path,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Path:
    """Writes the base model with the adapter (P,) merged into `target`, and returns it.

    Raises:
        CheckpointError: `target` exists already, or a merged weight is not finite.
        LayoutMismatch: the vector does not fit the layout, or the layout not the base model.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists; merge into a new folder")
    deltas = _Deltas(base, layout, vector)
    deltas.require(base)
    pieces: dict[str, list[Piece]] = {}
    for piece in base.pieces:
        pieces.setdefault(piece.source, []).append(piece)
    shards: dict[str, dict[str, TensorRange]] = {}
    for name, place in base.checkpoint.ranges.items():
        shards.setdefault(place.file, {})[name] = place

    work = digest_of(base.digest.encode(), layout.digest.encode(), bytes_of(vector))
    partial = target.with_name(f"{target.name}.{work[:12]}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for done, (file, places) in enumerate(shards.items()):
        progress(done, len(shards))
        if not (partial / file).exists():
            specs = {name: (place.dtype, place.shape) for name, place in places.items()}
            contents = (_merged(base, name, pieces.get(name, []), deltas) for name in places)
            write_checkpoint(partial / file, specs, contents)
    for name in ("config.json", INDEX, *COMPANIONS):
        if (base.folder / name).exists():
            shutil.copyfile(base.folder / name, partial / name)
    partial.rename(target)
    progress(len(shards), len(shards))
    return target


class _Deltas:
    """The adapter's blocks by the parameter they change."""

    def __init__(self, base: BaseCheckpoint, layout: AdapterLayout, vector: Tensor) -> None:
        self.layout = layout
        self._transposed = {
            f"{layer.name}.experts.{leaf}"
            for layer in base.layers.values()
            if layer.transposed
            for leaf in ("gate_up_proj", "down_proj")
        }
        self._blocks: dict[tuple[str, int | None], tuple[Block, Tensor]] = {}
        for block, trained in zip(layout.blocks, layout.trained_factors(vector), strict=True):
            parameter = block.module if block.expert is not None else f"{block.module}.weight"
            self._blocks[parameter, block.expert] = (block, trained)

    def require(self, base: BaseCheckpoint) -> None:
        """Raises LayoutMismatch unless every block changes a weight of this base model."""
        pieces = {(p.target, p.expert): p for p in base.pieces}
        for key, (block, _) in self._blocks.items():
            piece = pieces.get(key)
            if piece is None or piece.shape != tuple(self._part(piece, _shape_of(block)).shape):
                raise LayoutMismatch(
                    f"{block.module} ({block.out_features} from {block.in_features}) is no weight "
                    f"of base model {base.digest[:12]}; the adapter is for another one"
                )

    def of(self, piece: Piece) -> Tensor | None:
        """The change of this piece's tensor in fp32, or None."""
        found = self._blocks.get((piece.target, piece.expert))
        if found is None:
            return None
        block, trained = found
        return self._part(piece, delta_weight(block, trained, self.layout.rank, self.layout.seed))

    def _part(self, piece: Piece, delta: Tensor) -> Tensor:
        """What of ΔW (out, in) concerns this piece, as the piece is stored."""
        if piece.part in ("gate", "up"):
            gate, up = delta.chunk(2, dim=0)
            return gate if piece.part == "gate" else up
        return delta.T if piece.target in self._transposed else delta


def _merged(
    base: BaseCheckpoint, name: str, pieces: list[Piece], deltas: _Deltas
) -> Iterator[bytes]:
    """The bytes of a tensor on disk, in parts."""
    if not pieces:
        yield base.checkpoint.read_bytes(name)
    for piece in pieces:
        yield _merged_piece(base, piece, deltas.of(piece))


def _merged_piece(base: BaseCheckpoint, piece: Piece, delta: Tensor | None) -> bytes:
    content = base.read_piece(piece)
    if delta is None:
        return content
    weight = tensor_from(content, piece.dtype, piece.shape)
    merged = (weight.float() + delta).to(weight.dtype)
    if not bool(torch.isfinite(merged).all()):
        raise CheckpointError(
            f"{piece.source} is not finite after the merge; is the adapter damaged?"
        )
    return bytes_of(merged)


def _shape_of(block: Block) -> Tensor:
    """ΔW of a block without its numbers."""
    return torch.empty(block.out_features, block.in_features, device="meta")
