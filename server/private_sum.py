"""Sums that may be shown: updates on the grid of `privacy`, noised, and paid for before.

Where devices add noise, their half happens here, too: right in a simulation, which has nobody to
hide them from. A deployment uses `central`, whose local half may be anywhere that is trusted.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from proxymoe.common.adapter import AdapterLayout
from proxymoe.common.errors import ConfigError, ProtocolError
from proxymoe.common.privacy import Mechanism, Protected, Span
from proxymoe.common.privacy_settings import PrivacySettings
from proxymoe.server.aggregate import BlockSum, Summation
from proxymoe.server.round import Federation
from proxymoe.server.spending import Budget, Release

Spend = Callable[[Iterable[str]], None]
"""Told whose updates are about to be released; raises PrivacySpent if they must not be."""
ATTEMPT = 0
"""The only one of a round: a release that is asked for again is the same one."""


def release_of(
    settings: PrivacySettings,
    federation: Federation,
    number: int,
    noise_multiplier: float,
    devices: Iterable[str],
    attempt: int = ATTEMPT,
) -> Release:
    """What round `number` releases about these devices, as `spending.reserve` keeps it."""
    return Release(
        run=federation.run,
        round=number,
        attempt=attempt,
        mode=settings.mode.value,
        clip_norm=federation.settings.clip_norm,
        noise_multiplier=noise_multiplier,
        devices=tuple(sorted(devices)),
    )


def budget_of(settings: PrivacySettings) -> Budget:
    """What is promised to every device; without an epsilon the account is kept all the same."""
    return Budget(settings.epsilon or math.inf, settings.delta, settings.accountant)


class PrivateSum:
    """A `Summation` of updates that are put on the grid and noised as `privacy` says.

    Args:
        full: layout of the full adapter.
        mechanism: of the round.
        inner: adds whole numbers of grid steps, exactly.
        bits: random bytes.
        spend: told whose updates are about to be released; may refuse.
    """

    def __init__(
        self,
        full: AdapterLayout,
        mechanism: Mechanism,
        inner: Summation,
        bits: Callable[[int], bytes],
        spend: Callable[[Iterable[str]], None] = lambda _: None,
    ) -> None:
        self.notice = f"{inner.notice}; {noise_notice(mechanism)}"
        self._full, self._mechanism, self._inner = full, mechanism, inner
        self._bits, self._spend = bits, spend
        self._added: dict[str, tuple[AdapterLayout, Tensor]] = {}

    def add(self, device: str, layout: AdapterLayout, update: Tensor, weight: float) -> None:
        """See `Summation.add`; all weights are 1, for a larger one would buy influence."""
        layout.require(update)
        if device in self._added:
            raise ProtocolError(f"second update of device {device!r} in one round")
        if weight != 1.0:
            raise ConfigError(f"weight {weight} of a private update; all devices weigh 1")
        self._added[device] = layout, update

    def sum(self) -> BlockSum:
        """See `Summation.sum`; what the price of this is, is on record before it is drawn.

        Raises:
            PrivacySpent: a device would spend more than it was promised.
        """
        self._spend(self._added)
        count = len(self._added)
        held = {n: layout.positions_in(self._full) for n, (layout, _) in self._added.items()}
        holders = np.zeros(len(self._full.blocks), dtype=np.int64)
        for places in held.values():
            holders[[block for block, _, _ in places]] += 1
        for name in sorted(self._added):
            layout, update = self._added[name]
            spans = [Span(end - start, int(holders[block])) for block, start, end in held[name]]
            mine = self._mechanism.protect(update.numpy(), self._bits, spans, count)
            self._inner.add(name, layout, torch.from_numpy(mine.steps.astype(np.float64)), 1.0)
        found, bits = self._inner.sum(), self._bits
        return released(self._full, self._mechanism, found, holders, count, bits)


def noise_notice(mechanism: Mechanism) -> str:
    """What is added to a sum, and by whom, for its `Summation.notice`."""
    return f"{mechanism.mode} noise of {mechanism.update_noise:.3g} C"


def released(
    full: AdapterLayout,
    mechanism: Mechanism,
    found: BlockSum,
    holders: np.ndarray,
    count: int,
    bits: Callable[[int], bytes],
) -> BlockSum:
    """A sum of grid steps as it may be shown: in numbers, with the coordinator's noise if any.

    Args:
        full: layout of the full adapter.
        mechanism: of the round.
        found: over those who answered.
        holders: (blocks,) devices that were asked and hold the block.
        count: devices that were asked.
        bits: random bytes.
    """
    sizes, weight = full.sizes, found.weight.round()
    shown = mechanism.release(
        Protected(np.rint(found.total.numpy()).astype(np.int64), None),
        bits,
        [Span(size, int(n)) for size, n in zip(sizes, holders, strict=True)],
        [Span(size, int(n)) for size, n in zip(sizes, weight.tolist(), strict=True)],
        count,
        found.num_devices,
    )
    weight[list(shown.withheld)] = 0.0
    # Where nobody's update went in there is no mean, and noise alone would not be one.
    known = (weight > 0).repeat_interleave(torch.tensor(sizes))
    return replace(found, total=torch.from_numpy(shown.total) * known, weight=weight)
