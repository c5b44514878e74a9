"""Epsilon is the library's, claims are no stronger than what was done, and noise keeps promises."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common import accounting
from proxymoe.common.accounting import (
    PRECISION,
    Cohort,
    Exposure,
    epsilon_of,
    gaussian_epsilon,
    noise_for,
    poisson_cohort,
)
from proxymoe.common.errors import ConfigError
from tests.laws import tried

DELTA = 1e-5
multipliers = st.floats(0.3, 20)


def rounds(z, times, probability=None):
    return Exposure().after(z, probability, times)


@pytest.fixture(scope="module")
def dp():
    """The library; it takes seconds to load, so only who tests with it does."""
    import dp_accounting
    import dp_accounting.pld
    import dp_accounting.rdp

    return dp_accounting


def library(dp, accountant, *events):
    return accountant.compose(dp.ComposedDpEvent(list(events))).get_epsilon(DELTA)


@tried(15)
@given(z=multipliers, times=st.integers(1, 50))
def test_rounds_cost_what_the_library_says(dp, z, times):
    event = dp.SelfComposedDpEvent(dp.GaussianDpEvent(z), times)
    expected = library(dp, dp.rdp.RdpAccountant(), event)
    assert epsilon_of(rounds(z, times), DELTA) == pytest.approx(expected, rel=1e-6)


def test_the_tighter_accountant_is_the_library_s_too(dp):
    event = dp.SelfComposedDpEvent(dp.GaussianDpEvent(4.0), 9)
    found = epsilon_of(rounds(4.0, 9), DELTA, "pld")
    assert found == pytest.approx(library(dp, dp.pld.PLDAccountant(), event), rel=1e-3)
    assert found < epsilon_of(rounds(4.0, 9), DELTA)


@pytest.mark.parametrize("accountant", ["rdp", pytest.param("pld", marks=pytest.mark.slow)])
def test_sampled_and_dealt_rounds_add_up(dp, accountant):
    sampled = Exposure().after(1.0, 0.05, 20)
    both = sampled.after(5.0)
    alone = epsilon_of(sampled, DELTA, accountant)
    assert alone < epsilon_of(both, DELTA, accountant)
    assert alone < epsilon_of(rounds(1.0, 20), DELTA, accountant) / 3
    event = dp.PoissonSampledDpEvent(0.05, dp.GaussianDpEvent(1.0))
    counter = dp.pld.PLDAccountant() if accountant == "pld" else dp.rdp.RdpAccountant(range(2, 64))
    expected = library(dp, counter, dp.SelfComposedDpEvent(event, 20))
    assert alone == pytest.approx(expected, rel=0.01)


@given(st.lists(multipliers, min_size=1, max_size=5), st.randoms())
def test_the_order_of_rounds_does_not_matter(zs, random):
    mixed = list(zs)
    random.shuffle(mixed)
    first, second = Exposure(), Exposure()
    for a, b in zip(zs, mixed, strict=True):
        first, second = first.after(a), second.after(b)
    assert first.inverse_squares == pytest.approx(second.inverse_squares)


def test_no_round_costs_nothing_and_one_without_noise_everything():
    assert epsilon_of(Exposure(), DELTA) == 0
    assert epsilon_of(rounds(0.0, 1), DELTA) == math.inf
    assert epsilon_of(rounds(0.0, 1).after(5.0), DELTA) == math.inf


@pytest.mark.parametrize(
    ("epsilon", "times", "probability", "accountant"),
    [
        (2.0, 5, None, "rdp"),
        (8.0, 1, None, "pld"),
        (0.1, 100, None, "rdp"),
        (100.0, 1, None, "rdp"),
        (4.0, 50, 0.1, "rdp"),
    ],
)
def test_noise_keeps_the_promise_and_wastes_little(epsilon, times, probability, accountant):
    z = noise_for(epsilon, DELTA, times, probability, accountant)
    assert epsilon_of(rounds(z, times, probability), DELTA, accountant) <= epsilon
    less = z * (1 - 2 * PRECISION)
    assert epsilon_of(rounds(less, times, probability), DELTA, accountant) > epsilon


@pytest.mark.parametrize(
    ("delta", "times", "epsilon", "expected"),
    [(1e-3, 5, 2, 3.60), (1e-3, 5, 8, 1.16), (1e-4, 3, 4, 1.80), (1e-4, 7, 2, 5.01)],
)
def test_known_calibrations_come_out(delta, times, epsilon, expected):
    assert noise_for(epsilon, delta, times) == pytest.approx(expected, abs=0.01)


def test_a_promise_out_of_reach_is_refused():
    with pytest.raises(ConfigError, match="out of reach"):
        noise_for(1e-6, DELTA, 10**6)


@given(st.floats(1e-4, 400), st.floats(1e-9, 1e-2))
def test_a_device_reckons_without_the_library_and_never_too_little(dp, inverse_squares, delta):
    found = gaussian_epsilon(inverse_squares, delta)
    exact = dp.get_epsilon_gaussian(inverse_squares**-0.5, delta)
    assert exact <= found * (1 + 1e-9) + 1e-12
    assert found <= epsilon_of(Exposure(inverse_squares), delta) * (1 + 1e-6)


def test_a_device_knows_nothing_and_everything_too():
    assert gaussian_epsilon(0.0, DELTA) == 0
    assert gaussian_epsilon(math.inf, DELTA) == math.inf


def test_every_device_enters_a_sampled_cohort_by_its_own_coin():
    names = [f"device-{i}" for i in range(20_000)]
    found = poisson_cohort(names, 0.25, np.random.default_rng(0).bytes)
    assert found.probability == 0.25
    assert list(found.devices) == sorted(found.devices)
    assert len(found.devices) == pytest.approx(5000, abs=5 * math.sqrt(20_000 * 0.25 * 0.75))
    assert poisson_cohort(names, 1.0, np.random.default_rng(0).bytes).devices == tuple(
        sorted(names)
    )
    assert poisson_cohort([], 0.5, np.random.default_rng(0).bytes).devices == ()


def test_a_cohort_that_was_dealt_claims_nothing():
    assert Cohort(("a", "b")).probability is None


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.1, math.nan])
def test_a_probability_that_is_none_is_refused(probability):
    with pytest.raises(ConfigError, match="sampling probability"):
        poisson_cohort(["a"], probability, np.random.default_rng(0).bytes)


def test_without_the_library_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"pip install.*server"):
        epsilon_of(rounds(1.0, 1), DELTA)
    assert gaussian_epsilon(1.0, DELTA) > 0


def test_devices_do_not_load_the_library():
    code = (
        "import sys, proxymoe.common.accounting, proxymoe.common.privacy, proxymoe.common.sealing; "
        "assert not {'dp_accounting', 'scipy', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert accounting.PRECISION < 0.01
