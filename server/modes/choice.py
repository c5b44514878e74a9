"""What a mode is given, and what it gives back.

Shapes: E experts of a layer, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from proxymoe.common.config import Allocation
from proxymoe.common.plan import Others
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.profile import ExpertStatistics
from proxymoe.server.relations import Relations

Scores = dict[int, np.ndarray]
"""Saliency (E,) of every expert, by decoder layer; higher is kept first."""


@dataclass(frozen=True)
class Evidence:
    """What is known of the experts under one domain mixture; all by decoder layer."""

    base: BaseCheckpoint
    statistics: dict[int, ExpertStatistics]
    """Per token."""
    relations: dict[int, Relations]
    """Per token; empty for modes that do without."""
    num_tokens: float
    """Tokens behind the statistics."""
    rng: np.random.Generator

    def scores(self, rate: Callable[[ExpertStatistics], Tensor]) -> Scores:
        """A saliency that is a function of each layer's statistics."""
        return {at: rate(found).double().numpy() for at, found in self.statistics.items()}


@dataclass(frozen=True, slots=True)
class Room:
    """How many experts there is room for, and how they may spread over the layers."""

    cost: dict[int, int]
    """Bytes of one expert, by decoder layer."""
    left: int
    """Bytes for experts; at least one per layer fits."""
    allocation: Allocation
    floor: float
    """Every layer keeps this share of what a uniform allocation would give it."""

    @property
    def uniform(self) -> int:
        """Experts per layer if all have as many."""
        return max(1, self.left // sum(self.cost.values()))

    @property
    def least(self) -> int:
        """Experts that every layer keeps."""
        return max(1, int((1.0 if self.uniform_only else self.floor) * self.uniform))

    @property
    def uniform_only(self) -> bool:
        """Whether all layers must keep the same number."""
        return self.allocation is Allocation.UNIFORM

    def fill(self, scores: Scores) -> dict[int, list[int]]:
        """Kept experts per layer: the floor first, then the best score per byte while bytes last.

        Errors of different experts add up nearly independently, so this greedy choice is the
        optimum within a layer, and over all layers when the statistics match the device.
        """
        order = {at: list(np.argsort(-values, kind="stable")) for at, values in scores.items()}
        kept = {at: [int(e) for e in ids[: min(self.least, len(ids))]] for at, ids in order.items()}
        left = self.left - sum(self.cost[at] * len(ids) for at, ids in kept.items())
        if self.uniform_only:
            return kept
        rest = [
            (scores[at][e] / self.cost[at], -at, int(e))
            for at, ids in order.items()
            for e in ids[len(kept[at]) :]
        ]
        for _, negative_at, expert in sorted(rest, reverse=True):
            at = -negative_at
            if self.cost[at] <= left:
                kept[at].append(expert)
                left -= self.cost[at]
        return kept


@dataclass(frozen=True, slots=True)
class Choice:
    """Which experts a mode keeps, what becomes of the others, and the tensors that takes."""

    kept: dict[int, list[int]]
    others: Others = Others.DROP
    stands_for: dict[int, dict[int, int]] = field(default_factory=dict)
    """{layer: {expert left out: kept expert}}, see `LayerPlan`."""
    tables: dict[str, Tensor] = field(default_factory=dict)
    """See `common.model.TABLES_FILE`."""


def no_table(_base: BaseCheckpoint) -> int:
    """Bytes of tables beside the experts: none."""
    return 0


def table_of_offsets(base: BaseCheckpoint) -> int:
    """Bytes of one vector per expert in bf16."""
    return sum(2 * layer.num_routed * layer.hidden_size for layer in base.layers.values())


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to choose experts."""

    choose: Callable[[Evidence, Room], Choice]
    table_bytes: Callable[[BaseCheckpoint], int] = no_table
    """What it needs beside the experts."""
    relations: bool = False
    """Whether it asks how experts relate to each other (`server/relations.py`)."""
