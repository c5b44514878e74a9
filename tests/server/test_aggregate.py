"""Sums of linear updates: exact, per holder, and independent of who answered first."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.adapter import AdapterLayout, delta_weight
from proxymoe.common.errors import LayoutMismatch, ProtocolError
from proxymoe.server.aggregate import PlainSum
from proxymoe.simulations.faults.cohort import NUM_EXPERTS, small_layout, small_plan
from tests.laws import tried
from tests.tiny import assert_near

FULL = small_layout()
kept_sets = st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1).map(sorted)
few = tried(15)
cohorts = st.lists(st.tuples(kept_sets, st.integers(0, 10**6)), min_size=1, max_size=5)


def contributions(cohort, weight: float = 1.0):
    """{device: (layout, update, weight)}; small multiples of 2⁻¹⁰, so that sums are exact."""
    found = {}
    for number, (kept, seed) in enumerate(cohort):
        layout = FULL.held_under(small_plan(*kept))
        generator = torch.Generator().manual_seed(seed)
        update = torch.randint(-999, 999, (layout.size,), generator=generator) / 1024
        found[f"device{number}"] = (layout, update, weight)
    return found


def summed(added, order=None, fewest_holders=1):
    summation = PlainSum(FULL, fewest_holders)
    for name in order or added:
        summation.add(name, *added[name])
    return summation.sum()


@few
@given(cohorts, st.randoms(use_true_random=False))
def test_the_sum_does_not_depend_on_the_order_of_devices(cohort, random):
    added = contributions(cohort)
    order = list(added)
    random.shuffle(order)
    one, other = summed(added), summed(added, order)
    assert torch.equal(one.total, other.total)
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.mean(FULL), other.mean(FULL))


@few
@given(cohorts, st.integers(0, 4))
def test_splitting_a_device_in_two_halves_changes_nothing(cohort, which):
    added = contributions(cohort)
    name = f"device{which % len(cohort)}"
    layout, update, weight = added[name]
    split = {other: parts for other, parts in added.items() if other != name}
    split |= {f"{name}-{half}": (layout, update, weight / 2) for half in "ab"}
    one, other = summed(added), summed(split)
    assert torch.equal(one.total, other.total)
    assert torch.equal(one.mean(FULL), other.mean(FULL))
    assert other.num_devices == one.num_devices + 1


@few
@given(cohorts, st.sampled_from([0.5, 2.0, 4.0]))
def test_weights_count_only_against_each_other(cohort, weight):
    one, other = (summed(contributions(cohort, w)).mean(FULL) for w in (1.0, weight))
    assert torch.equal(one, other)


@few
@given(cohorts)
def test_every_block_is_the_mean_over_its_holders_and_zero_without_any(cohort):
    added = contributions(cohort)
    mean = FULL.trained_factors(summed(added).mean(FULL))
    for block, found in zip(FULL.blocks, mean, strict=True):
        held = [
            dict(zip(layout.blocks, layout.trained_factors(update), strict=True))[block]
            for layout, update, _ in added.values()
            if block in layout.blocks
        ]
        if held:
            assert_near(found, torch.stack(held).mean(0), 1e-6)
        else:
            assert found.eq(0).all()


@few
@given(cohorts, st.integers(1, 5))
def test_a_block_with_too_few_holders_is_in_no_sum_and_the_others_are_as_ever(cohort, fewest):
    added = contributions(cohort, weight=0.5)
    all_of_them, found = summed(added), summed(added, fewest_holders=fewest)
    holders = all_of_them.weight / 0.5
    assert torch.equal(found.weight, all_of_them.weight * (holders >= fewest))
    held = found.held(FULL)
    assert torch.equal(found.mean(FULL)[held], all_of_them.mean(FULL)[held])
    assert not found.total[~held].any()


@few
@given(cohorts)
def test_the_mean_adapter_changes_weights_by_the_mean_change(cohort):
    added = contributions([(range(NUM_EXPERTS), seed) for _, seed in cohort])
    mean = FULL.trained_factors(summed(added).mean(FULL))
    for number in (0, 2, -1):
        block = FULL.blocks[number]
        changes = [
            delta_weight(block, layout.trained_factors(update)[number], FULL.rank, FULL.seed)
            for layout, update, _ in added.values()
        ]
        expected = torch.stack(changes).mean(0)
        assert_near(delta_weight(block, mean[number], FULL.rank, FULL.seed), expected, 1e-4)


def test_one_device_alone_is_its_own_mean():
    layout = FULL.held_under(small_plan(0, 3))
    update = torch.randn(layout.size, generator=torch.Generator().manual_seed(1))
    mean = summed({"a": (layout, update, 1.0)}).mean(FULL)
    assert torch.equal(layout.take_from(FULL, mean), update)


def test_unequal_weights_weigh_per_holder():
    ones = {
        name: (layout, torch.full((layout.size,), value), weight)
        for name, layout, value, weight in (
            ("a", FULL.held_under(small_plan(0, 1)), 1.0, 3.0),
            ("b", FULL.held_under(small_plan(1, 2)), 5.0, 1.0),
        )
    }
    values = {
        block.expert: set(factor.flatten().tolist())
        for block, factor in zip(
            FULL.blocks, FULL.trained_factors(summed(ones).mean(FULL)), strict=True
        )
    }
    assert values == {None: {2.0}, 0: {1.0}, 1: {2.0}, 2: {5.0}, 3: {0.0}}


def test_the_sum_of_nobody_is_zero():
    found = PlainSum(FULL).sum()
    assert found.num_devices == 0
    assert found.mean(FULL).eq(0).all()


def test_a_second_update_of_a_device_is_refused_and_not_added():
    added = contributions([([0, 1], 1)])
    summation = PlainSum(FULL)
    summation.add("device0", *added["device0"])
    with pytest.raises(ProtocolError, match="second update of device 'device0' in one round"):
        summation.add("device0", *added["device0"])
    assert torch.equal(summation.sum().total, summed(added).total)


def test_an_update_of_another_size_is_refused():
    layout = FULL.held_under(small_plan(0))
    with pytest.raises(LayoutMismatch, match=f"for a layout of {layout.size} parameters"):
        PlainSum(FULL).add("a", layout, torch.zeros(FULL.size), 1.0)


def test_a_layout_that_is_no_part_of_the_full_one_is_refused():
    foreign = AdapterLayout(FULL.blocks[:2], FULL.rank, seed=99)
    summation = PlainSum(FULL)
    with pytest.raises(LayoutMismatch, match=r"rank and seed \(2, 99\) differ from \(2, 0\)"):
        summation.add("a", foreign, foreign.zeros(), 1.0)


def test_the_notice_does_not_promise_privacy():
    assert "sees single updates" in PlainSum.notice
