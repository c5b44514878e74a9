"""What a mode is given, and what it gives back.

Shapes: E experts of a layer, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from proxymoe.common.allocation import Room, Scores
from proxymoe.common.plan import Others
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.profile import ExpertStatistics
from proxymoe.server.relations import Relations


@dataclass(frozen=True)
class Evidence:
    """What is known of the experts under one domain mixture; all by decoder layer."""

    base: BaseCheckpoint
    statistics: dict[int, ExpertStatistics]
    """Per token."""
    relations: dict[int, Relations]
    """Per token; empty for modes that do without."""
    sensitivity: dict[int, float]
    """What a unit of energy disturbs, see `Profile.sensitivity`."""
    num_tokens: float
    """Tokens behind the statistics."""
    rng: np.random.Generator

    def scores(self, rate: Callable[[ExpertStatistics], Tensor]) -> Scores:
        """A saliency that is a function of each layer's statistics."""
        return {at: rate(found).double().numpy() for at, found in self.statistics.items()}

    def relative(self, energy: Callable[[ExpertStatistics], Tensor]) -> Scores:
        """Energies that are lost, as shares of the residual stream."""
        return {at: self.sensitivity[at] * each for at, each in self.scores(energy).items()}


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
