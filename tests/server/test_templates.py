"""A catalogue is small, fits the budget, and gives every mixture the best it has."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.allocation import covered_energy
from proxymoe.common.config import ExtractSettings
from proxymoe.common.errors import BudgetError, ConfigError
from proxymoe.common.plan import LayerPlan, Plan
from proxymoe.server.extract import extract
from proxymoe.server.templates import (
    Extractor,
    catalogue,
    choose,
)
from tests.laws import tried
from tests.server.test_extract import profile_of

SEEDS = (0, 10, 20, 30)
DOMAINS = [f"domain{seed}" for seed in SEEDS]
weights = st.lists(st.floats(0.01, 1), min_size=4, max_size=4)
settings_of = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["drop", "mean", "reap", "frequency", "random"]),
        "kept_fraction": st.floats(0.2, 1),
    }
)


@pytest.fixture(scope="module")
def profile(qwen):
    return profile_of(qwen, SEEDS)


def cut(qwen, profile, mixture, name="a", **fields):
    return Extractor(qwen.base, profile).cut(name, mixture, ExtractSettings(**fields), 0)


def own(qwen, profile, mixture, **fields):
    settings = ExtractSettings(**fields)
    return extract(qwen.base, profile, mixture, settings, np.random.default_rng(0))


@given(settings_of, st.integers(1, 6), weights)
def test_a_device_gets_the_template_that_covers_most_of_its_energy(
    qwen, profile, fields, count, drawn
):
    settings = ExtractSettings(templates=count, **fields)
    mixture = dict(zip(DOMAINS, drawn, strict=True))
    templates = catalogue(qwen.base, profile, settings, 0)
    found = Extractor(qwen.base, profile).cut("a", mixture, settings, 0)
    scores = profile.relative_energy(mixture)
    covered = [covered_energy(scores, each.plan.kept) for each in templates]
    assert covered_energy(scores, found.plan.kept) == max(covered)
    assert found.plan.digest in {each.plan.digest for each in templates}


@tried(20)
@given(settings_of, st.integers(1, 6))
def test_templates_are_few_distinct_within_the_budget_and_the_same_again(
    qwen, profile, fields, count
):
    settings = ExtractSettings(templates=count, **fields)
    templates = catalogue(qwen.base, profile, settings, 3)
    digests = [each.plan.digest for each in templates]
    assert 1 <= len(digests) == len(set(digests)) <= count
    again = catalogue(qwen.base, profile, settings, 3)
    assert digests == [each.plan.digest for each in again]
    budget = settings.kept_fraction * 8 * sum(qwen.base.expert_bytes.values())
    assert max(each.num_bytes for each in templates) <= qwen.base.trunk_bytes + budget + 1


@tried(10)
@given(st.integers(5, 9), st.floats(0.2, 0.9), st.sampled_from(["global", "uniform"]))
def test_with_as_many_templates_as_domains_everybody_has_a_plan_of_its_own(
    qwen, profile, count, fraction, allocation
):
    fields = {"kept_fraction": fraction, "allocation": allocation}
    settings, extractor = ExtractSettings(templates=count, **fields), Extractor(qwen.base, profile)
    for mixture in [{name: 1.0} for name in DOMAINS] + [profile.uniform()]:
        found = extractor.cut("a", mixture, settings, 0)
        assert found.plan == own(qwen, profile, mixture, **fields).plan


def test_more_templates_never_cover_less_of_a_mixture(qwen, profile):
    settings = [ExtractSettings(templates=count) for count in range(1, 6)]
    for name in DOMAINS:
        scores = profile.relative_energy({name: 1.0})
        found = [Extractor(qwen.base, profile).cut("a", {name: 1.0}, each, 0) for each in settings]
        covered = [covered_energy(scores, each.plan.kept) for each in found]
        assert covered == sorted(covered)


def test_with_one_template_all_devices_hold_the_same_also_of_random_plans(qwen, profile):
    plans = {
        cut(qwen, profile, {domain: 1.0}, domain, templates=1, mode="random").plan.digest
        for domain in DOMAINS
    }
    assert len(plans) == 1


@given(st.integers(0, 99), st.integers(1, 3))
def test_the_greedy_choice_is_near_the_best_and_the_first_is_the_best_single_one(seed, count):
    covered = np.random.default_rng(seed).random((5, 6))

    def worth(chosen):
        return covered[:, list(chosen)].max(axis=1).sum()

    found = choose(covered, count)
    best = max(worth(each) for each in itertools.combinations(range(6), count))
    assert len(set(found)) == count
    assert worth(found) >= (1 - 1 / np.e) * best
    assert worth(found[:1]) == max(worth([each]) for each in range(6))


def test_covered_energy_is_the_share_that_is_kept():
    plan = Plan(base="ab" * 32, layers={3: LayerPlan(num_experts=4, kept=(1, 3))})
    assert covered_energy({3: np.array([1.0, 2.0, 3.0, 4.0])}, plan.kept) == 0.6
    assert covered_energy({3: np.zeros(4)}, plan.kept) == 1.0


def test_a_budget_too_small_and_an_unknown_domain_are_refused(qwen, profile):
    with pytest.raises(BudgetError, match="smallest that fits"):
        cut(qwen, profile, profile.uniform(), templates=2, budget_bytes=1000)
    with pytest.raises(ConfigError, match="not in the profile"):
        cut(qwen, profile, {"law": 1.0}, templates=2)


def test_without_templates_a_device_has_the_plan_that_extraction_gives_it(qwen, profile):
    settings = ExtractSettings(mode="random")
    rng = np.random.default_rng([0, *b"phone"])
    expected = extract(qwen.base, profile, profile.uniform(), settings, rng)
    assert cut(qwen, profile, profile.uniform(), "phone", mode="random") == expected
