"""★ Differential privacy for whole devices: what is clipped, where noise is added, and how much.

One `Mechanism` per round has both halves. The local half, on the device, clips the update to the
clip norm C over all blocks together, so that holding more experts buys no more influence, and puts
it on a grid of whole steps. The central half takes the sum of all that and makes it fit to be
shown. Noise is discrete Gaussian of standard deviation z·C on the sum, z the noise multiplier:

| mode | who adds it | who must be trusted |
|---|---|---|
| clip_only | nobody; there is no epsilon | the coordinator, and every reader of the model |
| central | the coordinator, once | the coordinator |
| distributed | every device a share, under the masks | that enough devices are honest |
| local | every device all of it | nobody |

Shares are scaled so that the noise is whole even if the tolerated part of a block's holders drops
out, or tells its share to the coordinator; the sum of a block that lost more is refused.

What is protected: whether a device's update went into a sum or nothing did in its place. Who took
part, and who holds which experts, counts as known, and so do the numbers of holders.

Why a grid: floating-point noise is not the noise that the theorems are about (Mironov 2012). On it,
rounding is towards zero, so norms stay within C exactly. Sums of discrete Gaussian shares are not
quite discrete Gaussian; for shares of variance v the difference is below 10·exp(−π²·v) per
coordinate (Kairouz, Liu, Steinke 2021), nothing at all from `LEAST_VARIANCE` on.

Adaptive clipping follows a quantile of the norms (Andrew et al. 2021): each device adds a bit,
whether its update was within C, and the noised count of these moves C. The count is a release too,
and z covers both: z⁻² = z_update⁻² + (2·count_noise)⁻².
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from proxymoe.common.discrete_gaussian import Bits, Steps, sample
from proxymoe.common.errors import ConfigError, Diverged, ProtocolError

Numbers = NDArray[np.float64]
CLIP_STEPS = 1 << 20
"""Default number of grid steps in C; far finer than any noise that protects."""
MOST_CLIP_STEPS = 1 << 26
"""Sums of squares of that many steps are still exact."""
COUNT_STEPS = 1 << 12
"""Grid steps of one device in the count."""
LEAST_VARIANCE = 16
"""In steps²: coarser noise is not what the theorems are about."""
ROUNDING = 1.0 - 2.0**-24
"""Covers what computing a norm in fp64 may lose."""


class Mode(StrEnum):
    """Who adds the noise; see the table above."""

    CLIP_ONLY = "clip_only"
    CENTRAL = "central"
    DISTRIBUTED = "distributed"
    LOCAL = "local"


class Span(NamedTuple):
    """A stretch of an update vector that the same number of devices hold."""

    size: int
    """Numbers."""
    holders: int
    """Devices of the cohort that hold it; or that answered, where this is said."""


@dataclass(frozen=True, slots=True)
class Protected:
    """What leaves the device: a clipped update in grid steps, with noise if the mode says so."""

    steps: Steps
    """(P,)."""
    count: int | None
    """Whether the update was within C, ±½ in `COUNT_STEPS`; None without adaptive clipping."""


@dataclass(frozen=True, slots=True)
class Released:
    """A sum that may be shown."""

    total: Numbers
    """(P,) Σ update, noised."""
    share_within: float | None
    """Share of the updates that were within C, 0 to 1; None if it was not counted, or is short."""
    withheld: tuple[int, ...]
    """Spans whose noise is not whole, for too few holders answered; zero in the total."""


@dataclass(frozen=True)
class Mechanism:
    """Clipping and noise of one round; every device and the coordinator have the same.

    Raises:
        ConfigError: no noise in a mode that promises some, or too coarse a grid for it.
    """

    mode: Mode
    clip_norm: float
    noise_multiplier: float = 0.0
    """z, of the sum and the count together."""
    count_noise: float | None = None
    """Standard deviation on the count, in devices; None counts nothing."""
    tolerated_dropouts: float = 0.0
    clip_steps: int = CLIP_STEPS

    def __post_init__(self) -> None:
        if not (0 < self.clip_norm < math.inf and 1 <= self.clip_steps <= MOST_CLIP_STEPS):
            raise ConfigError(
                f"clip norm {self.clip_norm} in {self.clip_steps} steps: it must be positive and "
                f"finite, in at most {MOST_CLIP_STEPS}"
            )
        z, count = self.noise_multiplier, self.count_noise
        if self.mode is Mode.CLIP_ONLY:
            return
        if not 0 < z < math.inf:
            raise ConfigError(f"noise multiplier {z} in mode {self.mode}: must be above 0")
        if count is not None and not 2 * count > z:
            raise ConfigError(
                f"count noise of {count:.3g} devices with noise multiplier {z:.3g}: half of that "
                "would go into the count alone; raise count_noise, or use a fixed clip norm"
            )

    @cached_property
    def update_noise(self) -> float:
        """Noise multiplier of the update alone: more than z if a count is released beside it."""
        if self.mode is Mode.CLIP_ONLY or self.count_noise is None:
            return self.noise_multiplier
        return 1 / math.sqrt(self.noise_multiplier**-2 - (2 * self.count_noise) ** -2)

    @property
    def step(self) -> float:
        """What one step of the grid stands for."""
        return self.clip_norm / self.clip_steps

    def needed(self, holders: int) -> int:
        """How many of so many holders must answer for the noise to be whole."""
        if self.mode is not Mode.DISTRIBUTED:
            return 1
        return max(1, holders - math.floor(holders * self.tolerated_dropouts))

    def protect(
        self, update: NDArray[np.floating], bits: Bits, spans: Sequence[Span], cohort_size: int
    ) -> Protected:
        """The local half: the update (P,), clipped, on the grid, and noised if the mode says so.

        Args:
            update: finite numbers.
            bits: fresh random bytes; `secrets.token_bytes`.
            spans: how many devices hold what, in the order of the vector.
            cohort_size: devices that are asked, this one included.

        Raises:
            Diverged: the update is not finite.
            ConfigError: the grid is too coarse or too fine for the noise.
        """
        steps, is_within = self.clipped(update)
        count = None if self.count_noise is None else (2 * is_within - 1) * COUNT_STEPS // 2
        if self.mode in (Mode.DISTRIBUTED, Mode.LOCAL):
            _check(spans, steps.size)
            for holders in {span.holders for span in spans}:
                mine = np.repeat([s.holders == holders for s in spans], [s.size for s in spans])
                steps[mine] += self.share(int(mine.sum()), holders, bits)
            count = self._with_noise(count, cohort_size, bits)
        return Protected(steps, count)

    def release(
        self,
        total: Protected,
        bits: Bits,
        asked: Sequence[Span],
        answered: Sequence[Span],
        cohort_size: int,
        num_answered: int,
    ) -> Released:
        """The central half: a sum over devices, noised if the mode says so.

        What it costs must be on record before (`server.spending`), and every call draws new noise:
        keep what it returns, and never release a sum twice.

        Args:
            total: sums of steps and of counts.
            bits: fresh random bytes; `secrets.token_bytes`.
            asked: how many devices of the cohort hold what.
            answered: how many of these are in the sum.
            cohort_size, num_answered: the same, of the devices.
        """
        _check(asked, total.steps.size)
        pairs = zip(asked, answered, strict=True)
        short = [b.holders < self.needed(a.holders) for a, b in pairs]
        steps = np.where(np.repeat(short, [span.size for span in asked]), 0, total.steps)
        count = total.count if num_answered >= self.needed(cohort_size) else None
        if self.mode is Mode.CENTRAL:
            variance = self._variance(self.update_noise * self.clip_steps, 1)
            steps += sample(variance, steps.size, bits)
            count = self._with_noise(count, 1, bits)
        share = None if count is None else min(max(count / COUNT_STEPS / num_answered + 0.5, 0), 1)
        return Released(steps * self.step, share, tuple(np.flatnonzero(short).tolist()))

    def share(self, size: int, holders: int, bits: Bits) -> Steps:
        """What one device adds to so many numbers that `holders` devices hold; maybe nothing."""
        if self.mode not in (Mode.DISTRIBUTED, Mode.LOCAL):
            return np.zeros(size, dtype=np.int64)
        return sample(self._variance(self.update_noise * self.clip_steps, holders), size, bits)

    def clipped(self, update: NDArray[np.floating]) -> tuple[Steps, bool]:
        """The update (P,) in grid steps, at most C long, and whether it was so before.

        Raises:
            Diverged: it is not finite.
        """
        wide = update.astype(np.float64)
        norm = float(np.linalg.norm(wide))
        if not math.isfinite(norm):
            raise Diverged("the update is not finite; nothing was sent")
        scale = self.clip_steps / max(self.clip_norm, norm) * ROUNDING
        return np.trunc(wide * scale).astype(np.int64), norm <= self.clip_norm

    def _with_noise(self, count: int | None, holders: int, bits: Bits) -> int | None:
        if count is None or self.count_noise is None:
            return None
        variance = self._variance(self.count_noise * COUNT_STEPS, holders)
        return count + int(sample(variance, 1, bits)[0])

    def _variance(self, deviation: float, holders: int) -> int:
        """In steps², rounded up: of one device's share, or of all the noise if it is not shared."""
        variance = math.ceil(deviation**2 / self.needed(holders))
        if variance < LEAST_VARIANCE:
            raise ConfigError(
                f"noise of variance {variance} steps² on this grid, at least {LEAST_VARIANCE} are "
                "needed; raise clip_steps or the noise multiplier"
            )
        return variance


def _check(spans: Sequence[Span], size: int) -> None:
    if sum(span.size for span in spans) != size:
        raise ProtocolError(f"spans of {sum(s.size for s in spans)} numbers for a vector of {size}")
