"""The price of privacy, known before a run: what it promises, and what noise does to learning.

A mean of n updates, each at most C long, is at most C long. Noise of z·C on every one of d numbers
of their sum has a norm of z·C·√d / n in the mean. So there is something to learn only if n ≥ z·√d,
roughly: small cohorts can have privacy with very small adapters, or not at all. A block with fewer
holders than the cohort has the same noise on a smaller sum.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from proxymoe.common.accounting import Exposure, epsilon_of, noise_for
from proxymoe.common.errors import ConfigError
from proxymoe.common.privacy import Mechanism, Mode, Span
from proxymoe.common.privacy_settings import PrivacySettings

ROUNDING = 1e-9
"""Whole numbers are found to this precision."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """A smaller adapter, and what the same noise would do to it."""

    name: str
    size: int
    noise_to_signal: float

    @property
    def is_useful(self) -> bool:
        """Whether there is more to learn than noise, at best."""
        return self.noise_to_signal <= 1


@dataclass(frozen=True, slots=True)
class Price:
    """What a private run costs, known before it starts."""

    mode: Mode
    noise_multiplier: float
    participations: int
    """Most rounds that a device takes part in, if all are asked equally often."""
    epsilon: float
    """For every device, over the whole run; infinite without noise."""
    delta: float
    signal: float
    """Largest possible norm of the mean update: the clip norm."""
    noise: float
    """Expected norm of the noise in it."""
    devices_needed: int
    """Smallest cohort with as much signal as noise."""
    largest_size: int
    """Numbers that an adapter which all devices hold may have with this cohort."""
    alternatives: tuple[Alternative, ...]
    """Of the adapters that were asked about, the largest first."""
    warnings: tuple[str, ...]

    @property
    def noise_to_signal(self) -> float:
        """Above 1, the run is in vain."""
        return self.noise / self.signal

    @property
    def advice(self) -> Alternative | None:
        """The largest of the alternatives that would be useful; None if none is."""
        return next((found for found in self.alternatives if found.is_useful), None)


def price(
    settings: PrivacySettings,
    *,
    rounds: int,
    cohort_size: int,
    num_devices: int,
    clip_norm: float,
    spans: Sequence[Span],
    adapters: Mapping[str, int] | None = None,
) -> Price:
    """What these settings cost, and what they do to what is learned.

    Args:
        settings: what is promised.
        rounds: of the run.
        cohort_size: devices per round; the expected number, if they are sampled.
        num_devices: of the run.
        clip_norm: C, at the start.
        spans: numbers of the adapter, by how many devices of a cohort hold them.
        adapters: {name: numbers} of other adapters, each held by the whole cohort.

    Raises:
        ConfigError: more devices in a cohort than there are; an epsilon out of reach; or
            `dp-accounting` is not installed.
    """
    if not 1 <= cohort_size <= num_devices:
        raise ConfigError(f"cohorts of {cohort_size} devices: there are {num_devices}")
    poisson = cohort_size / num_devices if settings.sampling == "poisson" else None
    times = rounds if poisson else -(-rounds * cohort_size // num_devices)
    z = multiplier_of(settings, times, poisson)
    mechanism = settings.mechanism(clip_norm, cohort_size, z)
    exposure = Exposure().after(z, poisson, times)
    ratio, each = _noise_to_signal(mechanism, spans), _of_all(mechanism, 1, cohort_size)
    others = sorted((adapters or {}).items(), key=lambda pair: -pair[1])
    return Price(
        mode=settings.mode,
        noise_multiplier=z,
        participations=times,
        epsilon=epsilon_of(exposure, settings.delta, settings.accountant),
        delta=settings.delta,
        signal=clip_norm,
        noise=clip_norm * ratio,
        devices_needed=_devices_needed(ratio, cohort_size, settings.mode),
        largest_size=(
            math.floor(each**-2 * (1 + ROUNDING)) if each else sum(span.size for span in spans)
        ),
        alternatives=tuple(
            Alternative(name, size, _of_all(mechanism, size, cohort_size)) for name, size in others
        ),
        warnings=_warnings(settings, num_devices, cohort_size),
    )


def multiplier_of(settings: PrivacySettings, times: int, poisson: float | None = None) -> float:
    """The noise multiplier of a device that takes part so many times; 0 without noise.

    Raises:
        ConfigError: an epsilon out of reach, or `dp-accounting` is not installed.
    """
    if settings.epsilon is None:
        return settings.noise_multiplier or 0.0
    return noise_for(settings.epsilon, settings.delta, times, poisson, settings.accountant)


def unkept(settings: PrivacySettings, *modes: Mode) -> str:
    """Why rounds with dealt cohorts, a fixed clip norm and these modes cannot keep it, or ""."""
    if settings.mode in modes and settings.sampling == "none" and not settings.adaptive:
        return ""
    return (
        f"privacy.mode {settings.mode}, sampling {settings.sampling}, adaptive "
        f"{settings.adaptive}: cohorts are dealt here, the clip norm is fixed, and modes are "
        f"{', '.join(modes)}"
    )


def _noise_to_signal(mechanism: Mechanism, spans: Sequence[Span]) -> float:
    """Expected norm of the noise in the mean update, in units of the clip norm."""
    everybody_adds = mechanism.mode in (Mode.LOCAL, Mode.DISTRIBUTED)
    variance = 0.0
    for size, holders in spans:
        if holders:
            shares = holders / mechanism.needed(holders) if everybody_adds else 1.0
            variance += size * shares / holders**2
    return mechanism.update_noise * math.sqrt(variance)


def _of_all(mechanism: Mechanism, size: int, cohort_size: int) -> float:
    """The same, for an adapter of that many numbers which the whole cohort holds."""
    return _noise_to_signal(mechanism, [Span(size, cohort_size)])


def _devices_needed(noise_to_signal: float, cohort_size: int, mode: Mode) -> int:
    """Noise on a mean falls with the cohort, or with its root where everybody adds all of it."""
    factor = noise_to_signal**2 if mode is Mode.LOCAL else noise_to_signal
    return max(1, math.ceil(cohort_size * factor * (1 - ROUNDING)))


def _warnings(settings: PrivacySettings, num_devices: int, cohort_size: int) -> tuple[str, ...]:
    if settings.mode is Mode.CLIP_ONLY:
        return ("no noise: updates are clipped, and there is no formal guarantee",)
    found = []
    if settings.delta * num_devices >= 1:
        found.append(
            f"delta {settings.delta} for {num_devices} devices would allow to give one away whole; "
            f"take one below {1 / num_devices:.1g}"
        )
    if settings.mode is Mode.DISTRIBUTED and settings.tolerated_dropouts * cohort_size < 1:
        found.append(f"not one of {cohort_size} devices may drop out; raise tolerated_dropouts")
    return tuple(found)
