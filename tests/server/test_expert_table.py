"""A device that ranks experts by the shipped table comes to the plan that the server would cut."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.config import Allocation, ExtractSettings, PlanMode
from proxymoe.common.errors import CheckpointError
from proxymoe.common.expert_table import expert_table_bytes, expert_table_from
from proxymoe.common.plan import Precision
from proxymoe.server.extract import expert_table, extract
from tests.server.test_extract import profile_of

SEEDS = (0, 10, 20)
mixtures = st.dictionaries(
    st.sampled_from([f"domain{seed}" for seed in SEEDS]), st.integers(1, 9), min_size=1
)
settings_of = st.fixed_dictionaries(
    {
        "kept_fraction": st.floats(0.15, 1),
        "allocation": st.sampled_from(Allocation),
        "floor": st.floats(0, 1),
        "experts": st.sampled_from(Precision),
    }
)


@pytest.fixture(scope="module")
def profile(qwen):
    return profile_of(qwen, SEEDS)


def shipped(qwen, profile, settings):
    """The table as a device gets it."""
    return expert_table_from(expert_table_bytes(expert_table(qwen.base, profile, settings)))


@given(mixtures)
def test_a_mixture_has_the_energies_that_the_server_sees(qwen, profile, mixture):
    found = shipped(qwen, profile, ExtractSettings()).mix(mixture)
    expected = profile.relative_energy(mixture)
    assert found.keys() == expected.keys()
    for at, values in expected.items():
        assert found[at] == pytest.approx(values, rel=1e-6)


@given(settings_of, mixtures)
def test_at_the_bytes_of_a_plan_a_device_keeps_what_the_server_keeps(
    qwen, profile, fields, mixture
):
    settings = ExtractSettings(**fields)
    plan = extract(qwen.base, profile, mixture, settings, np.random.default_rng(0)).plan
    table = shipped(qwen, profile, settings)
    kept = table.keep(table.mix(mixture), table.bytes_of(plan.kept))
    assert {at: tuple(sorted(experts)) for at, experts in kept.items()} == plan.kept


def test_a_table_says_whether_plans_follow_from_it_alone(qwen, profile):
    exact = [
        expert_table(qwen.base, profile, ExtractSettings(**fields)).is_exact
        for fields in ({}, {"mode": PlanMode.REAP}, {"templates": 2})
    ]
    assert exact == [True, False, False]


def test_of_a_single_domain_there_is_no_table(qwen):
    with pytest.raises(CheckpointError, match="table of 1 domains"):
        expert_table(qwen.base, profile_of(qwen, (0,)), ExtractSettings())
