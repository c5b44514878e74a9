"""Linear adapters: LoRA with one frozen factor, so that updates add up exactly.

LoRA writes a weight's change as ΔW = s·B·A with A (R, in) and B (out, R) (arXiv 2106.09685).
The mean of several devices' B·A is not the product of the means; it is once one factor is the
same everywhere (FFA-LoRA, arXiv 2403.12313). Here the factor on the hidden-size side is frozen:
drawn from a seed, shared by all experts of one (layer, projection), never sent. The trained
factor starts at zero. ΔW is then linear in it, and any weighted sum over any subset of holders
is exact, under masks and under noise.

An adapter is therefore one flat fp32 vector, the trained factors in the order of an
`AdapterLayout`, in the coordinates of the full model: expert ids are the base model's own.

Shapes: R rank, P total trained parameters of a layout.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from proxymoe.common.errors import LayoutMismatch
from proxymoe.common.files import canonical_json, digest_of
from proxymoe.common.moe import (
    MoELayer,
    attention_linears,
    layer_number,
    moe_layers,
    writes_to_stream,
)
from proxymoe.common.plan import Plan

Target = Literal["attention", "shared", "experts"]
SCALE = 2.0
"""s, one value for every rank, so that ranks nest and padding with zeros is exact."""
FROZEN_OUT_STD = 0.5
"""Standard deviation of a frozen B is this over √R; of a frozen A it is 1/√in."""


@dataclass(frozen=True, slots=True)
class Block:
    """One adapter tensor pair: of one linear module, or of one expert of a fused parameter."""

    module: str
    """Full path of the module, or of the fused expert parameter."""
    expert: int | None
    in_features: int
    out_features: int
    trains: Literal["A", "B"]
    """The factor that is trained and sent; the other one is frozen."""

    @property
    def layer(self) -> int:
        """The decoder layer this block belongs to."""
        return layer_number(self.module)

    def trained_shape(self, rank: int) -> tuple[int, int]:
        """(R, in) if A is trained, (out, R) if B is."""
        return (rank, self.in_features) if self.trains == "A" else (self.out_features, rank)


@dataclass(frozen=True)
class AdapterLayout:
    """Which blocks an adapter vector consists of, and in which order."""

    blocks: tuple[Block, ...]
    rank: int
    seed: int
    """Seed of the frozen factors; the same on every device of a run."""

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Offsets of the blocks in the vector: block i is `bounds[i]:bounds[i + 1]`."""
        return tuple(accumulate(self.sizes, initial=0))

    @cached_property
    def sizes(self) -> list[int]:
        """Trained parameters per block."""
        return [math.prod(block.trained_shape(self.rank)) for block in self.blocks]

    @property
    def size(self) -> int:
        """P."""
        return self.bounds[-1]

    @cached_property
    def digest(self) -> str:
        """Equal for two layouts exactly when their vectors mean the same thing."""
        blocks = [
            [b.module, b.expert, b.in_features, b.out_features, b.trains] for b in self.blocks
        ]
        return digest_of(canonical_json([blocks, self.rank, self.seed, SCALE]))

    def zeros(self) -> Tensor:
        """(P,) fp32: the adapter that changes nothing."""
        return torch.zeros(self.size)

    def trained_factors(self, vector: Tensor) -> list[Tensor]:
        """The trained factor of each block, as views of the vector (P,)."""
        self.require(vector)
        parts = vector.split(self.sizes)
        return [
            part.view(block.trained_shape(self.rank))
            for part, block in zip(parts, self.blocks, strict=True)
        ]

    def require(self, vector: Tensor) -> None:
        """Raises LayoutMismatch unless the vector is of shape (P,)."""
        if tuple(vector.shape) != (self.size,):
            raise LayoutMismatch(
                f"adapter vector of shape {tuple(vector.shape)} for a layout of {self.size} "
                "parameters; was it made for another plan, rank or base model?"
            )

    def held_under(self, plan: Plan) -> "AdapterLayout":
        """The part of this layout that a device with this plan holds."""
        kept = {position: frozenset(layer.kept) for position, layer in plan.layers.items()}
        blocks = [b for b in self.blocks if b.expert is None or b.expert in kept[b.layer]]
        return AdapterLayout(tuple(blocks), self.rank, self.seed)

    def positions_in(self, full: "AdapterLayout") -> list[tuple[int, int, int]]:
        """(block of `full`, start here, stop here) for every block of this layout.

        Raises:
            LayoutMismatch: a block here is not in `full`.
        """
        index = {block: i for i, block in enumerate(full.blocks)}
        if (self.rank, self.seed) != (full.rank, full.seed):
            raise LayoutMismatch(
                f"rank and seed {(self.rank, self.seed)} differ from {(full.rank, full.seed)}"
            )
        try:
            owners = [index[block] for block in self.blocks]
        except KeyError as missing:
            raise LayoutMismatch(f"{missing.args[0]} is not part of the full layout") from None
        return [(i, *span) for i, span in zip(owners, pairwise(self.bounds), strict=True)]

    def take_from(self, full: "AdapterLayout", vector: Tensor) -> Tensor:
        """This layout's part of a vector of the `full` layout, (P,)."""
        full.require(vector)
        if self.blocks == full.blocks:
            return vector.clone()
        parts = [vector[full.bounds[i] : full.bounds[i + 1]] for i, _, _ in self.positions_in(full)]
        return torch.cat(parts) if parts else vector[:0].clone()

    def put_into(self, full: "AdapterLayout", vector: Tensor, own: Tensor) -> Tensor:
        """A vector of the `full` layout with this layout's part replaced by `own`, (P,)."""
        self.require(own)
        full.require(vector)
        result = vector.clone()
        for block, start, stop in self.positions_in(full):
            result[full.bounds[block] : full.bounds[block + 1]] = own[start:stop]
        return result


