"""An adapter is one vector: its layout, its frozen factors, and the linearity that all rests on."""

import hashlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.adapter import (
    FROZEN_OUT_STD,
    SCALE,
    AdapterLayout,
    Block,
    Target,
    adapter_layout,
    delta_weight,
    factors,
    frozen_factor,
)
from proxymoe.common.checkpoint import bytes_of
from proxymoe.common.errors import LayoutMismatch
from proxymoe.common.plan import LayerPlan, Plan
from tests.families import FAMILIES
from tests.tiny import assert_near, tiny_model

BASE = "ab" * 32
ALL: tuple[Target, ...] = ("attention", "shared", "experts")


@st.composite
def layouts(draw):
    """Layouts of one attention module and 1-6 experts of two layers, any sizes."""
    rank, seed = draw(st.integers(1, 5)), draw(st.integers(0, 3))
    hidden, inner, count = draw(st.tuples(*[st.integers(1, 6)] * 3))
    blocks = [Block("model.layers.0.self_attn.q_proj", None, hidden, inner, "B")]
    for at in (0, 1):
        path = f"model.layers.{at}.mlp.experts"
        ids = range(count)
        blocks += [Block(f"{path}.gate_up_proj", e, hidden, 2 * inner, "B") for e in ids]
        blocks += [Block(f"{path}.down_proj", e, inner, hidden, "A") for e in ids]
    return AdapterLayout(tuple(blocks), rank, seed)


@st.composite
def held(draw):
    """A full layout, and the part of it that some plan holds."""
    full = draw(layouts())
    count = 1 + max(block.expert for block in full.blocks if block.expert is not None)
    kept = st.sets(st.integers(0, count - 1), min_size=1).map(lambda ids: tuple(sorted(ids)))
    layers = {at: LayerPlan(num_experts=count, kept=draw(kept)) for at in (0, 1)}
    plan = Plan(base=BASE, layers=layers)
    return full, full.held_under(plan), plan


def random_vector(layout, seed=0):
    return torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))


@given(held())
def test_a_device_holds_trunk_blocks_and_those_of_its_kept_experts(case):
    full, part, plan = case
    expected = [b for b in full.blocks if b.expert is None or b.expert in plan.layers[b.layer].kept]
    assert list(part.blocks) == expected
    assert (part.rank, part.seed) == (full.rank, full.seed)


@given(held())
def test_taking_a_part_and_putting_it_back_are_consistent(case):
    full, part, _ = case
    vector = torch.arange(1.0, full.size + 1)
    taken = part.take_from(full, vector)
    for block, start, _ in part.positions_in(full):
        assert full.blocks[block] == part.blocks[part.bounds.index(start)]
    back = part.put_into(full, full.zeros(), taken)
    assert taken.numel() == part.size == int((back != 0).sum())
    assert torch.equal(back[back != 0], vector[back != 0])
    assert torch.equal(part.take_from(full, back), taken)


@given(held())
def test_factors_of_a_part_are_factors_of_the_whole(case):
    full, part, _ = case
    vector = random_vector(full)
    whole = dict(zip(full.blocks, full.trained_factors(vector), strict=True))
    taken = part.trained_factors(part.take_from(full, vector))
    for block, factor in zip(part.blocks, taken, strict=True):
        assert factor.shape == block.trained_shape(full.rank)
        assert torch.equal(factor, whole[block])


def test_taking_from_oneself_is_a_copy():
    layout = AdapterLayout((Block("model.layers.0.a", None, 3, 2, "B"),), 2, 0)
    vector = random_vector(layout)
    taken = layout.take_from(layout, vector)
    taken.zero_()
    assert vector.abs().min() > 0


@given(layouts(), layouts())
def test_digests_are_equal_exactly_for_equal_layouts(one, other):
    assert (one.digest == other.digest) == (one == other)


@given(layouts(), st.integers(0, 100))
def test_the_change_of_a_weight_is_linear_in_the_vector(layout, seed):
    a, b = random_vector(layout, seed), random_vector(layout, seed + 1)
    parts = [layout.trained_factors(v) for v in (a, b, 0.25 * a + 3.0 * b)]
    for block, x, y, mixed in zip(layout.blocks, *parts, strict=True):
        dx, dy, dm = (delta_weight(block, t, layout.rank, layout.seed) for t in (x, y, mixed))
        assert dx.shape == (block.out_features, block.in_features)
        assert_near(dm, 0.25 * dx + 3.0 * dy, 1e-4)


@given(layouts())
def test_zeros_change_no_weight(layout):
    for block, trained in zip(layout.blocks, layout.trained_factors(layout.zeros()), strict=True):
        assert delta_weight(block, trained, layout.rank, layout.seed).eq(0).all()


def test_the_change_is_scale_times_b_times_a():
    up, down = Block("layers.0.up", None, 6, 4, "B"), Block("layers.0.down", None, 4, 6, "A")
    for block in (up, down):
        trained = torch.ones(block.trained_shape(2))
        a, b = factors(block, trained, 2, 7)
        assert (a.shape, b.shape) == ((2, block.in_features), (block.out_features, 2))
        assert torch.equal(a if block.trains == "A" else b, trained)
        assert torch.equal(delta_weight(block, trained, 2, 7), SCALE * (b @ a))


