"""The experts backend: routed experts as two batched matmuls over padded segments.

Rules of this file. The family's router has already chosen ids and gates; nothing here changes
them. A redirect table says what each routed id means on a proxy submodel; dropped picks cost
nothing. Tokens are gathered into one segment per kept expert, and every segment is padded to
the same rounded capacity, because a CPU with bf16 matrix units compiles one kernel for every
new shape, and routing counts never repeat.

Expert adapters act on the activations (x Aᵀ Bᵀ, never W + BA), and only on tokens that the
router truly sent to that expert.

Shapes: T tokens, E routed ids, K = top-k, S experts held (slots), C capacity of a segment,
D hidden size, I inner size, R adapter rank.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from proxymoe.common.moe import moe_layers

BACKEND = "proxymoe"
CAPACITY_STEP = 32
"""Segments are rounded up to a multiple of this many rows."""

Observer = Callable[[Tensor, Tensor], None]
"""Called with expert outputs before gating (S, C, D) and gates (S, C), zero where empty."""

_valid_tokens: ContextVar[Tensor | None] = ContextVar("valid_tokens", default=None)


@dataclass(slots=True)
class Redirect:
    """What a routed id means: expert `slot[e]` (-1: none) times gate, plus gate * `offset[e]`."""

    slot: Tensor
    """(E,) int64."""
    offset: Tensor | None = None
    """(E, D), zero rows for kept experts; None when dropped experts contribute nothing."""


@dataclass(slots=True)
class ExpertAdapter:
    """Linear adapter of all held experts; one factor of each pair is shared by the slots.

    The adapter's scale is part of the frozen factors.
    """

    gate_up_in: Tensor
    """(R, D) frozen A."""
    gate_up_out: Tensor
    """(S, 2I, R) trained B."""
    down_in: Tensor
    """(S, R, I) trained A."""
    down_out: Tensor
    """(D, R) frozen B."""


@dataclass(slots=True)
class ExpertState:
    """What ProxyMoE hangs on an experts module; empty on a stock full model."""

    redirect: Redirect | None = None
    adapter: ExpertAdapter | None = None
    observer: Observer | None = None


def install_backend(model: nn.Module) -> None:
    """Routes every MoE layer of the model through this backend."""
    for layer in moe_layers(model):
        layer.experts.proxymoe = ExpertState()  # type: ignore[assignment]
    model.set_experts_implementation(BACKEND)  # type: ignore[operator]


def expert_state(experts: nn.Module) -> ExpertState:
    """The state hung on an experts module by `install_backend`."""
    state = experts.proxymoe
    assert isinstance(state, ExpertState)
    return state


@contextlib.contextmanager
def only_valid_tokens(valid: Tensor) -> Iterator[None]:
    """Within the block, padding (False in `valid`, (B, L)) is never dispatched to an expert."""
    token = _valid_tokens.set(valid.reshape(-1))
    try:
        yield
    finally:
        _valid_tokens.reset(token)


def experts_forward(self: nn.Module, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
    """Sum over routed experts of gate * expert(token).

    Args:
        self: an experts module with `gate_up_proj` (S, 2I, D) and `down_proj` (S, D, I).
        hidden: (T, D). index: (T, K) routed ids. gates: (T, K).

    Returns:
        (T, D) in the dtype of `hidden`.
    """
    state = expert_state(self)
    redirect = state.redirect
    slots = index if redirect is None else redirect.slot[index]
    valid = _valid_tokens.get()
    if valid is not None and valid.numel() == hidden.shape[0]:
        slots = slots.masked_fill(~valid[:, None], -1)

    output = _dispatch(self, state, hidden, slots, gates)
    if redirect is not None and redirect.offset is not None:
        routed = gates.new_zeros(hidden.shape[0], redirect.slot.numel()).scatter(1, index, gates)
        output = output + routed.to(hidden.dtype) @ redirect.offset.to(hidden.dtype)
    return output


def _dispatch(
    experts: nn.Module, state: ExpertState, hidden: Tensor, slots: Tensor, gates: Tensor
) -> Tensor:
    gate_up, down = experts.gate_up_proj, experts.down_proj
    assert isinstance(gate_up, Tensor)
    assert isinstance(down, Tensor)
    (num_tokens, width), num_slots, top_k = hidden.shape, down.shape[0], slots.shape[1]
    flat = slots.reshape(-1)
    pick = (flat >= 0).nonzero().squeeze(1)
    slot = flat[pick]
    order = slot.argsort(stable=True)
    pick, slot = pick[order], slot[order]
    counts = torch.bincount(slot, minlength=num_slots)
    steps = -(-int(counts.max()) // CAPACITY_STEP) if slot.numel() else 1
    capacity = max(steps, 1) * CAPACITY_STEP
    first = counts.cumsum(0) - counts
    row = slot * capacity + torch.arange(slot.numel(), device=slot.device) - first[slot]
    token = pick // top_k

    segments = hidden.new_zeros(num_slots * capacity, width)
    segments = segments.index_copy(0, row, hidden.index_select(0, token))
    segments = segments.view(num_slots, capacity, width)
    inner = _gated(experts, state, torch.bmm(segments, gate_up.transpose(1, 2)), segments)
    outputs = torch.bmm(inner, down.transpose(1, 2))
    if (adapter := state.adapter) is not None:
        low = torch.bmm(inner, adapter.down_in.to(inner.dtype).transpose(1, 2))
        outputs = outputs + low @ adapter.down_out.to(inner.dtype).T

    picked = gates.reshape(-1)[pick]
    if state.observer is not None:
        spread = picked.new_zeros(num_slots * capacity).index_copy(0, row, picked)
        state.observer(outputs, spread.view(num_slots, capacity))
    outputs = outputs.view(num_slots * capacity, width).index_select(0, row)
    weighted = outputs * picked[:, None].to(outputs.dtype)
    return hidden.new_zeros(num_tokens, width).index_add(0, token, weighted.to(hidden.dtype))


def _gated(experts: nn.Module, state: ExpertState, projected: Tensor, segments: Tensor) -> Tensor:
    if (adapter := state.adapter) is not None:
        low = segments @ adapter.gate_up_in.to(segments.dtype).T
        high = adapter.gate_up_out.to(segments.dtype).transpose(1, 2)
        projected = projected + torch.bmm(low, high)
    gate, up = projected.chunk(2, dim=-1)
    activated: Tensor = experts.act_fn(gate) * up  # type: ignore[operator]
    return activated


ALL_EXPERTS_FUNCTIONS.register(BACKEND, experts_forward)
