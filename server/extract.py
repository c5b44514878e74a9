"""Chooses the experts a device gets: profile, domain mixture and byte budget in, plan out.

Theory. Leaving expert e out of a layer changes that layer's output, over the device's tokens, by
the energy E[g² ‖f_e‖²] that the expert contributed (g gate, f output), or by what its mean output
does not explain if a constant takes its place. Errors of different experts add up nearly
independently, so keeping the largest energies per byte is the greedy optimum, within a layer or,
when the statistics match the device, over all layers at once. With statistics of other people's
text a layer that looks idle may not be, so every layer keeps a floor.

The router stays whole by default: gates of kept experts remain the base model's own. Slicing the
router renormalises them, which is what most pruning methods do and what costs 2.5-5 times the
divergence at the same kept set.

Saliencies other than energy are the published rivals, at equal bytes:
- `reap`: mean of g‖f‖ over the tokens routed to the expert (REAP, arXiv 2510.13999, eq. 9).
- `frequency`: how often the expert is routed to.
- `random`: a seeded draw, the floor that every claim must clear.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from proxymoe.common.checkpoint import bytes_of
from proxymoe.common.config import Allocation, ExtractSettings, Saliency
from proxymoe.common.errors import BudgetError, PlanError
from proxymoe.common.files import digest_of
from proxymoe.common.plan import LayerPlan, Others, Plan
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.profile import ExpertStatistics, Profile

SHRINKAGE_TOKENS = 20.0
"""A mean output seen on n tokens is shrunk by n / (n + this): few tokens, little trust."""

Scores = dict[int, np.ndarray]
"""Saliency (E,) of every expert, by decoder layer."""


@dataclass(frozen=True, slots=True)
class Extraction:
    """A plan, the tensors that go with it, and what it weighs."""

    plan: Plan
    offsets: dict[str, Tensor]
    """{layer number: (E, D)} mean outputs of a `mean` plan, zero for kept experts."""
    num_bytes: int


def extract(
    base: BaseCheckpoint,
    profile: Profile,
    mixture: dict[str, float],
    settings: ExtractSettings,
    rng: np.random.Generator,
) -> Extraction:
    """The proxy submodel that serves this domain mixture best within the budget.

    Raises:
        BudgetError: the budget is below trunk and floor; the message says the smallest that fits.
        PlanError: the profile belongs to another base model.
    """
    if profile.base != base.digest:
        raise PlanError(f"profile of {profile.base[:12]} used with base model {base.digest[:12]}")
    statistics = profile.mix(mixture)
    budget = budget_bytes(base, settings)
    scores = score(statistics, settings, rng)
    kept = allocate(base, scores, budget, settings)
    offsets = (
        _mean_offsets(statistics, profile, mixture, kept) if settings.others is Others.MEAN else {}
    )
    layers = {
        at: LayerPlan(num_experts=base.num_experts[at], kept=tuple(sorted(ids)))
        for at, ids in kept.items()
    }
    plan = Plan(
        base=base.digest,
        layers=layers,
        router=settings.router,
        others=settings.others,
        saliency=settings.saliency.value,
        offsets=digest_of(*(bytes_of(o) for o in offsets.values())) if offsets else None,
    )
    return Extraction(plan, offsets, base.manifest(plan).num_bytes + _table_bytes(base, settings))


def budget_bytes(base: BaseCheckpoint, settings: ExtractSettings) -> int:
    """The budget in bytes: as given, or trunk plus the asked fraction of all experts."""
    if settings.budget_bytes is not None:
        return settings.budget_bytes
    total = sum(base.num_experts[at] * size for at, size in base.expert_bytes.items())
    return base.trunk_bytes + round(settings.kept_fraction * total)


def score(
    statistics: dict[int, ExpertStatistics], settings: ExtractSettings, rng: np.random.Generator
) -> Scores:
    """The saliency of every expert; higher is kept first."""
    rate: Callable[[ExpertStatistics], Tensor]
    match settings.saliency:
        case Saliency.ENERGY if settings.others is Others.MEAN:
            rate = ExpertStatistics.residual_energy
        case Saliency.ENERGY:
            rate = _energy
        case Saliency.REAP:
            rate = _reap
        case Saliency.FREQUENCY:
            rate = _count
        case Saliency.RANDOM:
            return {at: rng.random(s.count.numel()) for at, s in statistics.items()}
    return {at: rate(s).double().numpy() for at, s in statistics.items()}


def allocate(
    base: BaseCheckpoint, scores: Scores, budget: int, settings: ExtractSettings
) -> dict[int, list[int]]:
    """Kept experts per layer: the floor first, then the best score per byte while bytes last."""
    cost = base.expert_bytes
    order = {at: list(np.argsort(-values, kind="stable")) for at, values in scores.items()}
    fixed = base.trunk_bytes + _table_bytes(base, settings)
    smallest = fixed + sum(cost.values())
    if budget < smallest:
        raise BudgetError(
            f"a budget of {budget:,} bytes cannot hold the trunk ({base.trunk_bytes:,} bytes) and "
            f"one expert per layer; the smallest that fits is {smallest:,} bytes"
        )
    left = budget - fixed
    uniform = max(1, int(left // sum(cost.values())))
    share = 1.0 if settings.allocation is Allocation.UNIFORM else settings.floor
    floor = max(1, int(share * uniform))
    kept = {at: [int(e) for e in ids[:floor]] for at, ids in order.items()}
    left -= sum(cost[at] * len(ids) for at, ids in kept.items())
    if settings.allocation is Allocation.UNIFORM:
        return kept
    rest = [
        (scores[at][e] / cost[at], -at, int(e)) for at, ids in order.items() for e in ids[floor:]
    ]
    for _, negative_at, expert in sorted(rest, reverse=True):
        at = -negative_at
        if cost[at] <= left:
            kept[at].append(expert)
            left -= cost[at]
    return kept


def _table_bytes(base: BaseCheckpoint, settings: ExtractSettings) -> int:
    """Bytes of the mean vectors of all experts, of which a `mean` submodel ships a table."""
    if settings.others is not Others.MEAN:
        return 0
    return sum(2 * layer.num_routed * layer.hidden_size for layer in base.layers.values())


def _mean_offsets(
    statistics: dict[int, ExpertStatistics],
    profile: Profile,
    mixture: dict[str, float],
    kept: dict[int, list[int]],
) -> dict[str, Tensor]:
    tokens = sum(profile.num_tokens[name] for name, weight in mixture.items() if weight > 0)
    offsets = {}
    for at, stats in statistics.items():
        seen = stats.count * tokens
        trusted = stats.mean_output() * (seen / (seen + SHRINKAGE_TOKENS))[:, None]
        trusted[kept[at]] = 0.0
        offsets[str(at)] = trusted.to(torch.bfloat16)
    return offsets


def _energy(stats: ExpertStatistics) -> Tensor:
    return stats.energy


def _count(stats: ExpertStatistics) -> Tensor:
    return stats.count


def _reap(stats: ExpertStatistics) -> Tensor:
    return stats.norm / stats.count.clamp_min(torch.finfo(torch.float32).tiny)