def test_frozen_factors_are_shared_by_experts_and_differ_otherwise():
    module = "model.layers.0.mlp.experts.gate_up_proj"
    factor = frozen_factor(Block(module, 0, 64, 32, "B"), 8, 1)
    assert torch.equal(factor, frozen_factor(Block(module, 5, 64, 32, "B"), 8, 1))
    others = [
        frozen_factor(Block(module.replace("0", "1"), 0, 64, 32, "B"), 8, 1),
        frozen_factor(Block(module, 0, 64, 32, "B"), 8, 2),
        frozen_factor(Block(module.replace("gate_up", "down"), 0, 64, 32, "B"), 8, 1),
    ]
    assert all((other != factor).float().mean() > 0.99 for other in others)


@pytest.mark.parametrize(
    ("trains", "std"), [("B", 1 / math.sqrt(1024)), ("A", FROZEN_OUT_STD / math.sqrt(64))]
)
def test_frozen_factors_have_the_variance_of_the_usual_draw(trains, std):
    factor = frozen_factor(Block("model.layers.0.x", None, 1024, 1024, trains), 64, 0)
    assert float(factor.std()) == pytest.approx(std, rel=0.01)
    assert abs(float(factor.mean())) < 0.01 * std
    assert float(factor.abs().max()) <= math.sqrt(3) * std * (1 + 1e-6)


def test_frozen_factors_have_the_same_bits_on_every_machine():
    draws = [
        frozen_factor(Block("model.layers.3.self_attn.q_proj", None, 37, 11, "B"), 16, 0),
        frozen_factor(Block("model.layers.3.mlp.experts.down_proj", 4, 37, 11, "A"), 16, 2**40),
    ]
    digest = hashlib.sha256(b"".join(map(bytes_of, draws))).hexdigest()
    assert digest == "8f580531958c9dcb0c99ee6e0655a90cf9c273e0c135b73df43968db279b5828"


@pytest.mark.parametrize(
    ("targets", "leaves"),
    [
        (("attention",), {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (("shared",), {"gate_proj", "up_proj", "down_proj"}),
        (("experts",), {"gate_up_proj", "down_proj"}),
    ],
)
def test_targets_choose_the_modules_that_are_adapted(qwen, targets, leaves):
    layout = adapter_layout(qwen.base.skeleton, targets, 4, 0)
    assert {block.module.rpartition(".")[2] for block in layout.blocks} == leaves
    assert all((block.expert is not None) == (targets == ("experts",)) for block in layout.blocks)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral"])
def test_families_without_shared_experts_adapt_routed_ones_instead(tiny, family):
    skeleton = tiny(family).base.skeleton
    shared, experts = (adapter_layout(skeleton, (t,), 4, 0) for t in ("shared", "experts"))
    assert shared == experts
    assert shared.size > 0


def test_the_factor_on_the_hidden_side_is_the_frozen_one(model):
    layout = adapter_layout(model.base.skeleton, ALL, 4, 0)
    for block in layout.blocks:
        sides = (block.in_features, block.out_features)
        frozen = block.in_features if block.trains == "B" else block.out_features
        assert frozen == 64 or 64 not in sides  # latent attention has projections off the stream


@pytest.mark.parametrize("family", FAMILIES)
def test_meta_models_and_real_ones_have_the_same_layout(tiny, family):
    on_meta = adapter_layout(tiny(family).base.skeleton, ALL, 4, 9)
    assert adapter_layout(tiny_model(family), ALL, 4, 9).digest == on_meta.digest


def test_a_vector_of_the_wrong_size_is_refused_with_both_sizes():
    layout = AdapterLayout((Block("model.layers.0.a", None, 3, 2, "B"),), 2, 0)
    for wrong in (torch.zeros(3), torch.zeros(5), torch.zeros(4, 1)):
        with pytest.raises(LayoutMismatch, match=r"shape \(.*\) for a layout of 4 parameters"):
            layout.require(wrong)
        with pytest.raises(LayoutMismatch, match="another plan, rank or base model"):
            layout.take_from(layout, wrong)


def test_a_layout_that_is_no_part_is_refused_by_the_block(qwen):
    full = adapter_layout(qwen.base.skeleton, ("attention",), 4, 0)
    other = adapter_layout(qwen.base.skeleton, ("shared",), 4, 0)
    with pytest.raises(LayoutMismatch, match=r"shared_expert.*is not part of the full layout"):
        other.positions_in(full)
    for rank, seed in ((8, 0), (4, 1)):
        with pytest.raises(LayoutMismatch, match=r"rank and seed \(\d, \d\) differ from \(4, 0\)"):
            AdapterLayout(full.blocks, rank, seed).positions_in(full)


def test_targets_that_match_nothing_are_refused(qwen):
    with pytest.raises(LayoutMismatch, match=r"no module of Qwen2Moe.* matches the targets \(\)"):
        adapter_layout(qwen.base.skeleton, (), 4, 0)
