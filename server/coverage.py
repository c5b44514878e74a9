"""What a federation can sum: how often every block has holders enough, and what the others hold.

Theory. Of n members h hold a block, and a cohort of c is drawn; the holders in it are
hypergeometric. The block is summed if there are k of them, k being the smallest class (1 in the
clear). What fewer of them have trained is thrown away. The energy of an expert says what its
blocks matter to these devices (see `extract`); attention and shared experts have none of it.

Shapes: N members, B blocks of the full layout, E experts.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import comb

import numpy as np

from proxymoe.common.adapter import AdapterLayout
from proxymoe.common.allocation import Scores
from proxymoe.server.cohorts import holding

RARELY = 0.5
"""A block that is summed in a smaller share of the rounds is summed rarely."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some blocks of an adapter."""

    blocks: int
    numbers: int
    energy: float
    """Share of the routed experts' energy that is theirs, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """The blocks of an adapter, by how often they are summed; the parts do not overlap."""

    members: int
    cohort_size: int
    smallest_class: int
    total: Part
    unheld: Part
    """In nobody's submodel."""
    never: Part
    """Held, but never by enough devices of a cohort."""
    rarely: Part
    """By enough of them in fewer than half of the rounds."""
    wasted: float
    """Share of what devices train that is in no sum, on average over rounds."""

    def __str__(self) -> str:
        """The same in one sentence."""
        parts = {
            "in no submodel": self.unheld,
            f"never with {self.smallest_class} holders in a round": self.never,
            "rarely": self.rarely,
        }
        told = [f"{p.blocks} {what} ({p.energy:.1%} of energy)" for what, p in parts.items()]
        return (
            f"of {self.total.blocks} blocks, {', '.join(told)}; {self.wasted:.1%} of what devices "
            "train is in no sum"
        )


def coverage(
    full: AdapterLayout,
    layouts: Iterable[AdapterLayout],
    cohort_size: int | None,
    smallest_class: int,
    energy: Scores,
) -> Coverage:
    """How much of the adapter such members can train together.

    Args:
        full: layout of the full adapter.
        layouts: of every member, one at least.
        cohort_size: of every round; None is everybody.
        smallest_class: fewest holders in a cohort by which a block is summed; 1 in the clear.
        energy: what every expert matters to the members, on average; see `Profile.relative_energy`.
    """
    held = holding(full, list(layouts))
    members, holders, sizes = len(held), held.sum(axis=0), np.array(full.sizes)
    size = min(cohort_size or members, members)
    found = {h: _chance(members, h, size, smallest_class) for h in set(holders.tolist())}
    chances, lost = np.array([found[h] for h in holders.tolist()]).T
    shares = _energy_shares(full, energy)

    def part(which: np.ndarray) -> Part:
        return Part(int(which.sum()), int(sizes[which].sum()), float(shares[which].sum()))

    trained = float((holders * sizes).sum()) * size / members
    return Coverage(
        members=members,
        cohort_size=size,
        smallest_class=smallest_class,
        total=part(holders >= 0),
        unheld=part(holders == 0),
        never=part((holders > 0) & (chances == 0)),
        rarely=part((chances > 0) & (chances < RARELY)),
        wasted=float((lost * sizes).sum()) / trained if trained else 0.0,
    )


def mean_mixture(mixtures: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The domain mixture of all these devices together, each of which weighs the same."""
    found: dict[str, float] = {}
    for mixture in mixtures:
        total = sum(mixture.values())
        for domain, weight in mixture.items():
            found[domain] = found.get(domain, 0.0) + weight / total
    return found


def _chance(members: int, holders: int, size: int, least: int) -> tuple[float, float]:
    """How likely a cohort has `least` of a block's holders, and how many it has in vain."""
    ways = comb(members, size)
    few = range(min(least, size + 1))
    exactly = [comb(holders, x) * comb(members - holders, size - x) for x in few]
    return 1 - sum(exactly) / ways, sum(x * count for x, count in enumerate(exactly)) / ways


def _energy_shares(full: AdapterLayout, energy: Scores) -> np.ndarray:
    """(B,) every block's share of the experts' energy; blocks of one expert have equal parts."""
    total = sum(float(values.sum()) for values in energy.values()) or 1.0
    parts = Counter((block.layer, block.expert) for block in full.blocks)
    return np.array(
        [
            0.0
            if b.expert is None
            else energy[b.layer][b.expert] / total / parts[b.layer, b.expert]
            for b in full.blocks
        ]
    )
