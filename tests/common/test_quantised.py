"""Quantised experts: their errors are bounded, and a model computes with what they stand for."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from proxymoe.common.adapter import Target, adapter_layout
from proxymoe.common.attach import AttachedAdapter
from proxymoe.common.checkpoint import WEIGHTS, Checkpoint
from proxymoe.common.errors import ConfigError, IntegrityError, UnsupportedModel
from proxymoe.common.manifest import materialise
from proxymoe.common.model import LoadedModel, load
from proxymoe.common.moe import moe_layers
from proxymoe.common.plan import LayerPlan, Plan, Precision
from proxymoe.common.quantised import (
    GROUP,
    QuantisedWeight,
    dequantise,
    hold_quantised,
    quantise,
    quantised_bytes,
    quantised_shapes,
)
from proxymoe.server.settings import load_settings
from tests.laws import tried
from tests.tiny import TinyBase, logits, save_tiny, some_tokens, tiny_model

NARROW = (Precision.INT8, Precision.INT4)
ROUNDED_SCALE = 1 + 2.0**-8
"""How much larger a scale may be than it was before it became bf16."""

narrow = st.sampled_from(NARROW)


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    rows, width = draw(st.integers(1, 5)), draw(st.sampled_from([8, 16, 32, 48, 64, 96]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    found = torch.randn(rows, width, generator=generator) * 10.0 ** draw(st.integers(-6, 4))
    return found ** draw(st.sampled_from([1, 3]))  # with outliers, too


def round_trip(found: torch.Tensor, precision: Precision) -> torch.Tensor:
    return dequantise(*quantise(found, precision), torch.float32)


def plan_of(tiny: TinyBase, experts: Precision, kept: tuple[int, ...] = (1, 2, 4, 7)) -> Plan:
    layers = {at: LayerPlan(num_experts=8, kept=kept) for at in tiny.base.num_experts}
    return Plan(base=tiny.base.digest, layers=layers, experts=experts)


def widened(narrowed: LoadedModel) -> nn.Module:
    """The same model with ordinary parameters, which hold what the codes stand for."""
    for layer in moe_layers(narrowed.model):
        for name, held in list(layer.experts.named_children()):
            if isinstance(held, QuantisedWeight):
                plain = dequantise(held.codes, held.scales, narrowed.model.dtype)
                del layer.experts._modules[name]
                layer.experts.register_parameter(name, nn.Parameter(plain, requires_grad=False))
    return narrowed.model


@tried(50)
@given(weights())
def test_no_number_errs_by_more_than_half_a_scale_in_int8(found):
    largest = found.abs().amax(-1, keepdim=True)
    error = (round_trip(found, Precision.INT8) - found).abs()
    assert (error <= largest / 127 / 2 * ROUNDED_SCALE).all()


@tried(50)
@given(weights())
def test_a_group_errs_by_no_more_than_rounding_to_sevenths_of_its_largest_would(found):
    groups = found.reshape(-1, math.gcd(GROUP, found.shape[1]))
    error = round_trip(found, Precision.INT4).reshape(groups.shape) - groups
    largest = groups.abs().amax(-1)
    assert (error.square().mean(-1).sqrt() <= largest / 7 / 2 * ROUNDED_SCALE).all()


@tried(20)
@given(weights())
def test_quantising_twice_is_quantising_once_in_int8(found):
    once = round_trip(found, Precision.INT8)
    assert torch.equal(round_trip(once, Precision.INT8), once)


@tried(20)
@given(weights(), narrow)
def test_rows_may_come_one_at_a_time(found, precision):
    whole = quantise(found, precision)
    for row in range(found.shape[0]):
        for part, all_of_it in zip(quantise(found[row : row + 1], precision), whole, strict=True):
            assert torch.equal(part[0], all_of_it[row])


@tried(20)
@given(weights(), narrow)
def test_a_narrow_type_gets_the_rounded_numbers_of_a_wide_one(found, precision):
    codes, scales = quantise(found, precision)
    wide = dequantise(codes, scales, torch.float32)
    assert torch.equal(dequantise(codes, scales, torch.bfloat16), wide.bfloat16())


@tried(20)
@given(weights(), narrow)
def test_codes_and_scales_take_the_bytes_that_were_counted(found, precision):
    codes, scales = quantise(found, precision)
    shape = tuple(found.shape)
    assert (tuple(codes.shape), tuple(scales.shape)) == quantised_shapes(shape, precision)
    assert codes.nbytes + scales.nbytes == quantised_bytes(shape, precision)


@pytest.mark.parametrize("precision", NARROW)
def test_zeros_stay_zeros(precision):
    found = torch.zeros(3, 64)
    found[1, 40] = -2.0
    back = round_trip(found, precision)
    assert (back[found == 0] == 0).all()
    assert back[1, 40] == pytest.approx(-2.0, rel=2**-8)


def test_int4_needs_rows_that_fall_into_groups():
    for width in (31, 36):
        with pytest.raises(UnsupportedModel, match=f"rows of {width} weights.*use experts = 'int8"):
            quantised_shapes((4, width), Precision.INT4)
        assert quantised_shapes((4, width), Precision.INT8) == ((4, width), (4, 1))


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "gpt_oss"])
def test_a_submodel_computes_with_what_its_codes_stand_for(tiny, tmp_path, family, precision):
    source = tiny(family)
    folder = source.base.materialise(plan_of(source, precision), tmp_path / "cut")
    loaded = load(folder)
    targets: tuple[Target, ...] = ("attention", "experts") if family == "olmoe" else ("attention",)
    layout = adapter_layout(source.base.skeleton, targets, 4, 0).held_under(loaded.plan)
    generator = torch.Generator().manual_seed(3)
    start = 0.1 * torch.randn(layout.size, generator=generator)

    def outcome(model):
        vector = start.clone().requires_grad_()
        with AttachedAdapter(model, layout) as adapter:
            adapter.bind(vector)
            found = model(some_tokens(), use_cache=False).logits
            found.square().mean().backward()
        return found.detach(), vector.grad

    found, slope = outcome(loaded.model)
    expected, its_slope = outcome(widened(load(folder)))
    assert torch.equal(found, expected)
    assert torch.equal(slope, its_slope)
    assert slope.abs().max() > 0


@pytest.mark.parametrize(("precision", "limit"), [(Precision.INT8, 0.02), (Precision.INT4, 0.25)])
def test_the_full_model_quantised_is_near_the_full_model(qwen, tmp_path, precision, limit):
    plan = qwen.base.keep_all(precision)
    loaded = load(qwen.base.materialise(plan, tmp_path / "narrow"))
    assert loaded.plan.keeps_all
    assert not loaded.plan.is_base
    full = logits(qwen.full.model)
    error = (logits(loaded.model) - full).norm() / full.norm()
    assert 0 < error < limit


@pytest.mark.parametrize("precision", NARROW)
def test_a_submodel_stores_what_the_manifest_counts(qwen, tmp_path, precision):
    plan = plan_of(qwen, precision)
    folder = qwen.base.materialise(plan, tmp_path / "cut")
    ranges = Checkpoint(folder).ranges
    assert sum(place.num_bytes for place in ranges.values()) == qwen.base.manifest(plan).num_bytes
    experts = sum(place.num_bytes for name, place in ranges.items() if ".experts." in name)
    held = qwen.base.held_expert_bytes(precision)
    assert experts == sum(4 * held[at] for at in plan.layers)
    stored = qwen.base.expert_bytes  # in fp32, as these tests' checkpoints are
    assert all(held[at] < stored[at] * {"int8": 0.27, "int4": 0.15}[precision] for at in held)


def test_in_memory_too_nothing_but_codes_and_scales_is_held(qwen, tmp_path):
    loaded = load(qwen.base.materialise(plan_of(qwen, Precision.INT4), tmp_path / "cut"))
    for layer in moe_layers(loaded.model):
        held = sum(p.nbytes for p in layer.experts.parameters())
        assert held == 4 * qwen.base.held_expert_bytes(Precision.INT4)[layer.position]


def test_nothing_of_an_expert_is_kept_for_the_backward_pass(tmp_path):
    hidden, inner = 64, 40  # no other matrix has these sizes
    source = TinyBase("qwen2_moe", tmp_path)
    source.folder = save_tiny("qwen2_moe", tmp_path / "published", moe_intermediate_size=inner)
    loaded = load(source.base.materialise(plan_of(source, Precision.INT8), tmp_path / "cut"))
    layout = adapter_layout(source.base.skeleton, ("attention",), 4, 0)
    shapes = set()

    def note(kept: torch.Tensor) -> torch.Tensor:
        shapes.add(tuple(kept.shape))
        return kept

    with AttachedAdapter(loaded.model, layout) as adapter:
        adapter.bind(layout.zeros().requires_grad_())
        with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
            loaded.model(some_tokens(), use_cache=False)
    ours = {(2 * inner, hidden), (hidden, inner)}
    assert not {shape for shape in shapes if {shape[-2:], shape[:-3:-1]} & ours}


def test_a_plan_says_how_its_experts_are_held(qwen):
    plans = [plan_of(qwen, precision) for precision in Precision]
    assert len({plan.digest for plan in plans}) == len(plans)
    for plan in plans:
        assert Plan.model_validate_json(plan.model_dump_json()) == plan
        assert qwen.base.manifest(plan).config["proxy_moe"]["experts"] == plan.experts


def test_a_precision_that_nobody_knows_is_refused(tmp_path):
    path = tmp_path / "coordinator.toml"
    path.write_text('run = "r"\nbase_model = "b"\ncalibration = "c"\n[extract]\nexperts = "int2"\n')
    with pytest.raises(ConfigError, match=r"extract\.experts: .*'bf16', 'int8' or 'int4'"):
        load_settings(path)


def test_pieces_are_verified_before_they_are_quantised(qwen, tmp_path):
    manifest = qwen.base.manifest(plan_of(qwen, Precision.INT4))
    other = manifest.pieces[-1]
    with pytest.raises(IntegrityError, match="fetch it again"):
        materialise(
            manifest,
            tmp_path / "cut",
            lambda p: bytes(p.num_bytes) if p == other else qwen.base.read_piece(p),
            qwen.base.read_companion,
        )
    assert not (tmp_path / "cut" / WEIGHTS).exists()


def test_a_model_of_uneven_experts_is_refused_before_anything_is_written(tmp_path):
    source = TinyBase("qwen2_moe", tmp_path)
    source.folder = save_tiny("qwen2_moe", tmp_path / "published", moe_intermediate_size=36)
    with pytest.raises(UnsupportedModel, match="rows of 36 weights"):
        source.base.materialise(plan_of(source, Precision.INT4), tmp_path / "cut")
    assert not (Path(tmp_path) / "cut" / WEIGHTS).exists()


def test_an_experts_module_keeps_its_sizes():
    model = tiny_model("gpt_oss")
    layers = moe_layers(model)
    before = [(la.num_experts, la.hidden_size, la.inner_size) for la in layers]
    for layer in layers:
        hold_quantised(layer.experts, Precision.INT4)
    assert [(la.num_experts, la.hidden_size, la.inner_size) for la in moe_layers(model)] == before
