"""What noise is worth: the epsilon of what was released, and the noise for an epsilon.

Epsilon is what `dp-accounting` computes; it is loaded when it is first needed, for devices do
without. Claims are no stronger than what was done:

- Cohorts that are dealt, or taken as devices come, give no amplification. A device that took part
  in k rounds of noise multiplier z has been released k times, whoever else was there. Gaussian
  releases add up as Σ z⁻², so one number per device is all there is to keep.
- Only a cohort that every device of a fixed population enters by its own coin (`poisson_cohort`)
  is Poisson-sampled. Then every device spends in every round, asked or not, and those who do not
  answer count as zeros: sums are divided by the expected number, and noise is never reduced.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from proxymoe.common.discrete_gaussian import Bits
from proxymoe.common.errors import ConfigError

Accountant = Literal["rdp", "pld"]
LEAST_NOISE, MOST_NOISE = 0.02, 1e5
"""Noise multipliers between which `noise_for` looks."""
PRECISION = 1e-3
"""Relative: noise may be this much more than an epsilon needs."""


@dataclass(frozen=True, slots=True)
class Cohort:
    """Devices of a round, and what may be said about how they were chosen."""

    devices: tuple[str, ...]
    probability: float | None = None
    """That of a device to be in it, if each was decided for on its own; `poisson_cohort` only."""


def poisson_cohort(population: Sequence[str], probability: float, bits: Bits) -> Cohort:
    """A cohort that every device enters with this probability, independently; it may be empty.

    Args:
        population: all devices of the run, whether or not they can be reached now.
        probability: at least 2⁻³²; what it is rounded down to does not matter.
        bits: fresh random bytes; `secrets.token_bytes`.

    Raises:
        ConfigError: no probability.
    """
    if not 2.0**-32 <= probability <= 1:
        raise ConfigError(f"sampling probability {probability}: from 2^-32 to 1")
    draws = np.frombuffer(bits(8 * len(population)), "<u8") >> np.uint64(11)
    chosen = draws < np.uint64(math.floor(probability * (1 << 53)))
    names = [name for name, is_in in zip(population, chosen, strict=True) if is_in]
    return Cohort(tuple(sorted(names)), probability)


@dataclass(frozen=True, slots=True)
class Exposure:
    """All that was released about one device."""

    inverse_squares: float = 0.0
    """Σ z⁻² over the rounds that it took part in, of those without sampling."""
    sampled: Mapping[tuple[float, float], int] = field(default_factory=dict)
    """{(z, probability): rounds} of Poisson-sampled rounds, whether or not it was asked."""

    def after(
        self, noise_multiplier: float, probability: float | None = None, times: int = 1
    ) -> "Exposure":
        """This and so many more rounds; without noise, nothing is left to count."""
        if noise_multiplier <= 0:
            return Exposure(math.inf, self.sampled)
        if probability is None:
            return Exposure(self.inverse_squares + times * noise_multiplier**-2, self.sampled)
        key = noise_multiplier, probability
        return Exposure(
            self.inverse_squares, {**self.sampled, key: self.sampled.get(key, 0) + times}
        )


def epsilon_of(exposure: Exposure, delta: float, accountant: Accountant = "rdp") -> float:
    """Epsilon of everything together, at this delta; infinite where there was no noise.

    Raises:
        ConfigError: `dp-accounting` is not installed.
    """
    if math.isinf(exposure.inverse_squares):
        return math.inf
    library, single = _library(), exposure.inverse_squares
    events = [
        library.SelfComposedDpEvent(
            library.PoissonSampledDpEvent(probability, library.GaussianDpEvent(z)), rounds
        )
        for (z, probability), rounds in exposure.sampled.items()
    ]
    if not events:
        if single == 0:
            return 0.0
        if accountant == "pld":  # whose limit has a closed form
            return float(library.get_epsilon_gaussian(single**-0.5, delta))
    if single:
        events.append(library.GaussianDpEvent(single**-0.5))
    if accountant == "pld":
        counter = library.pld.PLDAccountant()
    else:
        # Fractional orders are for low noise; of a sampled Gaussian they are not exact.
        orders = [*range(2, 65), 80, 96, 128, 192, 256] if exposure.sampled else None
        counter = library.rdp.RdpAccountant(orders)
    return float(counter.compose(library.ComposedDpEvent(events)).get_epsilon(delta))


def noise_for(
    epsilon: float,
    delta: float,
    times: int,
    probability: float | None = None,
    accountant: Accountant = "rdp",
) -> float:
    """The noise multiplier with which so many rounds cost at most this epsilon, and hardly less.

    Raises:
        ConfigError: none does, or `dp-accounting` is not installed.
    """

    def fits(z: float) -> bool:
        return epsilon_of(Exposure().after(z, probability, times), delta, accountant) <= epsilon

    low = high = 1.0
    while not fits(high) and high < MOST_NOISE:
        low, high = high, 2 * high
    while fits(low) and low > LEAST_NOISE:
        low, high = low / 2, low
    if not fits(high):
        raise ConfigError(
            f"epsilon {epsilon} at delta {delta}: out of reach for {times} rounds with any useful "
            "noise; promise more, or run fewer rounds"
        )
    while high > low * (1 + PRECISION):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def gaussian_epsilon(inverse_squares: float, delta: float) -> float:
    """Epsilon of unsampled releases with noise multipliers z₁, z₂, …, given Σ z⁻²; no library.

    Concentrated differential privacy, ρ = ½ Σ z⁻², converted as Canonne, Kamath and Steinke do
    (2020, proposition 12). It is what a device can work out by itself, and holds for discrete
    noise.
    """
    if not 0 < inverse_squares < math.inf:
        return inverse_squares
    rho = inverse_squares / 2

    def bound(log_order: float) -> float:
        spare = math.exp(log_order)  # the order is 1 above it
        order = 1 + spare
        rest = (math.log(1 / delta) - math.log(order)) / spare
        return order * rho + math.log(spare / order) + rest

    # Every order gives a bound; the best one is at the foot of the curve.
    low, high, golden = math.log(1e-4), math.log(1e8), (math.sqrt(5) - 1) / 2
    for _ in range(100):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if bound(left) < bound(right):
            high = right
        else:
            low = left
    return max(0.0, bound(low))


def _library() -> Any:
    try:
        import dp_accounting  # noqa: PLC0415  seconds to load, and not on devices
        import dp_accounting.pld  # noqa: PLC0415
        import dp_accounting.rdp  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            "epsilon is computed by `dp-accounting`, which is not installed: "
            'pip install "proxymoe[server]", or use mode "clip_only"'
        ) from error
    return dp_accounting
