"""A router whose kept experts take over the probability of those merged into them.

LiteMoE (SenSys 2024, section 4.3) writes it r' = r·M: with M[i, s] = 1 where expert i was merged
into s, the probabilities of a slot's members add up *before* top-k, and experts left out are
masked. That takes a router whose gates are probabilities, so it is refused for others. What the
family does after top-k, to renormalise and to scale, stays as it is.

Shapes: T tokens, E routed experts, S kept experts, K = top-k.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from proxymoe.common.errors import UnsupportedModel
from proxymoe.common.moe import MoELayer

PROBES = 64
"""Random tokens on which a router shows what it does after top-k."""


@dataclass(frozen=True, slots=True)
class AfterTopK:
    """What a router makes of the probabilities of its top-k experts."""

    normalised: bool
    """Whether they are divided by their sum."""
    scale: float
    """And multiplied by this."""


def summed_top_k(
    logits: Tensor, slot: Tensor, top_k: int, rule: AfterTopK
) -> tuple[Tensor, Tensor]:
    """(gates (T, K), slots (T, K)) of the K slots with most probability.

    Args:
        logits: (T, E), as the whole router computes them.
        slot: (E,) the slot of every expert, -1 for those left out.
        top_k: picks per token, at most S.
        rule: what becomes of the picked probabilities.
    """
    probabilities = logits.float().softmax(-1)
    kept = slot >= 0
    mass = probabilities.new_zeros(logits.shape[0], int(slot.max()) + 1)
    mass = mass.index_add(1, slot[kept], probabilities[:, kept])
    gates, slots = mass.topk(top_k, dim=-1)
    if rule.normalised:
        gates = gates / gates.sum(-1, keepdim=True)
    return gates * rule.scale, slots


def install_summed_router(layer: MoELayer, slot: Tensor) -> None:
    """Makes this layer's router choose among slots; `slot` is (E,), -1 for experts left out.

    Raises:
        UnsupportedModel: the router's gates are no softmax probabilities of its logits.
    """
    rule, top_k = after_top_k(layer), min(layer.top_k, int(slot.max()) + 1)

    def choose(_router: Any, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits, weights, _ = output
        gates, slots = summed_top_k(logits, slot, top_k, rule)
        return logits, gates.to(weights.dtype), slots

    layer.router.register_forward_hook(choose)


def after_top_k(layer: MoELayer) -> AfterTopK:
    """How this layer's router turns probabilities into gates, found out by asking it.

    Raises:
        UnsupportedModel: its gates are no softmax probabilities of its logits.
    """
    weight = next(layer.router.parameters())
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(PROBES, layer.hidden_size, generator=generator).to(weight.dtype)
    with torch.no_grad():
        logits, gates, index = (part.flatten(0, -2) for part in layer.router(probes))
    probabilities = logits.float().softmax(-1)
    found = probabilities.gather(1, index)
    best = found.sum(-1) >= probabilities.topk(index.shape[1]).values.sum(-1) - 1e-3
    gates, sums = gates.float(), gates.float().sum(-1, keepdim=True)
    for normalised, expected in ((True, found / found.sum(-1, keepdim=True)), (False, found)):
        scale = float((sums / expected.sum(-1, keepdim=True)).median())
        if bool(best.all()) and torch.allclose(gates, scale * expected, rtol=2e-2, atol=2e-3):
            return AfterTopK(normalised, scale)
    raise UnsupportedModel(
        f"{layer.name}: router {type(layer.router).__name__} does not weigh experts by softmax "
        "probabilities, so probabilities cannot be summed; use router = 'full'"
    )
