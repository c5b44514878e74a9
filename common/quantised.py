"""Weights of experts in 8 or 4 bits on the device; what they stand for is made when it is used.

Only the weights are narrow, and only of routed experts: trunk, router and adapters stay as they
are, as in QLoRA (arXiv 2305.14314). A device makes the codes itself, of verified bytes of the base
model, and dequantises one expert at a time, forward and backward; never a layer at once. An
adapter tuned on top returns to the full model as always, for it is no part of these weights.

Two codes, symmetric, with bf16 scales. A weight is code times scale:
- int8: a row of the matrix shares a scale, its largest magnitude over 127 (LLM.int8(),
  arXiv 2208.07339, section 2.1). No number errs by more than half a scale.
- int4: `GROUP` neighbours of a row share a scale, from -8 to 7. The largest of them is laid near
  -8, where the range is longest; of a few such scales the one with the least squared error is
  taken. On normal weights that errs by 8.2 % of their size; NF4 by 8.7 % at the same groups.

Shapes: S experts held, N neighbours in a row, G in a group.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from proxymoe.common.errors import UnsupportedModel
from proxymoe.common.plan import Precision

GROUP = 32
"""Neighbours that share a scale in int4; the largest power of two in N where that is less."""
SMALLEST_GROUP = 8
EXTREMES = (7.0, 7.5, 8.0, 8.5)
"""Where the largest of a group may lie, in scales: above 8 it is cut and the others gain."""
CODE_TYPES = {Precision.INT8: torch.int8, Precision.INT4: torch.uint8}
SCALE_TYPE = torch.bfloat16
"""Widens to fp32 exactly, so a model computes with the same scales in either type."""

Bounds = list[tuple[int, int, int]]
"""(slot, first row, end row) of every segment of tokens."""


def quantise(weights: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """(codes, scales) of weights (..., N); for shapes see `quantised_shapes`, and its errors."""
    codes_shape, scales_shape = quantised_shapes(tuple(weights.shape), precision)
    grouped = weights.float().reshape(*scales_shape, -1)  # (..., N / G, G)
    if precision is Precision.INT8:
        scales = _stored(grouped.abs().amax(-1, keepdim=True) / 127)
        codes = _coded(grouped, scales, -127, 127).to(torch.int8)
    else:
        scales = _best_scales(grouped)
        nibbles = (_coded(grouped, scales, -8, 7) + 8).to(torch.uint8).reshape(weights.shape)
        low, high = nibbles.chunk(2, dim=-1)
        codes = low | (high << 4)
    return codes.reshape(codes_shape), scales.to(SCALE_TYPE).reshape(scales_shape)


def dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights (..., N) that these stand for, rounded once, to `dtype`."""
    if codes.dtype == CODE_TYPES[Precision.INT8]:
        return codes.to(dtype).mul_(scales.to(dtype))
    half = codes.shape[-1]
    weights = torch.empty((*codes.shape[:-1], 2 * half), dtype=dtype)
    weights[..., :half] = codes & 15
    weights[..., half:] = codes >> 4
    grouped = weights.sub_(8).view(*scales.shape, -1)
    return grouped.mul_(scales.to(dtype)[..., None]).view(weights.shape)


def quantised_shapes(
    shape: tuple[int, ...], precision: Precision
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of codes, (..., N) in int8 and (..., N / 2) in int4, and of scales, (..., N / G).

    In int8 a row is one group.

    Raises:
        UnsupportedModel: rows that have no groups of at least `SMALLEST_GROUP` in int4.
    """
    *rows, width = shape
    if precision is Precision.INT8:
        return shape, (*rows, 1)
    group = math.gcd(GROUP, width)
    if group < SMALLEST_GROUP:
        raise UnsupportedModel(
            f"experts with rows of {width} weights: int4 needs a multiple of {SMALLEST_GROUP}; "
            "use experts = 'int8'"
        )
    return (*rows, width // 2), (*rows, width // group)


def quantised_bytes(shape: tuple[int, ...], precision: Precision) -> int:
    """Bytes of codes and scales of weights with this shape; see `quantised_shapes` for errors."""
    codes, scales = quantised_shapes(shape, precision)
    return math.prod(codes) + SCALE_TYPE.itemsize * math.prod(scales)


class QuantisedWeight(nn.Module):
    """A fused expert weight (S, out, in) as codes and scales, in the place of the parameter.

    Args:
        shape: of the weight, as the family stores it.
        precision: int8 or int4.
        transposed: whether the family stores (S, in, out).
    """

    _is_hf_initialized = True
    """There is nothing here that transformers could draw at random."""

    def __init__(self, shape: tuple[int, ...], precision: Precision, transposed: bool) -> None:
        super().__init__()
        codes, scales = quantised_shapes(shape, precision)
        self.shape, self._transposed = torch.Size(shape), transposed
        self.inputs, self.outputs = shape[1:] if transposed else shape[:0:-1]
        self.codes = nn.Parameter(torch.empty(codes, dtype=CODE_TYPES[precision]), False)
        self.scales = nn.Parameter(torch.empty(scales, dtype=SCALE_TYPE), False)

    def expert(self, slot: int, dtype: torch.dtype) -> Tensor:
        """(out, in) the weight of one expert, made anew at every call."""
        weight = dequantise(self.codes[slot], self.scales[slot], dtype)
        return weight.T if self._transposed else weight


def hold_quantised(experts: nn.Module, precision: Precision) -> None:
    """Puts empty quantised weights of the same shapes where an experts module has its matrices."""
    for name, weight in list(experts.named_parameters(recurse=False)):
        if weight.ndim == 3:
            transposed = bool(getattr(experts, "is_transposed", False))
            del experts._parameters[name]
            experts.add_module(name, QuantisedWeight(tuple(weight.shape), precision, transposed))


class SegmentedQuantised(torch.autograd.Function):
    """y[rows of slot s] = x[rows of slot s] @ w[s]ᵀ, where w is frozen and quantised.

    What is kept for the backward pass is nothing: each expert is dequantised again.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, held: QuantisedWeight, bounds: Bounds) -> Tensor:
        ctx.held, ctx.bounds = held, bounds
        output = rows.new_empty(rows.shape[0], held.outputs)
        for slot, first, end in bounds:
            torch.mm(rows[first:end], held.expert(slot, rows.dtype).T, out=output[first:end])
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = upstream
        to_rows = slope.new_empty(slope.shape[0], ctx.held.inputs)
        for slot, first, end in ctx.bounds:
            weight = ctx.held.expert(slot, slope.dtype)
            torch.mm(slope[first:end], weight, out=to_rows[first:end])
        return to_rows, None, None


def _coded(grouped: Tensor, scales: Tensor, lowest: int, highest: int) -> Tensor:
    # A group of zeros has scale zero, and any code will do.
    safe = scales.masked_fill(scales == 0, 1.0)
    return (grouped / safe).round_().clamp_(lowest, highest)


def _best_scales(grouped: Tensor) -> Tensor:
    largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
    best, least = torch.zeros_like(largest), torch.full_like(largest, math.inf)
    for extreme in EXTREMES:
        scales = _stored(-largest / extreme)
        error = (_coded(grouped, scales, -8, 7) * scales - grouped).square().sum(-1, keepdim=True)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best


def _stored(scales: Tensor) -> Tensor:
    """As they will be read back: codes are chosen for these."""
    return scales.to(SCALE_TYPE).float()
