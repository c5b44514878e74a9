"""Fixed-point words: sums are exact, rounding is fair, and headroom cannot be used up."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from proxymoe.common.errors import ConfigError, ProtocolError
from proxymoe.common.fixed_point import (
    FixedPoint,
    pack,
    range_for,
    unpack,
    word_bits_for,
)

bits = st.sampled_from([24, 32])
floats = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-3, 3, width=32))


def f32(values):
    return np.array(values, dtype=np.float32)


def u32(values):
    return np.array(values, dtype=np.uint32)


def summed(parts):
    return np.sum(np.stack(parts), axis=0, dtype=np.uint32)


@given(bits, st.lists(floats, min_size=1, max_size=5), st.integers(0, 100))
def test_a_sum_of_words_is_the_sum_of_numbers_to_a_step_each(width, vectors, seed):
    size = min(vector.size for vector in vectors)
    encoding = FixedPoint(width, len(vectors), 3.0)
    rng = np.random.default_rng(seed)
    words = [encoding.encode(vector[:size], 1.0, rng)[0] for vector in vectors]
    found = encoding.decode(summed(words))
    expected = np.sum([v[:size].astype(np.float64) for v in vectors], axis=0)
    assert np.abs(found - expected).max() <= len(vectors) * encoding.step * (1 + 1e-9)


@given(bits, st.integers(1, 256), st.sampled_from([-1.0, 1.0]))
def test_all_devices_at_the_limit_do_not_wrap_around(width, count, sign):
    encoding = FixedPoint(width, count, 0.5)
    word = encoding.encode(f32([sign * 9.0]), 1.0, np.random.default_rng(0))[0]
    total = np.array([int(word[0]) * count % 2**32], dtype=np.uint32)
    assert encoding.decode(total)[0] == pytest.approx(sign * 0.5 * count)
    ones = encoding.encode_weights(np.ones(1, dtype=np.float32))
    assert encoding.decode_weights((ones * np.uint32(count)).astype(np.uint32))[0] == count


def test_zero_and_the_limits_are_exact():
    encoding = FixedPoint(24, 32, 0.25)
    words, saturated = encoding.encode(f32([0.0, 0.25, -0.25]), 1.0, np.random.default_rng(0))
    assert encoding.decode(words).tolist() == [0.0, 0.25, -0.25]
    assert saturated == 0


def test_rounding_is_right_on_average():
    encoding = FixedPoint(24, 256, 1.0)
    value = np.full(200_000, 0.3 * encoding.step, dtype=np.float32)
    found = encoding.decode(encoding.encode(value, 1.0, np.random.default_rng(0))[0])
    assert set(np.unique(found / encoding.step).round(6)) == {0.0, 1.0}
    assert found.mean() / encoding.step == pytest.approx(0.3, abs=0.005)


def test_the_error_is_what_the_essay_says():
    count, sigma = 32, 1e-4
    encoding = FixedPoint(24, count, 12 * sigma)
    rng = np.random.default_rng(0)
    vectors = [rng.normal(0, sigma, 20_000).astype(np.float32) for _ in range(count)]
    found = encoding.decode(summed([encoding.encode(v, 1.0, rng)[0] for v in vectors]))
    expected = np.sum([v.astype(np.float64) for v in vectors], axis=0)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error == pytest.approx(0.41 * encoding.step / sigma, rel=0.05)
    assert error < 1e-4


def test_what_is_beyond_the_range_saturates_and_is_counted():
    encoding = FixedPoint(24, 4, 1.0)
    values = f32([2.0, -5.0, 0.5])
    words, saturated = encoding.encode(values, 1.0, np.random.default_rng(0))
    assert saturated == 2
    assert encoding.decode(words) == pytest.approx([1.0, -1.0, 0.5], abs=encoding.step)


def test_weights_scale_numbers_after_saturation():
    encoding = FixedPoint(24, 4, 1.0)
    words, _ = encoding.encode(f32([2.0, 0.5]), 0.25, np.random.default_rng(0))
    assert encoding.decode(words) == pytest.approx([0.25, 0.125], abs=encoding.step)
    weights = encoding.encode_weights(f32([0.0, 0.25, 1.0]))
    assert encoding.decode_weights(weights) == pytest.approx([0, 0.25, 1], abs=1e-6)


@given(bits, hnp.arrays(np.uint32, st.integers(0, 50)))
def test_words_survive_packing(width, words):
    packed = pack(words, width)
    assert len(packed) == words.size * width // 8
    assert unpack(packed, width).tolist() == [int(w) % 2**width for w in words]
    assert unpack(memoryview(packed), width).dtype == np.uint32


def test_packed_words_are_little_endian():
    assert pack(u32([0x01020304]), 24) == b"\x04\x03\x02"
    assert pack(u32([0x01020304]), 32) == b"\x04\x03\x02\x01"


def test_half_a_word_is_refused():
    with pytest.raises(ProtocolError, match="4 bytes are not a whole number of 3-byte words"):
        unpack(b"1234", 24)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_range_is_refused(value):
    with pytest.raises(ConfigError, match="must be positive and finite"):
        FixedPoint(24, 4, value)


@pytest.mark.parametrize("count", [0, 600])
def test_too_little_precision_is_refused(count):
    with pytest.raises(ConfigError, match="levels are the least"):
        FixedPoint(24, count, 1.0)


def test_the_range_follows_from_the_norm():
    assert range_for(2.0, 10_000) == pytest.approx(2.0 * 12 / 100)
    assert range_for(2.0, 4) == 2.0  # no number of a vector exceeds its norm


def test_words_are_as_narrow_as_precision_allows():
    assert word_bits_for(32, 1.0, 1e-5) == 24
    assert word_bits_for(32, 1.0, 1e-6) == 32
