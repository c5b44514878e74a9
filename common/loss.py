"""Next-token loss on completions, in memory that does not grow with the vocabulary."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from proxymoe.common.context import attention_masks, rows_for
from proxymoe.common.experts import only_valid_tokens
from proxymoe.common.head import Head, output_head
from proxymoe.common.moe import last_block
from proxymoe.common.text import IGNORED, Batch

CHUNK_ROWS = 256
"""Predicted positions whose logits exist at one time."""


@dataclass(frozen=True, slots=True)
class Quality:
    """How good a model is on a data set."""

    loss: float
    """Mean completion loss, nats per token."""
    accuracy: float
    """Share of right answers, or of right next tokens where there is no answer to rank."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of a frozen head; the gradient is computed along with the loss.

    Logits (N, V) are made CHUNK_ROWS rows at a time in fp32 and never kept: what is saved for
    the backward pass is the gradient of the hidden states (N, D).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        gradient = torch.zeros_like(hidden)
        for start in range(0, hidden.shape[0], CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            log_probs = F.log_softmax(head.logits(hidden[rows]), dim=-1)
            goal = targets[rows]
            total += F.nll_loss(log_probs, goal, ignore_index=IGNORED, reduction="sum").double()
            slope = log_probs.exp_()
            slope[torch.arange(goal.numel()), goal.clamp_min(0)] -= 1.0
            slope.masked_fill_((goal == IGNORED)[:, None], 0.0)
            gradient[rows] = head.gradient(slope)
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None


def predicted_states(model: Any, batch: Batch) -> Tensor:
    """Final hidden states at the predicted positions, (N, D).

    Examples of a batch do not see each other, and padding is kept out of the experts.
    """
    batch = rows_for(model, batch)
    mask = batch.attention_mask(model.dtype)
    with only_valid_tokens(batch.valid):
        output = model.base_model(
            input_ids=batch.tokens,
            attention_mask=attention_masks(model, mask, batch.positions),
            position_ids=batch.positions,
            use_cache=False,
        )
    hidden: Tensor = output.last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.where)


@contextlib.contextmanager
def only_predicted(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Within the block, the last MoE block works only where the batch predicts a token.

    It treats every position by itself, and nothing reads its output elsewhere: loss and gradient
    are the same, and for short completions a twelfth of the work of six layers is not done.
    Checkpointed layers run again in the backward pass, which therefore belongs inside.
    """
    batch = rows_for(model, batch)
    block, where = last_block(model), batch.where
    if block is None or 2 * where.numel() > batch.tokens.numel():
        yield
        return

    def narrow(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        return (hidden.flatten(0, -2).index_select(0, where)[None], *args[1:])

    def widen(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        found = output[0] if isinstance(output, tuple) else output
        whole = found.new_zeros(batch.tokens.numel(), found.shape[-1])
        whole = whole.index_copy(0, where, found.flatten(0, -2)).view(*batch.tokens.shape, -1)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    handles = [block.register_forward_pre_hook(narrow), block.register_forward_hook(widen)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def completion_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean nats per completion token of the batch, differentiable; the head is frozen."""
    head = output_head(model)
    states = predicted_states(model, batch)
    total: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        states, head, batch.targets
    )
    return total / (batch.targets != IGNORED).sum()


@torch.no_grad()
def completion_logits(model: nn.Module, batches: Iterable[Batch], max_tokens: int) -> Tensor:
    """(N, V) fp32 logits at the first completion tokens of the batches, at most `max_tokens`."""
    head, found, left = output_head(model), list[Tensor](), max_tokens
    for batch in batches:
        if left <= 0:
            break
        states = predicted_states(model, batch)
        found.append(head.logits(states[batch.targets != IGNORED][:left]).float())
        left -= found[-1].shape[0]
    return torch.cat(found)


def divergence(reference: Tensor, other: Tensor) -> float:
    """Mean KL(reference ‖ other) in nats per token, of logits (N, V)."""
    right, wrong = reference.log_softmax(-1), other.log_softmax(-1)
    return float(F.kl_div(wrong, right, log_target=True, reduction="batchmean"))


@torch.no_grad()
def token_quality(model: nn.Module, batches: Iterable[Batch]) -> Quality:
    """Loss and next-token accuracy over all completion tokens of the batches."""
    head = output_head(model)
    loss, right, count = 0.0, 0, 0
    for batch in batches:
        states = predicted_states(model, batch)
        for start in range(0, states.shape[0], CHUNK_ROWS):
            goal = batch.targets[start : start + CHUNK_ROWS]
            logits = head.logits(states[start : start + CHUNK_ROWS])
            loss += F.cross_entropy(logits, goal, ignore_index=IGNORED, reduction="sum").item()
            right += int((logits.argmax(-1) == goal).sum())
            count += int((goal != IGNORED).sum())
    return Quality(loss / count, right / count)