def adapter_layout(
    model: nn.Module, targets: tuple[Target, ...], rank: int, seed: int
) -> AdapterLayout:
    """The layout of an adapter of the *full* model; meta models will do.

    A family without shared experts gets its routed experts adapted when `shared` is asked for,
    since nothing else in its MoE blocks could learn.
    """
    layers = moe_layers(model)
    blocks: list[Block] = []
    if "attention" in targets:
        blocks += [_linear_block(path, module) for path, module in attention_linears(model)]
    shared = [pair for layer in layers for pair in layer.shared_expert_linears()]
    if "shared" in targets:
        blocks += [_linear_block(path, module) for path, module in shared]
    if "experts" in targets or ("shared" in targets and not shared):
        blocks += [block for layer in layers for block in _expert_blocks(layer)]
    if not blocks:
        raise LayoutMismatch(f"no module of {type(model).__name__} matches the targets {targets}")
    return AdapterLayout(tuple(blocks), rank, seed)


def frozen_factor(block: Block, rank: int, seed: int) -> Tensor:
    """The frozen factor of a block, fp32: (R, in) if B is trained, (out, R) if A is.

    Uniform with the variance of the usual normal draw. It comes from the raw stream of a
    counter-based generator by exact operations only, so every machine gets the same bits.
    """
    key = hashlib.sha256(f"proxymoe frozen factor {seed} {block.module}".encode()).digest()
    stream = np.random.Philox(key=int.from_bytes(key[:16], "little"))
    if block.trains == "B":
        shape, std = (rank, block.in_features), 1.0 / math.sqrt(block.in_features)
    else:
        shape, std = (block.out_features, rank), FROZEN_OUT_STD / math.sqrt(rank)
    raw = stream.random_raw(math.prod(shape)) >> np.uint64(40)
    unit = raw.astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
    scaled = unit * np.float32(math.sqrt(3.0) * std)
    return torch.from_numpy(scaled).reshape(shape)


def factors(block: Block, trained: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """(A, B) of a block in fp32, from its trained factor."""
    frozen = frozen_factor(block, rank, seed)
    return (trained, frozen) if block.trains == "A" else (frozen, trained)


def delta_weight(block: Block, trained: Tensor, rank: int, seed: int) -> Tensor:
    """ΔW = s·B·A, (out, in) in fp32."""
    a, b = factors(block, trained, rank, seed)
    return SCALE * (b @ a)


def _linear_block(path: str, module: nn.Linear) -> Block:
    trains: Literal["A", "B"] = "A" if writes_to_stream(path) else "B"
    return Block(path, None, module.in_features, module.out_features, trains)


def _expert_blocks(layer: MoELayer) -> list[Block]:
    hidden, inner, experts = layer.hidden_size, layer.inner_size, range(layer.num_routed)
    path = f"{layer.name}.experts"
    gate_up = [Block(f"{path}.gate_up_proj", e, hidden, 2 * inner, "B") for e in experts]
    down = [Block(f"{path}.down_proj", e, inner, hidden, "A") for e in experts]
    return gate_up + down
