"""Secure aggregation as one more `Summation`: terms from layouts, and a `BlockSum` from class sums.

Blocks that too few devices of the cohort hold are skipped up front, and classes that lost too many
on the way stay masked; both count as blocks that nobody held, with a weight of zero.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from proxymoe.common.adapter import AdapterLayout
from proxymoe.common.contribution import Contribution
from proxymoe.common.directory import Directory
from proxymoe.common.errors import ConfigError, LayoutMismatch, ProtocolError
from proxymoe.common.fixed_point import FixedPoint, WordBits, range_for, word_bits_for
from proxymoe.common.letters import MAX_DEVICES
from proxymoe.common.secagg import MaskClass, Terms, Threshold
from proxymoe.common.unmasking import Coordinator
from proxymoe.server.aggregate import BlockSum

RESOLUTION = 5e-4
"""Coarsest step of the words, in units of an update's largest root mean square."""
NOTICE = (
    "secure aggregation (experimental, not reviewed from outside): the coordinator sees sums over "
    "at least {least} devices, which device holds what, and who answers when"
)


def mask_classes(
    full: AdapterLayout, layouts: Mapping[str, AdapterLayout], smallest_class: int
) -> tuple[MaskClass, ...]:
    """The blocks of a cohort, grouped by the devices that hold them; rare blocks are left out.

    Raises:
        LayoutMismatch: a layout is no part of the full one.
    """
    holders: dict[int, list[int]] = {}
    for device, name in enumerate(sorted(layouts)):
        for block, _, _ in layouts[name].positions_in(full):
            holders.setdefault(block, []).append(device)
    groups: dict[tuple[int, ...], list[int]] = {}
    for block, found in sorted(holders.items()):
        if len(found) >= smallest_class:
            groups.setdefault(tuple(found), []).append(block)
    return tuple(
        MaskClass(holders=found, blocks=tuple(blocks), sizes=tuple(full.sizes[b] for b in blocks))
        for found, blocks in groups.items()
    )


def summable_classes(
    full: AdapterLayout,
    layouts: Mapping[str, AdapterLayout],
    smallest_cohort: int,
    smallest_class: int,
) -> tuple[MaskClass, ...]:
    """The mask classes of a cohort, of which there is one at least: see `mask_classes`.

    Raises:
        ConfigError: the cohort is too small or too large, or no block has enough holders.
    """
    if not smallest_cohort <= len(layouts) <= MAX_DEVICES:
        raise ConfigError(
            f"secure aggregation: {len(layouts)} devices, from {smallest_cohort} to {MAX_DEVICES} "
            "can be; ask more of them, or fewer, at a time (federation.cohort_size)"
        )
    classes = mask_classes(full, layouts, smallest_class)
    if not classes:
        raise ConfigError(
            f"secure aggregation: no block with {smallest_class} holders among {len(layouts)} "
            "devices; use another cohort, or plans that share experts (extract.templates)"
        )
    return classes


def terms_for(
    full: AdapterLayout,
    layouts: Mapping[str, AdapterLayout],
    *,
    run: str,
    round: int,  # noqa: A002  the word for it everywhere else, too
    attempt: int,
    base: str,
    clip_norm: float | None,
    smallest_cohort: int,
    smallest_class: int,
    threshold: Threshold = Threshold.TWO_THIRDS,
    value_range: float | None = None,
) -> Terms:
    """The terms of one attempt with this cohort; the words are as narrow as precision allows.

    Args:
        full: layout of the full adapter.
        layouts: {device: its layout}.
        clip_norm: largest norm of an update; None for whole numbers, which stay exact. Those are
            noised before they are masked, and only what fits into a word bounds them.
        value_range: largest number of an update to expect, from earlier rounds; None takes what
            the clip norm implies.

    Raises:
        ConfigError: see `summable_classes`.
    """
    classes = summable_classes(full, layouts, smallest_cohort, smallest_class)
    bits: WordBits = 32
    if clip_norm is None:
        value_range = FixedPoint(bits, len(layouts), 1.0).levels  # so that a step is 1
        clip_norm = value_range * max(layout.size for layout in layouts.values()) ** 0.5
    else:
        smallest = min(layout.size for layout in layouts.values())
        value_range = value_range or range_for(clip_norm, smallest)
        bits = word_bits_for(len(layouts), value_range, RESOLUTION * clip_norm / smallest**0.5)
    return Terms(
        run=run,
        round=round,
        attempt=attempt,
        base=base,
        layout=full.digest,
        devices=tuple(sorted(layouts)),
        classes=classes,
        threshold=threshold,
        smallest_cohort=smallest_cohort,
        smallest_class=smallest_class,
        clip_norm=clip_norm,
        value_range=value_range,
        word_bits=bits,
    )


def contribution(
    full: AdapterLayout, layout: AdapterLayout, update: Tensor, weight: float = 1.0
) -> Contribution:
    """One device's update (its own P) as it goes into the sum; `weight` is from 0 to 1.

    An fp64 update keeps its precision, so that whole numbers stay whole.

    Raises:
        LayoutMismatch: the update is not in this layout, or the layout no part of the full one.
    """
    layout.require(update)
    sizes = {block: stop - start for block, start, stop in layout.positions_in(full)}
    weights = np.full(len(sizes), weight, dtype=np.float32)
    numbers = update if update.dtype == torch.float64 else update.float()
    return Contribution(sizes, numbers.numpy(), weights)


class SecureSum:
    """The coordinator's part of one attempt, whose outcome is a `BlockSum` like any other.

    Args:
        full: layout of the full adapter.
        terms: from `terms_for` with the same layout.
        directory: of the devices' identity keys.
        threads: for unmasking.

    Raises:
        LayoutMismatch: the terms are for another layout.
    """

    def __init__(
        self, full: AdapterLayout, terms: Terms, directory: Directory, threads: int = 1
    ) -> None:
        if terms.layout != full.digest:
            raise LayoutMismatch("terms of secure aggregation for another adapter layout")
        self._full, self._terms = full, terms
        self.coordinator = Coordinator(terms, directory, threads)
        self.notice = NOTICE.format(least=terms.smallest_class)

    def sum(self) -> BlockSum:
        """The sum over the survivors; to be called when the attempt is over.

        Raises:
            ProtocolError: everything stayed masked; the message says why.
        """
        result = self.coordinator.result
        if not result.sums:
            raise ProtocolError(f"nothing could be unmasked: {result.masked}")
        total = torch.zeros(self._full.size, dtype=torch.float64)
        weight = torch.zeros(len(self._full.blocks), dtype=torch.float64)
        for found in result.sums:
            blocks = self._terms.classes[found.number].blocks
            weight[list(blocks)] = torch.from_numpy(found.weights)
            for block, values in zip(blocks, found.values, strict=True):
                span = slice(self._full.bounds[block], self._full.bounds[block + 1])
                total[span] = torch.from_numpy(values)
        return BlockSum(total, weight, len(result.survivors))
