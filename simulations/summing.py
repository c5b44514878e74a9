"""How the rounds of a simulation are summed: in the clear or under masks, with noise or without.

The devices' half of differential privacy happens here, too, when a round's updates are added: a
simulation has nobody to hide them from, and what is released is the same. Masks, noise and rounding
come from the experiment's seed, so that a run that was broken off ends in the bits of one that was
not.
"""

import contextlib
import math
import sqlite3
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from proxymoe.common.accounting import epsilon_of
from proxymoe.common.adapter import AdapterLayout
from proxymoe.common.config import Experiment
from proxymoe.common.errors import ConfigError, ProtocolError
from proxymoe.common.fixed_point import FixedPoint
from proxymoe.common.price import Price, price
from proxymoe.common.privacy import CLIP_STEPS, Mechanism, Mode, Protected, Span
from proxymoe.server import spending
from proxymoe.server.aggregate import BlockSum, PlainSum, Summation
from proxymoe.server.round import Federation
from proxymoe.simulations.secure import MaskedSum

SPENT = "privacy.db"
NOISE_RANGE = 12.0
"""Noise beyond so many standard deviations is never drawn."""
ATTEMPT = 0
"""A simulated round has one; a release that is asked for again is the same one."""


def require_summable(experiment: Experiment) -> None:
    """Raises ConfigError if the experiment wants sums that a simulation cannot make."""
    privacy, asked = experiment.privacy, experiment.federation.cohort_size
    if privacy.sampling != "none" or privacy.adaptive:
        raise ConfigError(
            "privacy.sampling and privacy.adaptive: simulated rounds deal their cohorts and keep "
            'their clip norm; leave them at "none" and false'
        )
    size = min(filter(None, (asked, sum(len(group.names) for group in experiment.devices))))
    if experiment.secure and size < experiment.smallest_sum:
        raise ConfigError(
            f"secure sums over {size} devices: smallest_sum is {experiment.smallest_sum}; raise "
            "federation.cohort_size"
        )


@dataclass(frozen=True)
class Summing:
    """Makes the `Summation` of every round; None for `records` keeps no account of privacy."""

    federation: Federation
    experiment: Experiment
    records: Path | None = None

    def __call__(self, number: int) -> Summation:
        """The summation of round `number`."""
        federation, settings = self.federation, self.experiment.privacy
        noiseless = settings.mode is Mode.CLIP_ONLY
        rng = np.random.default_rng([self.experiment.seed, number])
        inner: Summation = PlainSum(federation.layout)
        if self.experiment.secure:
            clip_norm = federation.settings.clip_norm if noiseless else None
            smallest = self.experiment.smallest_sum
            inner = MaskedSum(federation.layout, clip_norm, smallest, rng)
        if noiseless:
            return inner
        z, steps = self.price.noise_multiplier, CLIP_STEPS
        if self.experiment.secure:  # what a word holds is more than any noise that is drawn
            levels = FixedPoint(32, self.cohort_size, 1.0).levels
            steps = min(steps, int(levels / (1 + NOISE_RANGE * z)))
        mechanism = settings.mechanism(federation.settings.clip_norm, self.cohort_size, z, steps)
        return PrivateSum(
            federation.layout, mechanism, inner, rng.bytes, lambda names: self._spend(number, names)
        )

    @property
    def cohort_size(self) -> int:
        """Devices that take part in a round."""
        most = len(self.federation.members)
        return min(self.federation.settings.cohort_size or most, most)

    @cached_property
    def price(self) -> Price:
        """What the privacy of the whole run costs."""
        full = self.federation.layout
        return price(
            self.experiment.privacy,
            rounds=self.federation.settings.rounds,
            cohort_size=self.cohort_size,
            num_devices=len(self.federation.members),
            clip_norm=self.federation.settings.clip_norm,
            spans=[Span(full.size, self.cohort_size)],
        )

    def summary(self) -> dict[str, Any]:
        """What was kept secret, and what was promised and spent, for `metrics.json`."""
        found, settings = self.price, self.experiment.privacy
        spent = None
        if self.records is not None and settings.mode is not Mode.CLIP_ONLY:
            with self._database() as database:
                exposures = spending.exposures(database).values()
                epsilons = [epsilon_of(e, settings.delta, settings.accountant) for e in exposures]
                spent = max(epsilons, default=0.0)
        return {
            "secure": self.experiment.secure,
            "privacy": {
                "mode": settings.mode.value,
                "noise_multiplier": found.noise_multiplier,
                "epsilon": found.epsilon if math.isfinite(found.epsilon) else None,
                "epsilon_spent": spent,
                "delta": settings.delta,
                "participations": found.participations,
                "noise_to_signal": found.noise_to_signal,
                "devices_needed": found.devices_needed,
                "largest_size": found.largest_size,
                "warnings": list(found.warnings),
            },
        }

    def _spend(self, number: int, names: Iterable[str]) -> None:
        if self.records is None:
            return
        settings = self.experiment.privacy
        release = spending.Release(
            run=self.federation.run,
            round=number,
            attempt=ATTEMPT,
            mode=settings.mode.value,
            clip_norm=self.federation.settings.clip_norm,
            noise_multiplier=self.price.noise_multiplier,
            devices=tuple(sorted(names)),
        )
        budget = spending.Budget(settings.epsilon or math.inf, settings.delta, settings.accountant)
        with self._database() as database, database:
            spending.reserve(database, time.time(), release, budget)

    def _database(self) -> contextlib.closing[sqlite3.Connection]:
        assert self.records is not None
        database = sqlite3.connect(self.records / SPENT)
        database.executescript(spending.SCHEMA)
        return contextlib.closing(database)


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
        self.notice = f"{inner.notice}; {mechanism.mode} noise of {mechanism.update_noise:.3g} C"
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
        return self._released(self._inner.sum(), holders)

    def _released(self, found: BlockSum, holders: np.ndarray) -> BlockSum:
        sizes, count = self._full.sizes, len(self._added)
        weight = found.weight.round()
        released = self._mechanism.release(
            Protected(np.rint(found.total.numpy()).astype(np.int64), None),
            self._bits,
            [Span(size, int(n)) for size, n in zip(sizes, holders, strict=True)],
            [Span(size, int(n)) for size, n in zip(sizes, weight.tolist(), strict=True)],
            count,
            found.num_devices,
        )
        weight[list(released.withheld)] = 0.0
        # Where nobody's update went in there is no mean, and noise alone would not be one.
        known = (weight > 0).repeat_interleave(torch.tensor(sizes))
        return replace(found, total=torch.from_numpy(released.total) * known, weight=weight)
