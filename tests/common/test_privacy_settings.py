"""What tasks tell of noise, and what a device reckons that it costs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from proxymoe.common.accounting import Exposure, epsilon_of
from proxymoe.common.fixed_point import FixedPoint
from proxymoe.common.privacy import CLIP_STEPS, Mode
from proxymoe.common.privacy_settings import NOISE_RANGE, Noise, steps_under_masks

FIELDS = {
    "mode": "distributed",
    "noise_multiplier": 2.0,
    "delta": 1e-5,
    "tolerated_dropouts": 1 / 3,
    "clip_steps": 1024,
}
NOISE = Noise.model_validate(FIELDS)


def test_noise_survives_the_wire():
    found = Noise.model_validate_json(NOISE.model_dump_json())
    assert found == NOISE
    assert found.mode is Mode.DISTRIBUTED


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "clip_only"},
        {"mode": "loud"},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": float("inf")},
        {"delta": 0.0},
        {"delta": 1.0},
        {"tolerated_dropouts": 1.0},
        {"clip_steps": 0},
        {"clip_steps": 1 << 27},
        {"more": 1},
    ],
)
def test_noise_that_cannot_be_is_refused(change):
    with pytest.raises(ValidationError):
        Noise.model_validate(FIELDS | change)


def test_the_mechanism_is_the_one_that_was_told():
    found = NOISE.mechanism(3.0)
    assert (found.mode, found.clip_norm, found.noise_multiplier) == (Mode.DISTRIBUTED, 3.0, 2.0)
    assert (found.clip_steps, found.needed(9)) == (1024, 6)


@pytest.mark.parametrize(("z", "rounds"), [(1.0, 1), (4.0, 30), (0.7, 3), (20.0, 1000)])
def test_what_rounds_cost_is_at_least_what_the_accountant_finds(z, rounds):
    noise = NOISE.model_copy(update={"noise_multiplier": z})
    spent, exposure = 0.0, 0.0
    for _ in range(rounds):
        spent += noise.cost(exposure)
        exposure += z**-2
    found = epsilon_of(Exposure().after(z, None, rounds), noise.delta)
    assert found <= spent <= 1.5 * found


@given(st.floats(0, 1e3), st.floats(0.05, 1e3))
def test_a_round_costs_something_and_less_the_more_there_were(before, z):
    noise = NOISE.model_copy(update={"noise_multiplier": z})
    assert 0 < noise.cost(before) <= noise.cost(0.0) + 1e-9


@given(st.integers(2, 256), st.floats(0.01, 1e3))
def test_words_hold_an_update_and_its_noise(num_devices, z):
    steps = steps_under_masks(num_devices, z)
    assert 1 <= steps <= CLIP_STEPS
    assert steps * (1 + NOISE_RANGE * z) <= FixedPoint(32, num_devices, 1.0).levels + 1 + z * 12
