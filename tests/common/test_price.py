"""Whoever wants a guarantee is told before what it costs, and what would make it useful."""

import math

import pytest

from proxymoe.common.accounting import Exposure, epsilon_of
from proxymoe.common.errors import ConfigError
from proxymoe.common.price import price
from proxymoe.common.privacy import Span
from proxymoe.common.privacy_settings import PrivacySettings

CENTRAL = PrivacySettings(mode="central", noise_multiplier=1.0, delta=1e-4)


def priced(
    privacy=CENTRAL, spans=None, size=2500, cohort_size=50, num_devices=500, rounds=30, **changed
):
    return price(
        privacy,
        rounds=rounds,
        cohort_size=cohort_size,
        num_devices=num_devices,
        clip_norm=2.0,
        spans=spans or [Span(size, cohort_size)],
        **changed,
    )


@pytest.mark.parametrize("size", [1, 2500, 10**6])
def test_noise_equals_signal_when_the_cohort_is_z_times_the_root_of_the_size(size):
    found = priced(size=size)
    assert found.noise == pytest.approx(2.0 * math.sqrt(size) / 50)
    assert found.signal == 2.0
    assert found.devices_needed == math.ceil(math.sqrt(size))
    again = priced(size=size, cohort_size=found.devices_needed, num_devices=10**4)
    assert again.noise_to_signal == pytest.approx(1, abs=1e-9)


def test_epsilon_is_that_of_the_rounds_a_device_takes_part_in():
    found = priced()
    assert found.participations == 3
    assert found.epsilon == epsilon_of(Exposure().after(1.0, None, 3), 1e-4)
    assert priced(rounds=31).participations == 4
    assert priced(cohort_size=500).participations == 30


def test_an_epsilon_that_is_promised_is_kept():
    found = priced(PrivacySettings(mode="central", epsilon=4.0, delta=1e-4))
    assert 3.9 < found.epsilon <= 4.0
    assert found.noise_multiplier == pytest.approx(1.80, abs=0.01)


def test_real_sampling_is_cheaper_and_counts_every_round():
    sampled = priced(
        PrivacySettings(mode="central", noise_multiplier=1.0, delta=1e-4, sampling="poisson")
    )
    assert sampled.participations == 30
    assert sampled.epsilon < priced().epsilon


def test_a_smaller_adapter_is_advised_if_one_would_do():
    adapters = {"rank 8": 40_000, "rank 1": 2000, "rank 2": 2500, "one layer": 100}
    found = priced(size=40_000, adapters=adapters)
    assert found.noise_to_signal == 4
    assert [other.name for other in found.alternatives] == [
        "rank 8",
        "rank 2",
        "rank 1",
        "one layer",
    ]
    assert found.advice is not None
    assert found.advice.name == "rank 2"
    assert found.largest_size == 2500
    assert priced(size=40_000, adapters={"rank 8": 40_000}).advice is None


def test_blocks_that_few_hold_get_more_of_the_noise():
    everybody = priced(spans=[Span(100, 50), Span(100, 50)])
    few = priced(spans=[Span(100, 50), Span(100, 5)])
    assert everybody.noise == pytest.approx(2 * math.sqrt(200) / 50)
    assert few.noise == pytest.approx(2 * math.sqrt(100 / 50**2 + 100 / 5**2))
    assert priced(spans=[Span(100, 50), Span(100, 0)]).noise == pytest.approx(2 * 10 / 50)


def test_less_trust_costs_more_noise():
    def mode(name):
        return PrivacySettings(mode=name, noise_multiplier=1.0, delta=1e-4, tolerated_dropouts=0.2)

    central, shared, local = (priced(mode(name)) for name in ("central", "distributed", "local"))
    assert shared.noise == pytest.approx(central.noise * math.sqrt(50 / 40))
    assert local.noise == pytest.approx(central.noise * math.sqrt(50))
    # By its own rule, local noise needs z²·d devices.
    assert local.devices_needed == 2500
    assert local.largest_size == 50


def test_without_noise_there_is_no_guarantee_and_it_says_so():
    found = priced(PrivacySettings())
    assert (found.epsilon, found.noise, found.devices_needed) == (math.inf, 0, 1)
    assert "no formal guarantee" in found.warnings[0]


def test_a_delta_that_gives_devices_away_is_told():
    assert not priced().warnings
    assert (
        "give one away"
        in priced(PrivacySettings(mode="central", noise_multiplier=1.0, delta=0.01)).warnings[0]
    )
    strict = PrivacySettings(
        mode="distributed", noise_multiplier=1.0, delta=1e-4, tolerated_dropouts=0.0
    )
    assert "may drop out" in priced(strict).warnings[0]


def test_a_cohort_larger_than_the_fleet_is_refused():
    with pytest.raises(ConfigError, match="cohorts of 501"):
        priced(cohort_size=501)
