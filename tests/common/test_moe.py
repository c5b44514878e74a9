"""Discovery by structure: what a MoE layer is in every family, and what is refused."""

import pytest
import torch
from torch import nn

from proxymoe.common.errors import UnsupportedModel
from proxymoe.common.moe import (
    attention_linears,
    keep_experts,
    layer_number,
    moe_layers,
    slice_router,
    writes_to_stream,
)
from tests.tiny import logits, tiny_model

EXPECTED = {
    # family: (decoder layers, K, I, router tensors of two dimensions and of one)
    "qwen2_moe": ([0, 1], 4, 32, {"gate.weight": 0}),
    "qwen3_moe": ([0, 2], 4, 32, {"gate.weight": 0}),
    "olmoe": ([0, 1], 4, 32, {"gate.weight": 0}),
    "mixtral": ([0, 1], 2, 48, {"gate.weight": 0}),
    "deepseek_v2": ([1, 2], 3, 32, {"gate.weight": 0}),
    "deepseek_v3": ([1, 2], 2, 32, {"gate.weight": 0, "gate.e_score_correction_bias": 0}),
}


def test_layers_and_shapes_are_found_in_every_family(model):
    positions, top_k, inner, router = EXPECTED[model.family]
    layers = moe_layers(model.full.model)
    assert [layer.position for layer in layers] == positions
    for layer in layers:
        assert (layer.num_experts, layer.num_routed, layer.top_k) == (8, 8, top_k)
        assert (layer.hidden_size, layer.inner_size) == (64, inner)
        assert layer.router_tensors() == router
        assert layer.name == f"model.layers.{layer.position}.mlp"


def test_a_meta_model_shows_the_same_layers_as_a_real_one(model):
    def shape(layer):
        return layer.name, layer.num_experts, layer.top_k, layer.hidden_size, layer.inner_size

    on_meta = moe_layers(model.base.skeleton)
    assert [shape(a) for a in on_meta] == [shape(b) for b in moe_layers(model.full.model)]


def test_shared_experts_are_found_where_a_family_has_them(model):
    counts = [len(list(layer.shared_expert_linears())) for layer in moe_layers(model.base.skeleton)]
    has_shared = model.family in ("qwen2_moe", "deepseek_v2", "deepseek_v3")
    assert counts == [3, 3] if has_shared else counts == [0, 0]


def test_every_attention_projection_is_found_in_every_layer(model):
    config = model.base.config
    found = [path for path, _ in attention_linears(model.base.skeleton)]
    assert {layer_number(path) for path in found} == set(range(config.num_hidden_layers))
    assert sum(map(writes_to_stream, found)) == config.num_hidden_layers
    assert len(found) == 4 * config.num_hidden_layers
    assert all("self_attn" in path for path in found)


def test_a_dense_model_is_refused():
    with pytest.raises(
        UnsupportedModel, match=r"LlamaForCausalLM has no mixture-of-experts.*needs"
    ):
        moe_layers(tiny_model("llama"))


def test_experts_with_half_their_biases_are_refused_by_name():
    model = tiny_model("gpt_oss")
    del model.model.layers[0].mlp.experts.down_proj_bias
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.0\.mlp.*gate_up_proj_bias"):
        moe_layers(model)


def test_experts_that_say_they_are_transposed_and_are_not_are_refused():
    model = tiny_model("mixtral")
    model.model.layers[1].mlp.experts.is_transposed = True
    with pytest.raises(UnsupportedModel, match=r"layers\.1.*expected \(E, D, 2I\) and \(E, I, D\)"):
        moe_layers(model)


@pytest.mark.parametrize(("flag", "value"), [("has_gate", False), ("has_post_expert_norm", True)])
def test_experts_that_compute_something_else_are_refused_by_flag(flag, value):
    model = tiny_model("mixtral")
    setattr(model.model.layers[1].mlp.experts, flag, value)
    with pytest.raises(UnsupportedModel, match=rf"layers\.1.*MixtralExperts with {flag}={value}"):
        moe_layers(model)


def test_experts_of_another_shape_are_refused_with_their_shapes():
    model = tiny_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = nn.Parameter(torch.zeros(8, 64, 96))
    with pytest.raises(
        UnsupportedModel, match=r"gate_up_proj \(8, 64, 96\).*expected \(E, 2I, D\)"
    ):
        moe_layers(model)


def test_a_router_without_a_weight_per_expert_is_refused():
    model = tiny_model("mixtral")
    model.model.layers[0].mlp.gate = nn.Identity()
    with pytest.raises(UnsupportedModel, match=r"router Identity has no \(E, D\) weight"):
        moe_layers(model)


def test_a_router_without_top_k_is_refused_by_the_block():
    layer = moe_layers(tiny_model("mixtral"))[1]
    for owner in (layer.router, layer.block):
        if hasattr(owner, "top_k"):
            del owner.top_k
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp: neither router nor block has"):
        _ = layer.top_k


def test_a_path_without_a_layer_number_is_refused():
    with pytest.raises(UnsupportedModel, match="lm_head: no layer number"):
        layer_number("lm_head")


def test_keeping_fewer_experts_leaves_the_router_whole(model):
    cut = tiny_model(model.family)
    for layer in moe_layers(cut):
        keep_experts(layer, 3)
        assert (layer.num_experts, layer.num_routed) == (3, 8)


@pytest.mark.parametrize("kept", [2, 3, 8])
def test_a_sliced_router_chooses_among_the_rows_left(model, kept):
    cut = tiny_model(model.family)
    for layer in moe_layers(cut):
        expected = min(layer.top_k, kept)
        slice_router(layer, kept)
        keep_experts(layer, kept)
        for tensor in (*layer.router.parameters(), *layer.router.buffers()):
            nn.init.normal_(tensor)
        for parameter in layer.experts.parameters():
            nn.init.normal_(parameter, std=0.1)
        assert (layer.num_experts, layer.num_routed, layer.top_k) == (kept, kept, expected)
        assert {cut.get_parameter(f"{layer.name}.gate.weight").shape[0]} == {kept}
    assert bool(torch.isfinite(logits(cut)).all())


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_a_group_limited_router_is_not_sliced_down_to_one_row(family):
    layer = moe_layers(tiny_model(family))[0]
    with pytest.raises(
        UnsupportedModel, match=r"at least 2 kept experts, got 1; .*router = 'full'"
    ):
        slice_router(layer, 1)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "olmoe", "mixtral"])
def test_an_ungrouped_router_may_be_sliced_down_to_one_row(family):
    layer = moe_layers(tiny_model(family))[0]
    slice_router(layer, 1)
    assert (layer.num_routed, layer.top_k) == (1, 1)
