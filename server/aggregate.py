"""Per-block weighted means of linear updates, through the one seam that may see an update.

`Summation` is what secure aggregation will implement: contributions go in, and only the sum over
all of them comes out. An update block is present only for its holders, so each block has a weight
of its own, and the mean of a block is its sum over its summed weight. With one frozen factor this
mean is exact for any subset of holders.

A sum holds one vector, however many devices there are. In the clear it is of fp64, so its last bits
depend on the order of additions: callers add in the order of device names.
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

    def held(self, layout: AdapterLayout) -> Tensor:
        """(P,) bool: whether anybody held the block that a parameter belongs to."""
        return (self.weight > 0).repeat_interleave(torch.tensor(layout.sizes))


class Summation(Protocol):
    """Turns contributions into their sum without giving any single one away."""

    notice: str
    """What this summation protects and what not; logged every round."""

    def add(self, device: str, layout: AdapterLayout, update: Tensor, weight: float) -> None:
        """Takes one device's update (its own P) in its own layout; at most once per device."""

    def sum(self) -> BlockSum:
        """The sum over everything added."""


class PlainSum:
    """A sum in the clear: the server sees every update while it adds. For trusted set-ups.

    Args:
        full: layout of the full adapter.
        fewest_holders: a block that fewer of the added devices hold is in no sum.
    """

    notice = "plain sum: the coordinator sees single updates"

    def __init__(self, full: AdapterLayout, fewest_holders: int = 1) -> None:
        self._full, self._fewest = full, fewest_holders
        self._holders = torch.zeros(len(full.blocks), dtype=torch.int64)
        self._total = torch.zeros(full.size, dtype=torch.float64)
        self._weight = torch.zeros(len(full.blocks), dtype=torch.float64)
        self._added: set[str] = set()

    def add(self, device: str, layout: AdapterLayout, update: Tensor, weight: float) -> None:
        """See `Summation.add`; ProtocolError if the device has been added before."""
        layout.require(update)
        if device in self._added:
            raise ProtocolError(f"second update of device {device!r} in one round")
        if layout.blocks == self._full.blocks:
            self._total += weight * update.double()
            self._weight += weight
            self._holders += 1
        else:
            for block, start, stop in layout.positions_in(self._full):
                span = slice(self._full.bounds[block], self._full.bounds[block + 1])
                self._total[span] += weight * update[start:stop].double()
                self._weight[block] += weight
                self._holders[block] += 1
        self._added.add(device)

    def sum(self) -> BlockSum:
        """See `Summation.sum`."""
        enough = self._holders >= self._fewest
        sizes = torch.tensor(self._full.sizes)
        total = self._total * enough.repeat_interleave(sizes)
        return BlockSum(total, self._weight * enough, len(self._added))
