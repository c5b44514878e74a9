"""The noise has the distribution that the theorems are about, and exact arithmetic agrees.

Statistics are seeded; each bound is five standard errors, which one correct sampler in 1.7 million
misses, or a p-value of 10⁻⁴.
"""

import math
import secrets
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from proxymoe.common import discrete_gaussian
from proxymoe.common.discrete_gaussian import CHUNK, LARGEST_VARIANCE, sample
from proxymoe.common.errors import ConfigError
from tests.laws import tried

COUNT = 200_000


def seeded(seed=0):
    return np.random.default_rng(seed).bytes


def masses(variance, reach):
    values = np.arange(-reach, reach + 1)
    weights = np.exp(-(values**2) / (2 * variance))
    return values, weights / weights.sum()


@pytest.mark.parametrize("variance", [1, 2, 3, 7, 64])
def test_every_integer_comes_as_often_as_it_should(variance):
    values, chances = masses(variance, 12 * math.isqrt(variance) + 12)
    found = sample(variance, COUNT, seeded(variance))
    counts = np.array([(found == value).sum() for value in values])
    usual = chances * COUNT > 20
    observed = [*counts[usual], COUNT - counts[usual].sum()]
    expected = [*chances[usual] * COUNT, (1 - chances[usual].sum()) * COUNT]
    assert stats.chisquare(observed, expected).pvalue > 1e-4


@pytest.mark.parametrize("variance", [16, 1 << 20, 12345678901, 1 << 40, LARGEST_VARIANCE])
def test_moments_are_those_of_a_gaussian(variance):
    found = sample(variance, COUNT, seeded(1)) / math.sqrt(variance)
    error = 5 / math.sqrt(COUNT)
    assert abs(found.mean()) < error
    assert abs((found**2).mean() - 1) < error * math.sqrt(2)
    assert abs((found**3).mean()) < error * math.sqrt(15)
    assert abs((found**4).mean() - 3) < error * math.sqrt(96)


@pytest.mark.parametrize("variance", [1, 1000, 1 << 40])
def test_both_signs_are_equally_likely(variance):
    found = sample(variance, COUNT, seeded(2))
    above, below = (found > 0).sum(), (found < 0).sum()
    assert stats.binomtest(int(above), int(above + below)).pvalue > 1e-4


def test_large_noise_is_a_gaussian_to_any_eye():
    found = sample(1 << 40, 100_000, seeded(3)) / 2.0**20
    assert stats.kstest(found, "norm").pvalue > 1e-4


def test_samples_do_not_depend_on_each_other():
    found = sample(1 << 20, COUNT, seeded(4)) / 2.0**10
    for lag in (1, 2, CHUNK):
        assert abs((found[lag:] * found[:-lag]).mean()) < 5 / math.sqrt(COUNT - lag)


@pytest.mark.parametrize("variance", [1, 2, 10, 12345, 1 << 30, LARGEST_VARIANCE])
def test_exact_arithmetic_decides_as_floating_point_does(variance, monkeypatch):
    quick = sample(variance, 150, seeded(5))
    monkeypatch.setattr(discrete_gaussian, "CLEAR", 2.0)  # now nothing is clear
    assert (sample(variance, 150, seeded(5)) == quick).all()


@pytest.mark.parametrize("word", [0, 1, (1 << 64) - 1])
@pytest.mark.parametrize("scale", [1, 4, 1 << 26])
def test_the_ends_of_the_uniform_numbers_are_decided_too(word, scale):
    words = np.full(8, word, "<u8").tobytes()
    more = seeded(6)
    given_words = iter([words])
    found = discrete_gaussian._laplace(scale, 8, lambda n: next(given_words, None) or more(n))
    sizes = np.abs(found) / scale
    assert (sizes > 40).all() if word < 2 else (sizes < 1e-9).all()


def test_a_tie_is_broken_by_more_bits():
    """A word whose interval holds exp(−1) says nothing until the next bits come."""
    word = math.floor(math.exp(-1) * 2**64)
    word = next(w for w in range(word - 4096, word + 4096) if _holds_border(w))

    def decide(bits):
        return discrete_gaussian._exactly(
            word,
            lambda u, v, c: discrete_gaussian._below_exp(u, v, c, Fraction(1)),
            bits,
        )

    assert decide(bytes)
    assert not decide(lambda n: b"\xff" * n)


def _holds_border(word):
    asked = []

    def bits(count):
        asked.append(count)
        return bytes(count)

    discrete_gaussian._exactly(
        word, lambda u, v, c: discrete_gaussian._below_exp(u, v, c, Fraction(1)), bits
    )
    return bool(asked)


@tried(20)
@given(st.integers(1, LARGEST_VARIANCE), st.integers(0, 300))
def test_any_variance_and_count_can_be_had(variance, count):
    found = sample(variance, count, seeded())
    assert found.shape == (count,)
    assert found.dtype == np.int64
    assert (np.abs(found) <= 12 * math.sqrt(variance)).all()


def test_the_same_bits_give_the_same_noise_and_secrets_give_another():
    assert (sample(99, 50, seeded(7)) == sample(99, 50, seeded(7))).all()
    first, second = (sample(1 << 40, 50, secrets.token_bytes) for _ in range(2))
    assert not (first == second).all()


@pytest.mark.parametrize("variance", [0, -1, LARGEST_VARIANCE + 1])
def test_noise_that_cannot_be_drawn_is_refused(variance):
    with pytest.raises(ConfigError, match="another grid"):
        sample(variance, 1, seeded())
