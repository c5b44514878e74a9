"""Plans are plain data that cannot be wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from proxymoe.common.errors import PlanError
from proxymoe.common.plan import LayerPlan, Others, Plan, RouterMode, keep_all

BASE = "ab" * 32


@st.composite
def layer_plans(draw):
    count = draw(st.integers(1, 6))
    kept = draw(st.sets(st.integers(0, count - 1), min_size=1))
    return LayerPlan(num_experts=count, kept=tuple(sorted(kept)))


plans = st.builds(
    Plan,
    base=st.just(BASE),
    layers=st.dictionaries(st.integers(0, 90), layer_plans(), min_size=1, max_size=2),
    router=st.sampled_from([RouterMode.FULL, RouterMode.SLICED]),
)


@given(plans)
def test_a_plan_survives_its_json(plan):
    again = Plan.model_validate_json(plan.model_dump_json())
    assert again == plan
    assert again.digest == plan.digest


@given(plans, plans)
def test_digests_are_equal_exactly_for_equal_plans(one, other):
    assert (one.digest == other.digest) == (one == other)


@given(plans)
def test_slots_number_the_kept_experts_in_order(plan):
    for layer in plan.layers.values():
        slots = layer.slots()
        assert [slots[expert] for expert in layer.kept] == list(range(len(layer.kept)))
        assert slots.count(-1) == layer.num_experts - len(layer.kept)


def test_keep_all_keeps_all():
    plan = keep_all(BASE, {0: 4, 3: 8})
    assert plan.keeps_all
    assert (plan.num_kept, plan.kept_fraction) == (12, 1.0)


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        ((), "at least one"),
        ((2, 1), "not ascending"),
        ((1, 1), "not ascending"),
        ((0, 4), r"outside 0\.\.3"),
        ((-1, 2), r"outside 0\.\.3"),
    ],
)
def test_an_impossible_layer_is_refused(kept, reason):
    with pytest.raises(ValidationError, match=reason):
        LayerPlan(num_experts=4, kept=kept)


@pytest.mark.parametrize("stands_for", [{1: 2}, {0: 3}, {4: 1}, {-1: 1}])
def test_only_kept_experts_stand_for_others(stands_for):
    with pytest.raises(ValidationError, match="not from experts left out to kept experts"):
        LayerPlan(num_experts=4, kept=(1, 2), stands_for=stands_for)


def test_who_is_stood_for_has_the_slot_of_the_other():
    layer = LayerPlan(num_experts=5, kept=(1, 3), stands_for={0: 3, 4: 1})
    assert layer.slots() == [1, 0, -1, 1, 0]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"layers": {}}, "at least one layer"),
        ({"others": "mean"}, "tables go with"),
        ({"tables": "00"}, "tables go with"),
        ({"others": "mean", "tables": "00", "router": "sliced"}, "sliced router"),
        ({"router": "summed"}, "summed router goes with merged"),
        ({"layers": {0: LayerPlan(num_experts=2, kept=(1,), stands_for={0: 1})}}, "stand for"),
        ({"floor": 1}, "Extra inputs"),
    ],
)
def test_a_contradictory_plan_is_refused(fields, reason):
    layers = {0: LayerPlan(num_experts=2, kept=(1,))}
    with pytest.raises(ValidationError, match=reason):
        Plan(**{"base": BASE, "layers": layers, **fields})


def test_a_plan_for_another_base_model_is_refused_by_digest():
    plan = keep_all(BASE, {0: 4})
    plan.require_base(BASE)
    with pytest.raises(PlanError, match=r"abababababab, not cdcdcdcdcdcd; make a new plan"):
        plan.require_base("cd" * 32)


def test_others_and_router_take_part_in_the_digest():
    layers = {0: LayerPlan(num_experts=2, kept=(1,))}
    variants = [
        Plan(base=BASE, layers=layers),
        Plan(base=BASE, layers=layers, router=RouterMode.SLICED),
        Plan(base=BASE, layers=layers, others=Others.MEAN, tables="00"),
        Plan(base=BASE, layers=layers, others=Others.MEAN, tables="01"),
    ]
    assert len({plan.digest for plan in variants}) == 4
