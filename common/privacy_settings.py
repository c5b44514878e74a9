"""What a run promises of privacy, as settings, and what a task says of it to a device.

The mechanism behind both is `privacy`; a device computes for itself what taking part costs.
"""

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from proxymoe.common.fixed_point import FixedPoint
from proxymoe.common.privacy import CLIP_STEPS, MOST_CLIP_STEPS, Mechanism, Mode
from proxymoe.common.section import Section

COUNT_SHARE = 20
"""By default the noise on the count is one device in this many (Andrew et al. 2021)."""


NOISE_RANGE = 12.0
"""Noise beyond so many standard deviations is never drawn."""


class PrivacySettings(Section):
    """How much privacy a run promises, and by which means."""

    mode: Mode = Mode.CLIP_ONLY
    noise_multiplier: float | None = Field(default=None, gt=0, le=1e4)
    """z, if it is given rather than the epsilon."""
    epsilon: float | None = Field(default=None, gt=0, le=1e3)
    """What a run may spend on any device; z follows from it."""
    delta: float = Field(default=1e-5, gt=0, lt=1)
    accountant: Literal["rdp", "pld"] = "rdp"
    """`rdp` is proven for discrete noise, `pld` tighter, for the continuous noise it tends to."""
    sampling: Literal["none", "poisson"] = "none"
    """`poisson` only where cohorts really come from `accounting.poisson_cohort`."""
    tolerated_dropouts: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of a block's holders that may drop out or collude; `distributed` only."""
    adaptive: bool = False
    """Whether the clip norm follows this quantile of the updates' norms."""
    quantile: float = Field(default=0.5, gt=0, lt=1)
    clip_rate: float = Field(default=0.2, gt=0, le=1)
    """Natural logarithm of the largest factor by which a round moves the clip norm."""
    count_noise: float | None = Field(default=None, gt=0)
    """Standard deviation on the count, in devices; None is a twentieth of the cohort."""
    smallest_clip_norm: float = Field(default=1e-2, gt=0)
    largest_clip_norm: float = Field(default=30.0, gt=0)

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        given = [value for value in (self.noise_multiplier, self.epsilon) if value is not None]
        if len(given) != (self.mode is not Mode.CLIP_ONLY):
            raise ValueError(
                f"mode {self.mode} with {len(given)} of noise_multiplier and epsilon: give one of "
                "them, or none with clip_only"
            )
        if self.sampling == "poisson" and self.mode is not Mode.CENTRAL:
            raise ValueError(
                f"poisson sampling in mode {self.mode}: it hides nothing from a coordinator, who "
                'knows whom it asked; use mode "central", or sampling "none"'
            )
        if (low := self.smallest_clip_norm) > (high := self.largest_clip_norm):
            raise ValueError(f"smallest_clip_norm {low} is above largest_clip_norm {high}")
        return self

    def mechanism(
        self,
        clip_norm: float,
        cohort_size: int,
        noise_multiplier: float = 0.0,
        clip_steps: int = CLIP_STEPS,
    ) -> "Mechanism":
        """The mechanism of a round.

        Args:
            clip_norm: C of this round.
            cohort_size: devices that are asked.
            noise_multiplier: z; of a promised epsilon, from `accounting.noise_for`.
            clip_steps: steps of the grid in C; secure aggregation has its own.

        Raises:
            ConfigError: noise that cannot be, see `Mechanism`.
        """
        exact = self.mode is Mode.CLIP_ONLY
        count_noise = 0.0 if exact else self.count_noise or cohort_size / COUNT_SHARE
        return Mechanism(
            mode=self.mode,
            clip_norm=clip_norm,
            noise_multiplier=0.0 if exact else self.noise_multiplier or noise_multiplier,
            count_noise=count_noise if self.adaptive else None,
            tolerated_dropouts=self.tolerated_dropouts,
            clip_steps=clip_steps,
        )

    def next_clip_norm(self, clip_norm: float, share_within: float | None) -> float:
        """C of the next round, given the share of updates within C, from `Released`."""
        if not self.adaptive or share_within is None:
            return clip_norm
        moved = clip_norm * math.exp(-self.clip_rate * (share_within - self.quantile))
        return min(max(moved, self.smallest_clip_norm), self.largest_clip_norm)


class Noise(BaseModel):
    """The noise in the sum of a round, as its tasks tell it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mode: Literal[Mode.CENTRAL, Mode.DISTRIBUTED, Mode.LOCAL]
    noise_multiplier: float = Field(gt=0, le=1e4)
    delta: float = Field(gt=0, lt=1)
    tolerated_dropouts: float = Field(ge=0, lt=1)
    clip_steps: int = Field(ge=1, le=MOST_CLIP_STEPS)

    def mechanism(self, clip_norm: float) -> Mechanism:
        """The mechanism of a round with this clip norm.

        Raises:
            ConfigError: noise that cannot be, see `Mechanism`.
        """
        return Mechanism(
            mode=self.mode,
            clip_norm=clip_norm,
            noise_multiplier=self.noise_multiplier,
            tolerated_dropouts=self.tolerated_dropouts,
            clip_steps=self.clip_steps,
        )

    def cost(self, before: float) -> float:
        """The epsilon that one more round adds, after rounds with Σ z⁻² = `before`.

        Zero-concentrated differential privacy adds up as ρ = ½ Σ z⁻², and ε = ρ + 2·√(ρ·ln 1/δ)
        holds for it (Bun and Steinke 2016, propositions 1.3 and 1.6): more than an accountant
        would find, and it takes none.
        """
        after = before + self.noise_multiplier**-2
        return _epsilon(after, self.delta) - _epsilon(before, self.delta)


def steps_under_masks(num_devices: int, noise_multiplier: float) -> int:
    """Steps of the grid with which the words of so many devices hold any noise that is drawn."""
    levels = FixedPoint(32, num_devices, 1.0).levels
    return min(CLIP_STEPS, int(levels / (1 + NOISE_RANGE * noise_multiplier)))


def _epsilon(inverse_squares: float, delta: float) -> float:
    rho = inverse_squares / 2
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))
