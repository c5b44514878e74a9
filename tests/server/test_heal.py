"""Healing brings a submodel nearer to the full model, and leaves one that lacks nothing alone."""

import pytest
import torch

from proxymoe.common.adapter import adapter_layout
from proxymoe.common.attach import AttachedAdapter
from proxymoe.common.errors import Diverged
from proxymoe.common.loss import predicted_states
from proxymoe.common.model import load
from proxymoe.common.plan import LayerPlan, Plan
from proxymoe.common.text import packed_batches
from proxymoe.server.heal import distance, heal, layer_outputs, watched
from tests.reference import examples_of
from tests.tiny import assert_near


def cut(model, folder, kept=(1, 2, 4, 7)):
    layers = {at: LayerPlan(num_experts=8, kept=kept) for at in model.base.num_experts}
    plan = Plan(base=model.base.digest, layers=layers)
    layout = adapter_layout(model.base.skeleton, ("attention", "shared"), 4, 3)
    return load(model.base.materialise(plan, folder)).model, layout.held_under(plan)


def off(model, layout, batch, wanted, vector=None) -> float:
    with AttachedAdapter(model, layout) as adapter, torch.no_grad():
        if vector is not None:
            adapter.bind(vector)
        with watched(model, batch) as outputs:
            predicted_states(model, batch)
    return float(distance(outputs, wanted))


def test_healing_brings_the_layers_nearer_to_the_full_models(model, tmp_path):
    (batch,) = packed_batches(examples_of())
    wanted = layer_outputs(model.full.model, [batch])
    proxy, layout = cut(model, tmp_path)
    vector = heal(proxy, layout, [batch], wanted, steps=25, learning_rate=3e-3)
    before, after = (off(proxy, layout, batch, wanted[0], v) for v in (None, vector))
    assert after < 0.95 * before


def test_a_submodel_that_keeps_all_is_healthy(model):
    batches = packed_batches(examples_of())
    wanted = layer_outputs(model.full.model, batches)
    layout = adapter_layout(model.base.skeleton, ("attention",), 4, 3)
    assert off(model.full.model, layout, batches[0], wanted[0]) == 0.0
    vector = heal(model.full.model, layout, batches, wanted, steps=2, learning_rate=0.02)
    assert_near(vector, torch.zeros_like(vector))


def test_padding_is_not_imitated(qwen):
    (batch,) = packed_batches(examples_of())
    (outputs,) = layer_outputs(qwen.full.model, [batch])
    assert all(each.shape == (int(batch.valid.sum()), 64) for each in outputs)
    assert len(outputs) == 2


def test_healing_that_explodes_is_refused(qwen, tmp_path):
    batches = packed_batches(examples_of())
    wanted = layer_outputs(qwen.full.model, batches)
    proxy, layout = cut(qwen, tmp_path)
    wanted[0][0].fill_(float("nan"))
    with pytest.raises(Diverged, match="healing adapter is not finite"):
        heal(proxy, layout, batches, wanted, steps=1, learning_rate=0.02)
