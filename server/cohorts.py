"""Cohorts by coverage: who is asked together, so that many blocks have holders enough to be summed.

A deck (see `schedule`) says who is asked before anybody is asked again, and nothing about who is
asked together. That is the freedom here. Within each deck cohorts are built one after another: the
first card is the deck's, so that chance and seed decide whom a cohort is built around; each
further card is the one that brings most blocks nearest to their threshold. Whatever this greedy
choice does, it is taken only where its cohorts cover more than the deck's own.

Shapes: N devices, B blocks of the full layout.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from proxymoe.common.adapter import AdapterLayout
from proxymoe.server.schedule import Draw, deal, period, sample_cohort

LOOK_AHEAD = 64
"""So many cards of a deck may come next, which bounds the work with large fleets."""
LayoutOf = Callable[[str], AdapterLayout]
"""A device's own layout, by its name."""


def drawing(
    rule: Literal["deck", "covering"], full: AdapterLayout, layout_of: LayoutOf, smallest_class: int
) -> Draw:
    """Draws cohorts by this rule of `federation.cohorts`; see `Covering` for the rest."""
    return sample_cohort if rule == "deck" else Covering(full, layout_of, smallest_class)


def holding(full: AdapterLayout, layouts: Sequence[AdapterLayout]) -> np.ndarray:
    """(N, B) whether each of these layouts has each block.

    Raises:
        LayoutMismatch: one is no part of the full layout.
    """
    held = np.zeros((len(layouts), len(full.blocks)), dtype=bool)
    rows: dict[str, int] = {}
    for row, layout in enumerate(layouts):
        first = rows.setdefault(layout.digest, row)
        if first == row:
            held[row, [block for block, _, _ in layout.positions_in(full)]] = True
        else:
            held[row] = held[first]
    return held


def covered(held: np.ndarray, sizes: np.ndarray, smallest_class: int) -> int:
    """Numbers that a cohort can sum: of blocks that at least `smallest_class` of it hold.

    Args:
        held: (cohort, B) from `holding`.
        sizes: (B,) numbers per block.
        smallest_class: fewest holders whose sum may be seen.
    """
    return int(sizes[held.sum(axis=0) >= smallest_class].sum())


class Covering:
    """Draws cohorts that cover at least as many numbers, over a period, as the deck's own would.

    A function of its arguments and of the devices' layouts, like `sample_cohort`, and as fair.

    Args:
        full: layout of the full adapter.
        layout_of: see `LayoutOf`.
        smallest_class: fewest holders in a cohort by which a block is summed; 1 in the clear.
    """

    def __init__(self, full: AdapterLayout, layout_of: LayoutOf, smallest_class: int) -> None:
        self._full, self._layout_of, self._smallest = full, layout_of, smallest_class
        self._sizes = np.array(full.sizes)

    def __call__(self, names: list[str], size: int | None, seed: int, number: int) -> list[str]:
        """The cohort of round `number`; see `sample_cohort`."""
        if size is None or size >= len(names):
            return sorted(names)
        held = holding(self._full, [self._layout_of(name) for name in names])
        row_of = {name: row for row, name in enumerate(names)}

        def rows(some: list[str]) -> np.ndarray:
            return held[[row_of[name] for name in some]]

        def take(cohort: list[str], cards: list[str]) -> str:
            near = cards[:LOOK_AHEAD]
            gain = self._gain(rows(cohort).sum(axis=0), size - len(cohort))
            return near[int((rows(near) @ gain).argmax())]

        def worth(cohorts: list[list[str]]) -> int:
            return sum(covered(rows(each), self._sizes, self._smallest) for each in cohorts)

        which, place = divmod(number - 1, period(len(names), size))
        deals = (deal(names, size, seed, which, how) for how in (None, take))
        return max(deals, key=worth)[place]

    def _gain(self, holders: np.ndarray, left: int) -> np.ndarray:
        """(B,) what one more holder of each block is worth, with so many places left in a cohort.

        The holder that completes a block counts most, and each before it less: h of k holders are
        worth min(h, k)². What cannot be completed any more, or is complete, counts nothing.
        """
        wanted = (holders < self._smallest) & (self._smallest - holders <= left)
        return np.where(wanted, (2 * holders + 1) * self._sizes, 0)
