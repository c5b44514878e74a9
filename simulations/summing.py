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
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from proxymoe.common.accounting import epsilon_of
from proxymoe.common.errors import ConfigError
from proxymoe.common.experiment import Experiment
from proxymoe.common.price import Price, price, unkept
from proxymoe.common.privacy import CLIP_STEPS, Mode, Span
from proxymoe.common.privacy_settings import steps_under_masks
from proxymoe.server import spending
from proxymoe.server.aggregate import PlainSum, Summation
from proxymoe.server.private_sum import PrivateSum, budget_of, release_of
from proxymoe.server.round import Federation
from proxymoe.simulations.secure import MaskedSum

SPENT = "privacy.db"


def require_summable(experiment: Experiment) -> None:
    """Raises ConfigError if the experiment wants sums that a simulation cannot make."""
    if told := unkept(experiment.privacy, *Mode):
        raise ConfigError(told)
    asked = experiment.federation.cohort_size
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
        inner: Summation = PlainSum(federation.layout, federation.settings.fewest_holders)
        if self.experiment.secure:
            clip_norm = federation.settings.clip_norm if noiseless else None
            smallest = self.experiment.smallest_sum
            inner = MaskedSum(federation.layout, clip_norm, smallest, rng)
        if noiseless:
            return inner
        z, steps = self.price.noise_multiplier, CLIP_STEPS
        if self.experiment.secure:  # what a word holds is more than any noise that is drawn
            steps = steps_under_masks(self.cohort_size, z)
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
        privacy, z = self.experiment.privacy, self.price.noise_multiplier
        release = release_of(privacy, self.federation, number, z, names)
        with self._database() as database, database:
            spending.reserve(database, time.time(), release, budget_of(privacy))

    def _database(self) -> contextlib.closing[sqlite3.Connection]:
        assert self.records is not None
        database = sqlite3.connect(self.records / SPENT)
        database.executescript(spending.SCHEMA)
        return contextlib.closing(database)
