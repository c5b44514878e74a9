"""How the experts of one layer relate to each other, on public text of several domains.

The profile (`server/profile.py`) looks at each expert alone. Modes that merge or imitate experts
must know more: who is likely for the same token, whose outputs are alike. All of it are sums over
tokens, so statistics of any domain mixture follow without touching the model again. They are made
on demand, since they cost what running every expert on every token costs.

Shapes: T tokens, E experts, D hidden size.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from proxymoe.common.errors import CheckpointError
from proxymoe.common.experts import all_outputs, valid_tokens
from proxymoe.common.model import LoadedModel
from proxymoe.common.moe import MoELayer, moe_layers
from proxymoe.common.text import Example, packed_batches
from proxymoe.server.reading import Reader, read_whole
from proxymoe.server.sums import load_sums, save_sums, weighted_sum

CHUNK_TOKENS = 128
"""Tokens that all experts are run on at once: (E, T, D) in fp32 is what it takes."""


@dataclass(frozen=True, slots=True)
class Relations:
    """Sums over tokens, for one layer; w = g² of the tokens routed to the first expert of a pair.

    After `mixed`, per token.
    """

    probability: Tensor
    """(E,) Σ p, the softmax of the router's logits over all experts."""
    together: Tensor
    """(E, E) Σ p_i p_j."""
    logits: Tensor
    """(E, E) Σ l_i l_j of the router's logits."""
    output: Tensor
    """(E, D) Σ f over all tokens, routed or not."""
    mass: Tensor
    """(E,) Σ w."""
    cross: Tensor
    """(E, E) Σ w_i ⟨f_i, f_j⟩."""
    square: Tensor
    """(E, E) Σ w_i ‖f_j‖²."""
    seen: Tensor
    """(E, E, D) Σ w_i f_j."""

    @classmethod
    def zeros(cls, num_experts: int, hidden_size: int) -> Self:
        """The relations seen on no tokens."""
        e, d = num_experts, hidden_size
        shapes = ((e,), (e, e), (e, e), (e, d), (e,), (e, e), (e, e), (e, e, d))
        return cls(*(torch.zeros(shape) for shape in shapes))

    def add(self, outputs: Tensor, logits: Tensor, weights: Tensor) -> None:
        """Adds some tokens.

        Args:
            outputs: (E, T, D) of every expert on every token.
            logits: (T, E) of the router.
            weights: (T, E) squared gates, zero where not routed.
        """
        outputs, logits, weights = outputs.float(), logits.float(), weights.float()
        probability = logits.softmax(-1)
        self.probability.add_(probability.sum(0))
        self.together.add_(probability.T @ probability)
        self.logits.add_(logits.T @ logits)
        self.output.add_(outputs.sum(1))
        self.mass.add_(weights.sum(0))
        by_token = outputs.transpose(0, 1)
        inner = torch.bmm(by_token, by_token.transpose(1, 2))
        self.cross.add_(torch.einsum("ti,tij->ij", weights, inner))
        self.square.add_(weights.T @ inner.diagonal(dim1=1, dim2=2))
        self.seen.add_(torch.einsum("ti,jtd->ijd", weights, outputs))


LayerRelations = dict[int, Relations]
"""By decoder layer."""


def mixed(parts: Sequence[tuple[float, LayerRelations]]) -> LayerRelations:
    """The weighted sum of several domains' relations."""
    return {at: weighted_sum([(w, found[at]) for w, found in parts]) for at in parts[0][1]}


def relate_domain(
    loaded: LoadedModel,
    examples: Sequence[Example],
    read: Reader = read_whole,
) -> tuple[LayerRelations, int]:
    """Relations in the full model on these examples of one domain, and the number of their tokens.

    `read` runs the model: whole, or one layer at a time (`server/streamed.py`).

    Raises:
        CheckpointError: a sum is not finite.
    """
    layers = moe_layers(loaded.model)
    sums = {x.position: Relations.zeros(x.num_experts, x.hidden_size) for x in layers}
    num_tokens = 0
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_watched(layer, sums[layer.position]))
        for batch in read(loaded.model, packed_batches(examples)):
            num_tokens += int(batch.valid.sum())
    if not all(bool(torch.isfinite(found.square).all()) for found in sums.values()):
        raise CheckpointError("relations of experts are not finite; are the weights damaged?")
    return sums, num_tokens


def save_relations(path: Path, relations: LayerRelations, num_tokens: int) -> None:
    """Writes one domain's relations atomically."""
    save_sums(path, relations, num_tokens)


def load_relations(path: Path) -> tuple[LayerRelations, int]:
    """One domain's relations, and the tokens behind them; CheckpointError if unreadable."""
    found, num_tokens, _ = load_sums(path, Relations)
    return found, num_tokens


@contextlib.contextmanager
def _watched(layer: MoELayer, sums: Relations) -> Iterator[None]:
    """While the block runs, the layer's experts are seen on all tokens that pass through it."""
    logits: list[Tensor] = []
    experts = layer.experts

    def keep_logits(_router: nn.Module, _inputs: Any, output: tuple[Tensor, ...]) -> None:
        logits[:] = [output[0].reshape(-1, layer.num_routed)]

    def observe(_experts: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, index, gates = inputs
        squared = gates.new_zeros(hidden.shape[0], layer.num_routed)
        squared = squared.scatter_add(1, index, gates.square())
        parts = (hidden, logits[0], squared)
        if (valid := valid_tokens(hidden.shape[0])) is not None:
            parts = (hidden[valid], logits[0][valid], squared[valid])
        for chunk in zip(*(part.split(CHUNK_TOKENS) for part in parts), strict=True):
            sums.add(all_outputs(experts, chunk[0]), *chunk[1:])

    handles = [
        layer.router.register_forward_hook(keep_logits),
        experts.register_forward_pre_hook(observe),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
