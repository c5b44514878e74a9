"""Attention with its backward pass written out, for frozen models on a CPU.

The stock eager attention copies keys and values for every query head of a group, widens the
scores to fp32 and back, and lets autograd keep each of these: a sixth of the time of tuning a
small model. Here the heads of a group are rows of one matmul, and only the probabilities are
kept. The softmax of a narrow type still computes in fp32 inside, as the stock one does.

Shapes: B rows, H query heads, G key heads (n = H / G), L queries, M keys, D head size.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import eager_attention_forward as stock

NAME = "proxymoe"


class _Attention(torch.autograd.Function):
    """softmax(s Q Kᵀ + mask) V (arXiv 1706.03762, eq. 1); query heads share the keys of a group."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        batch, heads, length, _ = query.shape
        _, groups, keys, _ = key.shape
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape, value.shape)
        rows = heads // groups * length
        query = query.reshape(batch * groups, rows, -1)
        key, value = (t.reshape(batch * groups, keys, -1) for t in (key, value))
        scores = torch.bmm(query, key.transpose(1, 2)).mul_(scale)
        if mask is not None:
            scores.view(batch, heads, length, keys).add_(mask)
        chance = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(query, key, value, chance)
        return torch.bmm(chance, value).view(batch, heads, length, -1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, chance = ctx.saved_tensors
        slope = upstream[0].reshape(*query.shape[:2], -1)
        to_chance = torch.bmm(slope, value.transpose(1, 2))
        to_scores = torch._softmax_backward_data(to_chance, chance, -1, chance.dtype)
        to_scores.mul_(ctx.scale)
        slopes = (
            torch.bmm(to_scores, key),
            torch.bmm(to_scores.transpose(1, 2), query),
            torch.bmm(chance.transpose(1, 2), slope),
        )
        to_query, to_key, to_value = (
            t.view(shape) for t, shape in zip(slopes, ctx.shapes, strict=True)
        )
        return to_query, to_key, to_value, None, None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the stock eager attention returns, without the weights.

    Args:
        module: the attention module; only the stock function, called under dropout, looks at it.
        query: (B, H, L, D). key: (B, G, M, D). value: (B, G, M, D').
        attention_mask: added to the scores, broadcast over (B, H, L, M).
        scaling: of the scores.
        dropout: share of the probabilities that is dropped.
        others: what families pass along and the stock function ignores.

    Returns:
        (B, L, H, D') and, under dropout only, the probabilities.
    """
    if dropout:
        found: tuple[Tensor, Tensor] = stock(
            module, query, key, value, attention_mask, scaling, dropout, **others
        )
        return found
    output: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        query, key, value, attention_mask, scaling
    )
    return output.transpose(1, 2).contiguous(), None


def install_attention(model: PreTrainedModel) -> None:
    """Gives a frozen model this attention where its own is the stock one; others keep theirs.

    Many families carry their own copy of the stock function, and some (sinks, soft caps) a
    variant of it: only what compiles to the same operations is replaced.
    """
    own = getattr(sys.modules[type(model).__module__], stock.__name__, None)
    if own is not None and same_operations(own, stock):
        model.set_attn_implementation(NAME)


def same_operations(one: Any, other: Any) -> bool:
    """Whether two Python functions compile to the same operations on the same names."""
    return bool(_operations(one) == _operations(other))


def _operations(function: Any) -> Any:
    """What a Python function does; anything else is only equal to itself."""
    code = getattr(function, "__code__", None)
    return function if code is None else (code.co_code, code.co_names, code.co_consts)


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
