"""Exact discrete Gaussian noise (Canonne, Kamath, Steinke 2020, arXiv 2004.00010), vectorised.

The discrete Gaussian of variance parameter S lives on the integers, with P(y) ∝ exp(−y² / 2S). A
floating-point Gaussian is not quite the one that was analysed, and its last bits can give a secret
away; what is drawn here has exactly this distribution.

As in the paper's Algorithm 3, proposals come from a discrete Laplace and are thinned. Two questions
are asked of a uniform number u: what is ⌊−t·ln u⌋, and is u < exp(−γ)? They are answered in
floating point where the answer is thousands of times further away than rounding reaches, and
otherwise, which is rare, with as many digits and as many further bits of u as it takes. So the
answer is the exact one, always.

Random bits are an argument: `secrets.token_bytes` in production, a seeded generator's `bytes` in
tests.
"""

import math
from collections.abc import Callable
from decimal import ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from proxymoe.common.errors import ConfigError

Bits = Callable[[int], bytes]
"""That many random bytes."""
Steps = NDArray[np.int64]
Words = NDArray[np.uint64]
Answer = TypeVar("Answer", int, bool)

LARGEST_VARIANCE = 1 << 52
"""Up to here all products of the sampler fit into 64 bits."""
CHUNK = 1 << 15
"""Samples drawn at a time; arrays of that many stay in the cache."""
CLEAR = 2.0**-40
"""Nearer than this to the border of an answer, it is found exactly. Rounding errs below 2⁻⁴⁵."""
FEW = np.uint64(1 << 44)
"""Words below this say too little about ln u, so more of their bits are drawn."""


def sample(variance: int, count: int, bits: Bits) -> Steps:
    """(count,) independent samples of the discrete Gaussian with variance parameter `variance`.

    Their variance is at most that, and from 4 on the difference is below 10⁻²⁰ of it. A sample
    takes about 26 random bytes.

    Raises:
        ConfigError: a variance below 1 or too large for 64-bit arithmetic.
    """
    if not 1 <= variance <= LARGEST_VARIANCE:
        raise ConfigError(
            f"noise of variance {variance} steps²: 1 to 2^52 can be drawn; choose another grid"
        )
    found = np.empty(count, np.int64)
    for start in range(0, count, CHUNK):
        _fill(found[start : start + CHUNK], variance, bits)
    return found


def _fill(found: Steps, variance: int, bits: Bits) -> None:
    """Algorithm 3: proposes until enough are accepted; which ones are left over is no choice."""
    # The scale of the proposals may be any number; near √S fewest are refused.
    scale, filled = 1 << round(math.log2(variance) / 2), 0
    while (missing := found.size - filled) > 0:
        proposals = _laplace(scale, int(1.6 * missing) + 8, bits)
        accepted = proposals[_accepted(proposals, scale, variance, bits)][:missing]
        found[filled : filled + accepted.size] = accepted
        filled += accepted.size


def _laplace(scale: int, count: int, bits: Bits) -> Steps:
    """Samples of P(y) ∝ exp(−|y| / scale), nearly `count` of them."""
    words = _words(count, bits)
    rough = -scale * np.log(np.maximum(words, FEW) * 2.0**-64)
    size = np.floor(rough).astype(np.int64)
    unsure = (np.abs(rough - np.rint(rough)) < scale * CLEAR) | (words < FEW)
    for i in np.flatnonzero(unsure).tolist():
        size[i] = _exactly(int(words[i]), partial(_floored, scale=scale), bits)
    negative = np.unpackbits(np.frombuffer(bits(-(-count // 8)), np.uint8), count=count) == 1
    keep = ~(negative & (size == 0))  # or zero would come twice as often as it should
    signed: Steps = np.where(negative, -size, size)[keep]
    return signed


def _accepted(proposals: Steps, scale: int, variance: int, bits: Bits) -> NDArray[np.bool_]:
    """Which proposals stay: each with probability exp(−γ), γ = (|y| − S/t)² / 2S."""
    distance = np.abs(proposals) * scale - variance
    chances = np.exp((distance / scale) ** 2 / (-2.0 * variance))
    words = _words(proposals.size, bits)
    ahead = chances - words * 2.0**-64
    accepted: NDArray[np.bool_] = ahead > 0
    for i in np.flatnonzero(np.abs(ahead) < CLEAR).tolist():
        exponent = Fraction(int(distance[i]) ** 2, 2 * variance * scale**2)
        accepted[i] = _exactly(int(words[i]), partial(_below_exp, exponent=exponent), bits)
    return accepted


def _exactly(
    word: int, asked: Callable[[Decimal, Decimal, Context], Answer | None], bits: Bits
) -> Answer:
    """The answer for a uniform number that begins with the 64 bits of `word`.

    `asked` gets bounds of the number, and a context with many more digits than they have.
    """
    length = 64
    while True:
        context = Context(prec=length, rounding=ROUND_FLOOR)
        unit = Decimal(1 << length)
        answer = asked(context.divide(word, unit), context.divide(word + 1, unit), context)
        if answer is not None:
            return answer
        word, length = (word << 64) + int.from_bytes(bits(8), "little"), length + 64


def _floored(low: Decimal, high: Decimal, context: Context, scale: int) -> int | None:
    """⌊−t·ln u⌋, if it is the same for all u in between."""
    if not low:
        return None
    slack = Decimal(10) ** (-context.prec // 2)
    least = context.multiply(-scale, context.ln(high)) - slack
    most = context.multiply(-scale, context.ln(low)) + slack
    return math.floor(most) if math.floor(least) == math.floor(most) else None


def _below_exp(low: Decimal, high: Decimal, context: Context, exponent: Fraction) -> bool | None:
    """Whether u < exp(−γ), if it is the same for all u in between."""
    slack = Decimal(10) ** (-context.prec // 2)
    chance = context.exp(context.divide(-exponent.numerator, exponent.denominator))
    if high < chance - slack or not exponent:
        return True
    return False if low > chance + slack else None


def _words(count: int, bits: Bits) -> Words:
    return np.frombuffer(bits(8 * count), "<u8")
