"""The experts backend: routed experts as matmuls over rounded segments of tokens.

Rules of this file. The family's router has already chosen ids and gates; nothing here changes
them. A redirect table says what each routed id means on a proxy submodel; dropped picks cost
nothing. Tokens are gathered into one segment per held expert, and every segment is rounded up,
because a CPU with bf16 matrix units compiles and keeps one kernel for every new shape, and
routing counts never repeat.

Expert adapters act on the activations (x Aᵀ Bᵀ, never W + BA), and only on tokens that the
router truly sent to that expert.

Shapes: T tokens, E routed ids, K = top-k, S experts held (slots), N rows of all segments,
D hidden size, I inner size, R adapter rank.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from proxymoe.common.moe import moe_layers
from proxymoe.common.quantised import QuantisedWeight, SegmentedQuantised

BACKEND = "proxymoe"
SMALL_STEP, LARGE_STEP, LARGE_ROWS = 32, 128, 256
"""Segments are rounded up to a multiple of the small step, above LARGE_ROWS of the large one."""

Observer = Callable[[Tensor, Tensor, Tensor], None]
"""Called with expert outputs before gating (N, D), gates (N,) and slots (N,), truly routed only."""

_valid_tokens: ContextVar[Tensor | None] = ContextVar("valid_tokens", default=None)


@dataclass(slots=True)
class Redirect:
    """What a routed id e means: gate · (scale[e] · expert of slot[e] + offset[e])."""

    slot: Tensor
    """(E,) int64; -1 is no expert."""
    offset: Tensor | None = None
    """(E, D), zero rows for kept experts; None when dropped experts contribute nothing."""
    scale: Tensor | None = None
    """(E,), 1 for kept experts; None is 1 throughout."""
    native: Tensor | None = None
    """(E,) bool, whether the slot's adapter acts on tokens routed to e; None is all. It does not
    where the slot only imitates e: the adapter goes home to the slot's own expert."""


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


def valid_tokens(num_tokens: int) -> Tensor | None:
    """(T,) False for padding, if this many tokens are being computed and some may be padding."""
    valid = _valid_tokens.get()
    return valid if valid is not None and valid.numel() == num_tokens else None


def experts_forward(self: nn.Module, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
    """Sum over routed experts of gate * expert(token).

    Args:
        self: an experts module with `gate_up_proj` (S, 2I, D) and `down_proj` (S, D, I), or
            both transposed; what lies between is its own `_apply_gate`.
        hidden: (T, D). index: (T, K) routed ids. gates: (T, K).

    Returns:
        (T, D) in the dtype of `hidden`.
    """
    state = expert_state(self)
    redirect = state.redirect
    slots = index if redirect is None else redirect.slot[index]
    if (valid := valid_tokens(hidden.shape[0])) is not None:
        slots = slots.masked_fill(~valid[:, None], -1)

    scaled, native = gates, None
    if redirect is not None and redirect.scale is not None:
        scaled = gates * redirect.scale[index].to(gates.dtype)
    if redirect is not None and redirect.native is not None:
        native = redirect.native[index]
    output = _dispatch(self, state, hidden, slots, scaled, native)
    if redirect is not None and redirect.offset is not None:
        routed = gates.new_zeros(hidden.shape[0], redirect.slot.numel()).scatter(1, index, gates)
        output = output + routed.to(hidden.dtype) @ redirect.offset.to(hidden.dtype)
    return output


@dataclass(frozen=True, slots=True)
class _Segments:
    """Where each routed pick lies among the rows of all segments."""

    pick: Tensor
    """Index of the pick in the flattened (T, K), ordered by slot."""
    slot: Tensor
    row: Tensor
    bounds: list[tuple[int, int, int]]
    """(slot, first row, end row) of every segment that is not empty."""
    num_rows: int


class _SegmentedLinear(torch.autograd.Function):
    """y[rows of slot s] = x[rows of slot s] @ w[s]ᵀ; w is (S, out, in), x (N, in), y (N, out)."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bounds: list[tuple[int, int, int]]
    ) -> Tensor:
        output = rows.new_empty(rows.shape[0], weight.shape[1])
        for slot, first, end in bounds:
            torch.mm(rows[first:end], weight[slot].T, out=output[first:end])
        ctx.bounds = bounds
        # Not rows[:0]: a view keeps all of the rows in memory.
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (slope,), (rows, weight) = upstream, ctx.saved_tensors
        to_rows = to_weight = None
        if ctx.needs_input_grad[0]:
            to_rows = slope.new_empty(slope.shape[0], weight.shape[2])
            for slot, first, end in ctx.bounds:
                torch.mm(slope[first:end], weight[slot], out=to_rows[first:end])
        if ctx.needs_input_grad[1]:
            to_weight = torch.zeros_like(weight)
            for slot, first, end in ctx.bounds:
                torch.mm(slope[first:end].T, rows[first:end], out=to_weight[slot])
        return to_rows, to_weight, None


def all_outputs(experts: nn.Module, hidden: Tensor) -> Tensor:
    """(S, T, D) outputs of every held expert on every token (T, D), before gating."""
    gate_up: Tensor = experts.get_parameter("gate_up_proj")
    down: Tensor = experts.get_parameter("down_proj")
    if not experts.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    inner = hidden @ gate_up
    if experts.has_bias:
        inner = inner + experts.get_parameter("gate_up_proj_bias")[:, None]
    outputs: Tensor = experts._apply_gate(inner) @ down  # type: ignore[operator]
    if experts.has_bias:
        outputs = outputs + experts.get_parameter("down_proj_bias")[:, None]
    return outputs


class _Gathered(torch.autograd.Function):
    """(N, D) rows of all segments: row[i] is hidden[token[i]], the others are zero.

    Autograd's own steps would keep the gathered tokens for the shape of their slope.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, token: Tensor, row: Tensor, num_rows: int) -> Tensor:
        ctx.num_tokens = hidden.shape[0]
        ctx.save_for_backward(token, row)
        rows = hidden.new_zeros(num_rows, hidden.shape[1])
        return rows.index_copy_(0, row, hidden.index_select(0, token))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,), (token, row) = upstream, ctx.saved_tensors
        to_hidden = slope.new_zeros(ctx.num_tokens, slope.shape[1])
        return to_hidden.index_add_(0, token, slope.index_select(0, row)), None, None, None


