"""Chooses the experts a device gets: profile, domain mixture and byte budget in, plan out.

Theory. A proxy submodel stands in for the full model while an adapter is tuned, so it should
leave the full model's outputs on the device's tokens as they are. How experts are chosen to that
end, and what becomes of the others, is a *mode*: the default `drop` and the published rivals are
in `server/modes`, a file each, and all get the same bytes.

Energies that are lost count by their share of the residual stream (`server/profile.py`), so that
layers compare.

Budget first: the trunk, the whole router and what the mode needs beside experts are fixed, and
what is left holds experts. With statistics that match the device, bytes go wherever a layer needs
them most; with statistics of other people's text a layer that looks idle may not be, so every
layer keeps a floor.

The router stays whole by default: gates of kept experts remain the base model's own. Slicing the
router renormalises them, which is what most pruning methods do and what costs 2.5-5 times the
divergence at the same kept set.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from proxymoe.common.allocation import Room
from proxymoe.common.checkpoint import bytes_of
from proxymoe.common.config import ExtractSettings, PlanMode
from proxymoe.common.errors import BudgetError, PlanError
from proxymoe.common.expert_table import ExpertTable
from proxymoe.common.files import digest_of
from proxymoe.common.plan import LayerPlan, Others, Plan, RouterMode
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.modes import MODES, Choice, Evidence, Mode
from proxymoe.server.profile import Profile


@dataclass(frozen=True, slots=True)
class Extraction:
    """A plan, the tensors that go with it, and what it weighs."""

    plan: Plan
    tables: dict[str, Tensor]
    """See `common.model.TABLES_FILE`; empty when the others are dropped."""
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
        PlanError: the profile belongs to another base model, or lacks what the mode looks at.
    """
    if profile.base != base.digest:
        raise PlanError(f"profile of {profile.base[:12]} used with base model {base.digest[:12]}")
    mode = MODES[settings.mode]
    evidence = Evidence(
        base=base,
        statistics=profile.mix(mixture),
        sensitivity=profile.sensitivity,
        relations=profile.mix_relations(mixture) if mode.relations else {},
        num_tokens=sum(profile.num_tokens[name] for name, w in mixture.items() if w > 0),
        rng=rng,
    )
    choice = mode.choose(evidence, _room(base, mode, settings))
    plan = _plan(base, choice, settings)
    return Extraction(plan, choice.tables, base.manifest(plan).num_bytes + mode.table_bytes(base))


def budget_bytes(base: BaseCheckpoint, settings: ExtractSettings) -> int:
    """The budget in bytes: as given, or trunk plus the asked fraction of all experts."""
    if settings.budget_bytes is not None:
        return settings.budget_bytes
    experts = (
        largest_bytes(base, settings) - base.trunk_bytes - MODES[settings.mode].table_bytes(base)
    )
    return base.trunk_bytes + round(settings.kept_fraction * experts)


def smallest_bytes(base: BaseCheckpoint, settings: ExtractSettings) -> int:
    """Bytes of trunk and one expert per layer."""
    experts = sum(base.held_expert_bytes(settings.experts).values())
    return base.trunk_bytes + MODES[settings.mode].table_bytes(base) + experts


def largest_bytes(base: BaseCheckpoint, settings: ExtractSettings) -> int:
    """Bytes of trunk and all experts."""
    cost = base.held_expert_bytes(settings.experts)
    experts = sum(base.num_experts[at] * size for at, size in cost.items())
    return base.trunk_bytes + MODES[settings.mode].table_bytes(base) + experts


def expert_table(base: BaseCheckpoint, profile: Profile, settings: ExtractSettings) -> ExpertTable:
    """What a device needs to choose experts as `extract` does, for a mixture that stays there.

    Raises:
        CheckpointError: the profile has fewer domains than a table, or more.
    """
    names = sorted(profile.domains)
    found = [profile.relative_energy({name: 1.0}) for name in names]
    return ExpertTable(
        domains=tuple(names),
        energy={at: np.array([each[at] for each in found], np.float32) for at in base.num_experts},
        expert_bytes=base.held_expert_bytes(settings.experts),
        allocation=settings.allocation,
        floor=settings.floor,
        is_exact=settings.mode is PlanMode.DROP and not settings.templates,
    )


def _room(base: BaseCheckpoint, mode: Mode, settings: ExtractSettings) -> Room:
    budget, cost = budget_bytes(base, settings), base.held_expert_bytes(settings.experts)
    fixed = base.trunk_bytes + mode.table_bytes(base)
    smallest = smallest_bytes(base, settings)
    if budget < smallest:
        raise BudgetError(
            f"a budget of {budget:,} bytes cannot hold the trunk ({base.trunk_bytes:,} bytes) and "
            f"one expert per layer; the smallest that fits is {smallest:,} bytes"
        )
    return Room(cost, budget - fixed, settings.allocation, settings.floor)


def _plan(base: BaseCheckpoint, choice: Choice, settings: ExtractSettings) -> Plan:
    layers = {
        at: LayerPlan(
            num_experts=base.num_experts[at],
            kept=tuple(sorted(ids)),
            stands_for=choice.stands_for.get(at, {}),
        )
        for at, ids in choice.kept.items()
    }
    if settings.router is RouterMode.SUMMED and choice.others is not Others.MERGE:
        raise PlanError(
            f"router = 'summed' with mode = '{settings.mode}', which merges no experts; use "
            "'full' or 'sliced'"
        )
    contents = [bytes_of(table) for _, table in sorted(choice.tables.items())]
    return Plan(
        base=base.digest,
        layers=layers,
        router=settings.router,
        others=choice.others,
        experts=settings.experts,
        mode=settings.mode.value,
        tables=digest_of(*contents) if contents else None,
    )
