"""Per-block weighted means of linear updates, through the one seam that may see an update.

`Summation` is what secure aggregation will implement: contributions go in, and only the sum over
all of them comes out. An update block is present only for its holders, so each block has a weight
of its own, and the mean of a block is its sum over its summed weight. With one frozen factor this
mean is exact for any subset of holders.

Updates are added in the order of device names, in fp64, so the result does not depend on who
answered first.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from proxymoe.common.adapter import AdapterLayout
from proxymoe.common.errors import ProtocolError


@dataclass(frozen=True, slots=True)
class BlockSum:
    """The sum of updates over a cohort, in the coordinates of the full adapter."""

    total: Tensor
    """(P,) fp64, Σ weight · update."""
    weight: Tensor
    """(blocks,) fp64, Σ weight over the holders of each block."""
    num_devices: int

    def mean(self, layout: AdapterLayout) -> Tensor:
        """(P,) fp32: per block the weighted mean over its holders, zero where nobody held it."""
        sizes = torch.tensor(layout.sizes)
        per_parameter = self.weight.clamp_min(1e-300).repeat_interleave(sizes)
        return (self.total / per_parameter).float()


class Summation(Protocol):
    """Turns contributions into their sum without giving any single one away."""

    notice: str
    """What this summation protects and what not; logged every round."""

    def add(self, device: str, layout: AdapterLayout, update: Tensor, weight: float) -> None:
        """Takes one device's update (its own P) in its own layout; at most once per device."""

    def sum(self) -> BlockSum:
        """The sum over everything added."""


class PlainSum:
    """A sum in the clear: the server sees every update while it adds. For trusted set-ups."""

    notice = "plain sum: the coordinator sees single updates; no secure aggregation yet"

    def __init__(self, full: AdapterLayout) -> None:
        self._full = full
        self._added: dict[str, tuple[AdapterLayout, Tensor, float]] = {}

    def add(self, device: str, layout: AdapterLayout, update: Tensor, weight: float) -> None:
        """See `Summation.add`; ProtocolError if the device has been added before."""
        layout.require(update)
        if device in self._added:
            raise ProtocolError(f"second update of device {device!r} in one round")
        self._added[device] = (layout, update, weight)

    def sum(self) -> BlockSum:
        """See `Summation.sum`."""
        total = torch.zeros(self._full.size, dtype=torch.float64)
        weights = torch.zeros(len(self._full.blocks), dtype=torch.float64)
        for name in sorted(self._added):
            layout, update, weight = self._added[name]
            if layout.blocks == self._full.blocks:
                total += weight * update.double()
                weights += weight
                continue
            for block, start, stop in layout.positions_in(self._full):
                span = slice(self._full.bounds[block], self._full.bounds[block + 1])
                total[span] += weight * update[start:stop].double()
                weights[block] += weight
        return BlockSum(total, weights, len(self._added))