class _Combined(torch.autograd.Function):
    """(T, D) sum of the outputs (P, D) of each token's picks, times their gates (P,)."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, gates: Tensor, token: Tensor, num_tokens: int) -> Tensor:
        ctx.save_for_backward(outputs, gates, token)
        combined = outputs.new_zeros(num_tokens, outputs.shape[1])
        return combined.index_add_(0, token, outputs * gates[:, None])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        outputs, gates, token = ctx.saved_tensors
        slope = upstream[0].index_select(0, token)
        return slope * gates[:, None], (slope * outputs).sum(1), None, None


def _dispatch(
    experts: nn.Module,
    state: ExpertState,
    hidden: Tensor,
    slots: Tensor,
    gates: Tensor,
    native: Tensor | None = None,
) -> Tensor:
    """(T, D). `native` (T, K): which picks adapters act on; None is all."""
    gate_up, down = _weight(experts, "gate_up_proj"), _weight(experts, "down_proj")
    found = _segments(slots, num_slots=down.shape[0])
    token = found.pick // slots.shape[1]
    rows: Tensor = _Gathered.apply(  # type: ignore[no-untyped-call]
        hidden, token, found.row, found.num_rows
    )

    inner = _segmented(rows, gate_up, found)
    if experts.has_bias:
        bias = experts.get_parameter("gate_up_proj_bias")
        inner = inner.index_add(0, found.row, bias[found.slot])
    own = None if native is None else _own_rows(found, native).to(rows.dtype)
    if (adapter := state.adapter) is not None:
        low = rows @ adapter.gate_up_in.to(rows.dtype).T
        low = low if own is None else low * own
        inner = inner + _segmented(low, adapter.gate_up_out.to(rows.dtype), found)
    activated: Tensor = experts._apply_gate(inner)  # type: ignore[operator]
    outputs = _segmented(activated, down, found)
    if adapter is not None:
        low = _segmented(activated, adapter.down_in.to(rows.dtype), found)
        low = low if own is None else low * own
        outputs = outputs + low @ adapter.down_out.to(rows.dtype).T

    outputs = outputs.index_select(0, found.row)
    if experts.has_bias:
        outputs = outputs + experts.get_parameter("down_proj_bias")[found.slot]
    picked = gates.reshape(-1)[found.pick]
    if state.observer is not None:
        state.observer(outputs, picked, found.slot)
    combined: Tensor = _Combined.apply(  # type: ignore[no-untyped-call]
        outputs, picked.to(outputs.dtype), token, hidden.shape[0]
    )
    return combined.to(hidden.dtype)


def _segments(slots: Tensor, num_slots: int) -> _Segments:
    flat = slots.reshape(-1)
    pick = (flat >= 0).nonzero().squeeze(1)
    order = flat[pick].argsort(stable=True)
    pick = pick[order]
    slot = flat[pick]
    counts = torch.bincount(slot, minlength=num_slots)
    bounds, firsts, end = [], [], 0
    for index, count in enumerate(counts.tolist()):
        firsts.append(end)
        if count:
            step = SMALL_STEP if count <= LARGE_ROWS else LARGE_STEP
            bounds.append((index, end, end := end + -(-count // step) * step))
    shift = torch.tensor(firsts) - (counts.cumsum(0) - counts)
    return _Segments(pick, slot, torch.arange(slot.numel()) + shift[slot], bounds, end)


def _own_rows(found: _Segments, native: Tensor) -> Tensor:
    """(N, 1) 1 for rows of picks that adapters act on, else 0."""
    own = torch.zeros(found.num_rows, 1)
    return own.index_copy(0, found.row, native.reshape(-1, 1)[found.pick].float())


def _weight(experts: nn.Module, name: str) -> Tensor | QuantisedWeight:
    """(S, out, in), whichever way round the family stores it."""
    weight = getattr(experts, name)
    if isinstance(weight, QuantisedWeight):
        return weight
    assert isinstance(weight, Tensor)
    return weight.transpose(1, 2) if experts.is_transposed else weight


def _segmented(rows: Tensor, weight: Tensor | QuantisedWeight, segments: _Segments) -> Tensor:
    linear = SegmentedQuantised if isinstance(weight, QuantisedWeight) else _SegmentedLinear
    output: Tensor = linear.apply(rows, weight, segments.bounds)  # type: ignore[no-untyped-call]
    return output


ALL_EXPERTS_FUNCTIONS.register(BACKEND, experts_forward)
