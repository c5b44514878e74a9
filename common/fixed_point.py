"""Numbers as fixed-point words, so that sums are exact and masks can hide them.

A word is a residue modulo 2^bits. One device's number x becomes the integer x · levels / range,
rounded up or down at random so that it is right on average, and negative numbers are counted down
from the modulus. `levels` is the largest number for which the sum over all devices cannot wrap
around: n · levels < 2^(bits - 1). That is the headroom, and it holds by construction.

Precision. Rounding adds an error of variance at most ¼ and on average ⅙ of (range / levels)² per
device. Relative to updates of standard deviation σ the error of a sum is about
0.41 · range / (levels · σ), for any number of devices: 24-bit words and 32 devices give 18 bits per
number, so a range of 12 σ costs 1.9e-5.

The range must be chosen before anyone knows the numbers. An update of norm C has P numbers of root
mean square C/√P, and by Chebyshev at most one in k² exceeds k times that: `range_for` takes k = 12.
What lies outside saturates and is counted on the device.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from proxymoe.common.errors import ConfigError, ProtocolError

SPREAD = 12.0
"""Range in units of the largest root mean square of an update; see above."""
MIN_LEVELS = 1 << 14
"""Coarser steps than this would be heard in the model."""

WordBits = Literal[24, 32]
Words = np.ndarray[tuple[int], np.dtype[np.uint32]]
Numbers = np.ndarray[tuple[int], np.dtype[np.float64]]
Floats = np.ndarray[tuple[int], np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """The encoding of one round, the same for all devices.

    Raises:
        ConfigError: the numbers leave too little precision, or are no numbers.
    """

    word_bits: WordBits
    num_devices: int
    """Most devices whose words are summed."""
    value_range: float
    """Largest absolute number; what is beyond saturates."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value_range) and self.value_range > 0):
            raise ConfigError(f"value range {self.value_range}: must be positive and finite")
        if self.num_devices < 1 or self.levels < MIN_LEVELS:
            raise ConfigError(
                f"{self.word_bits}-bit words for {self.num_devices} devices: {MIN_LEVELS} levels "
                "are the least; use wider words or smaller cohorts"
            )

    @property
    def levels(self) -> int:
        """The integer that stands for the largest number, and for a weight of 1."""
        return ((1 << (self.word_bits - 1)) - 1) // max(self.num_devices, 1)

    @property
    def step(self) -> float:
        """Distance between two numbers that words can tell apart."""
        return self.value_range / self.levels

    def encode(
        self, values: Floats | Numbers, weight: float, rng: np.random.Generator
    ) -> tuple[Words, int]:
        """The words of `weight` · values, and how many values saturated.

        Args:
            values: (P,) finite.
            weight: from 0 to 1; saturation comes before weighing.
            rng: decides which way each number is rounded; whole numbers of steps stay.
        """
        wide = values.astype(np.float64)
        saturated = int(np.count_nonzero(np.abs(wide) > self.value_range))
        np.clip(wide, -self.value_range, self.value_range, out=wide)
        wide *= weight * self.levels / self.value_range
        lower = np.floor(wide)
        # Not floor(wide + random): that lifts large whole numbers now and then.
        wide = lower + (rng.random(wide.size) < wide - lower)
        # Rounding up beyond the last level would eat headroom; it can only happen by an ulp.
        np.clip(wide, -self.levels, self.levels, out=wide)
        return _residues(wide), saturated

    def encode_weights(self, weights: Floats) -> Words:
        """The words of weights from 0 to 1, to the nearest level."""
        return _residues(np.rint(weights.astype(np.float64) * self.levels))

    def decode(self, total: Words) -> Numbers:
        """The sum of numbers that a sum of words stands for."""
        return self.signed(total) * self.step

    def decode_weights(self, total: Words) -> Numbers:
        """The sum of weights that a sum of words stands for."""
        return self.signed(total) / self.levels

    def signed(self, total: Words) -> Numbers:
        """The integers between -2^(bits - 1) and 2^(bits - 1) that the words stand for."""
        shift = np.uint32(32 - self.word_bits)
        return ((total << shift).view(np.int32) >> shift.astype(np.int32)).astype(np.float64)


def range_for(clip_norm: float, num_values: int) -> float:
    """A range that nearly all numbers of an update of that norm fit into."""
    return min(SPREAD / math.sqrt(num_values), 1.0) * clip_norm


def word_bits_for(num_devices: int, value_range: float, resolution: float) -> WordBits:
    """The narrowest words whose step is at most `resolution`, or the widest there are."""
    return 24 if value_range / (((1 << 23) - 1) // num_devices or 1) <= resolution else 32


def pack(words: Words, bits: WordBits) -> bytes:
    """The words modulo 2^bits, little-endian, bits / 8 bytes each."""
    little = np.ascontiguousarray(words, dtype="<u4")
    return little.view(np.uint8).reshape(-1, 4)[:, : bits // 8].tobytes()


def unpack(content: bytes | memoryview, bits: WordBits) -> Words:
    """The words that `pack` wrote.

    Raises:
        ProtocolError: not a whole number of words.
    """
    width = bits // 8
    if len(content) % width:
        raise ProtocolError(f"{len(content)} bytes are not a whole number of {width}-byte words")
    wide = np.zeros((len(content) // width, 4), dtype=np.uint8)
    wide[:, :width] = np.frombuffer(content, dtype=np.uint8).reshape(-1, width)
    return wide.reshape(-1).view("<u4").astype(np.uint32, copy=False)


def _residues(integers: Numbers) -> Words:
    return integers.astype(np.int64).astype(np.uint32)
