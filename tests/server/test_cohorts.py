"""Cohorts by coverage: as fair as a deck, the same again, and never worse than the deck's own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.errors import LayoutMismatch
from proxymoe.server.cohorts import Covering, covered, drawing, holding
from proxymoe.server.schedule import period, sample_cohort
from proxymoe.simulations.faults.cohort import NUM_EXPERTS, small_layout, small_plan
from tests.laws import tried

FULL = small_layout()
SIZES = np.array(FULL.sizes)
kept = st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=3).map(sorted)
fleets = st.lists(kept, min_size=2, max_size=9).map(
    lambda plans: {f"d{i}": FULL.held_under(small_plan(*ids)) for i, ids in enumerate(plans)}
)


def covering(fleet, smallest):
    return Covering(FULL, fleet.__getitem__, smallest)


def worth(fleet, cohorts, smallest):
    return sum(
        covered(holding(FULL, [fleet[name] for name in cohort]), SIZES, smallest)
        for cohort in cohorts
    )


@tried(25)
@given(fleets, st.integers(1, 9), st.integers(1, 4), st.integers(0, 5))
def test_every_device_is_asked_equally_often_and_the_draw_is_a_function(
    fleet, size, smallest, seed
):
    names, draw = list(fleet), covering(fleet, smallest)
    numbers = range(1, 2 * period(len(names), size) + 1)
    rounds = [draw(names, size, seed, number) for number in numbers]
    assert all(len(set(cohort)) == len(cohort) == min(size, len(names)) for cohort in rounds)
    assert all(cohort == sorted(cohort) for cohort in rounds)
    assert len({sum(name in cohort for cohort in rounds) for name in names}) == 1
    assert rounds == [draw(names[::-1], size, seed, number) for number in numbers]


@given(fleets, st.integers(1, 5), st.integers(1, 4), st.integers(0, 5), st.integers(0, 3))
def test_nobody_is_asked_again_before_everybody_was_asked(fleet, size, smallest, seed, which):
    names, draw = list(fleet), covering(fleet, smallest)
    asked = period(len(names), size)
    counts = dict.fromkeys(names, 0)
    for number in range(which * asked + 1, (which + 1) * asked + 1):
        for name in draw(names, size, seed, number):
            counts[name] += 1
        # A round that two decks share may be ahead for those who are in it.
        assert max(counts.values()) - min(counts.values()) <= 2 - (len(names) % size == 0)


@given(fleets, st.integers(1, 9), st.integers(1, 4), st.integers(0, 5), st.integers(0, 3))
def test_they_never_cover_less_than_the_decks_own(fleet, size, smallest, seed, which):
    names, draw = list(fleet), covering(fleet, smallest)
    asked = period(len(names), size)
    numbers = range(which * asked + 1, (which + 1) * asked + 1)
    found = [draw(names, size, seed, number) for number in numbers]
    plain = [sample_cohort(names, size, seed, number) for number in numbers]
    assert worth(fleet, found, smallest) >= worth(fleet, plain, smallest)


@given(st.integers(0, 20))
def test_devices_with_the_same_plan_are_asked_together_where_blocks_need_two_holders(seed):
    fleet = {f"d{i}": FULL.held_under(small_plan(i % 4)) for i in range(8)}
    for number in range(1, 5):
        one, other = covering(fleet, 2)(list(fleet), 2, seed, number)
        assert fleet[one] == fleet[other]


def test_in_the_clear_devices_with_other_plans_are_asked_together():
    fleet = {f"d{i}": FULL.held_under(small_plan(i // 4)) for i in range(8)}
    for number in range(1, 5):
        one, other = covering(fleet, 1)(list(fleet), 2, 0, number)
        assert fleet[one] != fleet[other]


def test_covered_are_blocks_with_holders_enough():
    layouts = [FULL.held_under(small_plan(*ids)) for ids in ((0, 1), (1, 2), (1,))]
    held = holding(FULL, layouts)
    per_expert = 2 * (4 * 2 + 2 * 2)  # two layers, B of (4, R) and A of (R, 2), R = 2
    trunk = 2 * 4 * 2
    wanted = {1: trunk + 3 * per_expert, 2: trunk + per_expert, 3: trunk + per_expert, 4: 0}
    assert {smallest: covered(held, SIZES, smallest) for smallest in wanted} == wanted


def test_the_setting_says_which_rule_draws():
    fleet = {"a": FULL}
    assert drawing("deck", FULL, fleet.__getitem__, 2) is sample_cohort
    assert isinstance(drawing("covering", FULL, fleet.__getitem__, 2), Covering)


def test_layouts_of_another_adapter_are_refused():
    with pytest.raises(LayoutMismatch, match="rank and seed"):
        holding(FULL, [small_layout(rank=3)])
