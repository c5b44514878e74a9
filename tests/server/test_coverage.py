"""Coverage is counted as cohorts would be: by all of them, and by those that are drawn."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.server.coverage import coverage, mean_mixture
from proxymoe.server.schedule import period, sample_cohort
from proxymoe.simulations.faults.cohort import NUM_EXPERTS, small_layout, small_plan
from tests.laws import tried

FULL = small_layout()
SIZES = np.array(FULL.sizes)
ENERGY = {0: np.array([4.0, 3.0, 2.0, 1.0]), 1: np.array([5.0, 5.0, 0.0, 0.0])}
kept = st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=3).map(sorted)
plans_of = st.lists(kept, min_size=1, max_size=6)


def layouts_of(plans):
    return [FULL.held_under(small_plan(*ids)) for ids in plans]


def holds(layout):
    return np.array([block in layout.blocks for block in FULL.blocks])


@tried(30)
@given(plans_of, st.integers(1, 6), st.integers(1, 4))
def test_it_is_what_all_cohorts_together_show(plans, size, smallest):
    layouts = layouts_of(plans)
    held = np.array([holds(layout) for layout in layouts]).astype(int)
    size = min(size, len(plans))
    cohorts = [
        held[list(each)].sum(axis=0) for each in itertools.combinations(range(len(plans)), size)
    ]
    often = np.mean([holders >= smallest for holders in cohorts], axis=0)
    vain = np.mean([np.where(holders < smallest, holders, 0) for holders in cohorts], axis=0)
    found = coverage(FULL, layouts, size, smallest, ENERGY)
    nobody = held.sum(axis=0) == 0
    assert found.unheld.blocks == nobody.sum()
    assert found.never.blocks == (~nobody & (often == 0)).sum()
    assert found.rarely.numbers == SIZES[(often > 1e-9) & (often < 0.5 - 1e-9)].sum()
    trained = np.mean([(holders * SIZES).sum() for holders in cohorts])
    assert found.wasted == pytest.approx((vain * SIZES).sum() / trained)
    assert found.total.blocks == len(FULL.blocks)
    assert found.total.numbers == FULL.size
    assert found.total.energy == pytest.approx(1.0)


@given(plans_of, st.integers(1, 6))
def test_in_the_clear_nothing_is_wasted_and_masks_never_cover_more(plans, size):
    layouts = layouts_of(plans)
    by_class = [coverage(FULL, layouts, size, smallest, ENERGY) for smallest in (1, 2, 3, 4)]
    assert by_class[0].wasted == pytest.approx(0)
    assert by_class[0].never.blocks == 0
    for less, more in itertools.pairwise(by_class):
        assert less.never.blocks <= more.never.blocks
        assert less.wasted <= more.wasted + 1e-12


def test_a_deck_sums_blocks_as_often_as_is_said():
    plans = [(0, 1), (0, 1), (0, 2), (0, 3), (0, 3), (0, 3)]
    found = coverage(FULL, layouts_of(plans), 3, 3, ENERGY)
    rounds = [sample_cohort(list("abcdef"), 3, 7, n) for n in range(1, 1000 * period(6, 3))]
    of_three = np.mean([set("def") <= set(cohort) for cohort in rounds])
    assert of_three == pytest.approx(1 / 20, rel=0.25)
    assert found.rarely.blocks == 2 * 2  # expert 3 in two layers
    assert found.never.blocks == 2 * 2 * 2  # experts 1 and 2
    assert found.never.energy == pytest.approx((3 + 2 + 5) / 20)
    assert found.rarely.energy == pytest.approx(1 / 20)
    assert "8 never with 3 holders in a round (50.0% of energy), 4 rarely (5.0%" in str(found)


def test_energy_is_of_experts_only():
    found = coverage(FULL, layouts_of([(0,)]), None, 2, ENERGY)
    assert found.unheld.energy == pytest.approx(1 - 9 / 20)
    assert found.never.energy == pytest.approx(9 / 20)
    assert found.never.blocks == 2 + 2 * 2, "attention, too, has one holder only"


def test_every_device_weighs_the_same_in_the_mean_mixture():
    found = mean_mixture([{"code": 2.0}, {"code": 1.0, "math": 3.0}])
    assert found == {"code": 1.25, "math": 0.75}
