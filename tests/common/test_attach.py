"""An attached adapter changes what the model computes by exactly its ΔW, and leaves no trace."""

import pytest
import torch
from torch.func import functional_call

from proxymoe.common.adapter import AdapterLayout, adapter_layout
from proxymoe.common.attach import AttachedAdapter
from proxymoe.common.errors import LayoutMismatch
from proxymoe.common.model import load
from proxymoe.common.plan import LayerPlan, Plan
from tests.reference import merged_weights
from tests.tiny import TinyBase, assert_near, logits, some_tokens

ALL = ("attention", "shared", "experts")


def layout_of(tiny: TinyBase, targets=ALL, rank: int = 4) -> AdapterLayout:
    return adapter_layout(tiny.base.skeleton, targets, rank, 3)


def random_vector(layout: AdapterLayout, seed: int = 0, scale: float = 0.1) -> torch.Tensor:
    return scale * torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))


def merged_logits(model, layout, vector, silent=()):
    """Logits of stock transformers with W + ΔW for weights, differentiable in the vector.

    The down projections of `silent` experts are zero.
    """
    weights = merged_weights(model, layout, vector)
    heard = torch.tensor([expert not in silent for expert in range(8)])[:, None, None]
    weights |= {
        name: w * heard for name, w in weights.items() if name.endswith("experts.down_proj")
    }
    output = functional_call(model, weights, (some_tokens(),), {"use_cache": False})
    return output.logits


def test_a_zero_adapter_is_the_identity_bit_for_bit(model):
    layout, network = layout_of(model), model.full.model
    before = logits(network)
    with AttachedAdapter(network, layout) as adapter:
        assert torch.equal(logits(network), before)
        adapter.bind(layout.zeros())
        assert torch.equal(logits(network), before)


def test_an_attached_adapter_computes_with_the_changed_weights(model):
    layout = layout_of(model)
    vector = random_vector(layout)
    expected = merged_logits(model.stock, layout, vector)
    with AttachedAdapter(model.full.model, layout) as adapter:
        adapter.bind(vector)
        found = logits(model.full.model)
    assert (found - logits(model.full.model)).abs().max() > 0.1
    assert_near(found, expected, 5e-5)


@pytest.mark.parametrize("targets", [("attention",), ("shared",), ("experts",)])
def test_each_target_alone_computes_with_its_changed_weights(qwen, targets):
    layout = layout_of(qwen, targets)
    vector = random_vector(layout, 1)
    with AttachedAdapter(qwen.full.model, layout) as adapter:
        adapter.bind(vector)
        found = logits(qwen.full.model)
    assert_near(found, merged_logits(qwen.stock, layout, vector), 5e-5)


def test_a_removed_adapter_leaves_no_trace(model):
    layout, network = layout_of(model), model.full.model
    before, keys = logits(network), set(network.state_dict())
    with AttachedAdapter(network, layout) as adapter:
        adapter.bind(random_vector(layout))
        assert not torch.equal(logits(network), before)
    assert torch.equal(logits(network), before)
    assert set(network.state_dict()) == keys
    assert not any(module._forward_hooks for module in network.modules())


def test_an_adapter_is_removed_when_the_block_fails(qwen):
    layout, before = layout_of(qwen), logits(qwen.full.model)

    def fail():
        with AttachedAdapter(qwen.full.model, layout) as adapter:
            adapter.bind(random_vector(layout))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(logits(qwen.full.model), before)


def test_vectors_take_turns_on_one_model(qwen):
    layout = layout_of(qwen)
    one, other = random_vector(layout, 1), random_vector(layout, 2)
    with AttachedAdapter(qwen.full.model, layout) as adapter:
        results = []
        for vector in (one, other, one):
            adapter.bind(vector)
            results.append(logits(qwen.full.model))
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


def test_gradients_flow_to_every_block(model):
    layout = layout_of(model)
    vector = random_vector(layout).requires_grad_()
    with AttachedAdapter(model.full.model, layout) as adapter:
        adapter.bind(vector)
        output = model.full.model(some_tokens(4, 48), use_cache=False).logits
        output.square().mean().backward()
    assert vector.grad is not None
    norms = [float(part.norm()) for part in vector.grad.split(layout.sizes)]
    assert all(norm > 0 for norm in norms)
    assert all(parameter.grad is None for parameter in model.full.model.parameters())


def test_the_gradient_is_that_of_the_changed_weights(model):
    layout = layout_of(model)
    gradients = []
    for attached in (False, True):
        vector = random_vector(layout).requires_grad_()
        with AttachedAdapter(model.full.model, layout) as adapter:
            adapter.bind(vector)
            if attached:
                output = model.full.model(some_tokens(), use_cache=False).logits
            else:
                output = merged_logits(model.stock, layout, vector)
            output.square().mean().backward()
        assert vector.grad is not None
        gradients.append(vector.grad / vector.grad.norm())
    assert_near(gradients[1], gradients[0], 2e-6)


def test_a_device_part_acts_on_its_submodel_as_on_the_full_model(model, tmp_path):
    kept = (0, 3, 4, 6)
    layers = {at: LayerPlan(num_experts=8, kept=kept) for at in model.base.num_experts}
    plan = Plan(base=model.base.digest, layers=layers)
    cut = load(model.base.materialise(plan, tmp_path / "cut"))
    full = layout_of(model)
    part = full.held_under(plan)
    vector = random_vector(full)
    expected = merged_logits(model.stock, full, vector, silent=set(range(8)) - set(kept))
    with AttachedAdapter(cut.model, part) as adapter:
        adapter.bind(part.take_from(full, vector))
        assert_near(logits(cut.model), expected, 5e-5)


def test_an_adapter_for_other_experts_than_the_model_holds_is_refused(qwen, tmp_path):
    layers = {at: LayerPlan(num_experts=8, kept=(1, 2)) for at in (0, 1)}
    plan = Plan(base=qwen.base.digest, layers=layers)
    cut = load(qwen.base.materialise(plan, tmp_path / "cut"))
    with pytest.raises(LayoutMismatch, match="adapter for 8 experts, model holds 2"):
        AttachedAdapter(cut.model, layout_of(qwen))
    with pytest.raises(LayoutMismatch, match="adapter for 2 experts, model holds 8"):
        AttachedAdapter(qwen.full.model, layout_of(qwen).held_under(plan))


def test_an_adapter_for_modules_the_model_lacks_is_refused_by_name(qwen, tiny):
    layout = layout_of(tiny("deepseek_v2"), ("attention",))
    before = sum(len(module._forward_hooks) for module in qwen.full.model.modules())
    with pytest.raises(LayoutMismatch, match=r"the model has no module .*kv_a_proj"):
        AttachedAdapter(qwen.full.model, layout)
    experts = layout_of(tiny("qwen3_moe"), ("experts",))
    with pytest.raises(LayoutMismatch, match=r"the model has no module model\.layers\.2\.mlp"):
        AttachedAdapter(qwen.full.model, experts)
    assert sum(len(module._forward_hooks) for module in qwen.full.model.modules()) == before


def test_a_vector_of_another_layout_is_refused(qwen):
    layout = layout_of(qwen)
    with (
        AttachedAdapter(qwen.full.model, layout) as adapter,
        pytest.raises(LayoutMismatch, match="another plan, rank or base model"),
    ):
        adapter.bind(torch.zeros(layout.size - 1))
