"""Which experts fit: the one rule by which bytes are given to experts, and what a choice covers.

The coordinator cuts plans by it, and a device that ranks experts for itself (`client/advise.py`)
comes to the same. Pure functions over numbers; no model is needed.

Shapes: E experts of a layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from proxymoe.common.config import Allocation

Scores = dict[int, np.ndarray]
"""Saliency (E,) of every expert, by decoder layer; higher is kept first."""


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


def covered_energy(scores: Scores, kept: Mapping[int, Sequence[int]]) -> float:
    """The share of these energies that the kept experts have, from 0 to 1.

    Args:
        scores: energies.
        kept: experts, by the same layers.
    """
    covered = sum(float(scores[at][list(experts)].sum()) for at, experts in kept.items())
    total = sum(float(values.sum()) for values in scores.values())
    return covered / total if total else 1.0
