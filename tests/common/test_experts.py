"""The experts backend equals the stock one, and redirects and adapters mean what they say."""

from typing import Any

import pytest
import torch
from torch import nn

from proxymoe.common.experts import (
    ExpertAdapter,
    Redirect,
    expert_state,
    install_backend,
    only_valid_tokens,
)
from proxymoe.common.model import load
from proxymoe.common.moe import keep_experts, moe_layers
from tests.families import FAMILIES
from tests.tiny import assert_near, logits, some_tokens, stock, tiny_model

KEPT = [0, 2, 3, 6]


def ours(family):
    """A fresh tiny model on our backend, free to be changed."""
    model = tiny_model(family)
    install_backend(model)
    return model


def theirs(family):
    """The same model on the stock backend."""
    model = tiny_model(family)
    model.set_experts_implementation("eager")
    return model


def cut(model, offsets=None):
    """Keeps the experts KEPT of every layer and redirects the others."""
    slots = torch.tensor([KEPT.index(e) if e in KEPT else -1 for e in range(8)])
    for layer in moe_layers(model):
        weights = {n: p[KEPT].clone() for n, p in layer.experts.named_parameters()}
        keep_experts(layer, len(KEPT))
        for name, weight in weights.items():
            layer.experts.get_parameter(name).data = weight
        offset = None if offsets is None else offsets[layer.position]
        expert_state(layer.experts).redirect = Redirect(slots, offset)
    return model


def silence_others(model):
    for layer in moe_layers(model):
        for expert in set(range(8)) - set(KEPT):
            layer.experts.get_parameter("down_proj").data[expert].zero_()
    return model


def test_logits_equal_those_of_the_stock_forward(model):
    assert_near(logits(ours(model.family)), logits(theirs(model.family)))


@pytest.mark.parametrize("tokens", [1, 33])
def test_one_token_and_odd_counts_are_no_special_cases(model, tokens):
    batch = some_tokens(1, tokens)
    assert_near(logits(model.full.model, batch), logits(model.stock, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_to_the_input_equal_the_stock_ones(family):
    gradients = []
    for model in (ours(family), theirs(family)):
        embedded = model.get_input_embeddings()(some_tokens()).requires_grad_()
        model(inputs_embeds=embedded, use_cache=False).logits.square().sum().backward()
        gradients.append(embedded.grad)
    ours_grad, theirs_grad = gradients
    assert_near(ours_grad / theirs_grad.norm(), theirs_grad / theirs_grad.norm(), 1e-6)


def test_padding_never_changes_a_valid_token(model):
    short, padded = some_tokens(2, 19), torch.zeros(2, 40, dtype=torch.long)
    padded[:, :19] = short
    valid = torch.zeros(2, 40, dtype=torch.bool)
    valid[:, :19] = True
    alone = logits(model.full.model, short)
    with only_valid_tokens(valid):
        beside_padding = logits(model.full.model, padded)[:, :19]
    assert_near(beside_padding, alone)


def test_what_padding_holds_does_not_matter_at_all(model):
    valid = torch.ones(2, 32, dtype=torch.bool)
    valid[:, 20:] = False
    results = []
    for filler in (0, 97):
        tokens = some_tokens(2, 32).masked_fill(~valid, filler)
        with only_valid_tokens(valid):
            results.append(logits(model.full.model, tokens)[:, :20])
    assert torch.equal(*results)


def test_padding_is_not_routed_to_any_expert(qwen):
    seen = []
    layer = moe_layers(qwen.full.model)[0]
    expert_state(layer.experts).observer = lambda *rows: seen.append([len(part) for part in rows])
    valid = torch.zeros(2, 24, dtype=torch.bool)
    valid[0, :5] = True
    try:
        with only_valid_tokens(valid):
            logits(qwen.full.model)
        with only_valid_tokens(torch.zeros_like(valid)):
            logits(qwen.full.model)
        logits(qwen.full.model)
    finally:
        expert_state(layer.experts).observer = None
    assert seen == [[tokens * layer.top_k] * 3 for tokens in (5, 0, 48)]


def test_dropped_experts_equal_silent_ones_in_the_full_model(model):
    expected = logits(silence_others(theirs(model.family)))
    assert_near(logits(cut(ours(model.family))), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_offsets_equal_the_explicit_sum(family):
    generator = torch.Generator().manual_seed(3)
    model = ours(family)
    layer = moe_layers(model)[0]
    offset = torch.randn(8, 64, generator=generator)
    offset[KEPT] = 0.0
    experts: Any = layer.experts
    hidden = torch.randn(11, 64, generator=generator)
    index = torch.stack([torch.randperm(8, generator=generator)[:4] for _ in range(11)])
    gates = torch.rand(11, 4, generator=generator)
    expected = torch.zeros(11, 64)
    for token in range(11):
        for gate, expert in zip(gates[token], index[token].tolist(), strict=True):
            if expert in KEPT:
                gated, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
                inner = experts.act_fn(gated) * up
                expected[token] += gate * (experts.down_proj[expert] @ inner)
            else:
                expected[token] += gate * offset[expert]
    cut(model, {at.position: offset for at in moe_layers(model)})
    assert_near(layer.experts(hidden, index, gates), expected)


def test_an_expert_adapter_equals_explicitly_changed_weights(model):
    generator = torch.Generator().manual_seed(5)
    adapted, changed = ours(model.family), theirs(model.family)
    for layer, target in zip(moe_layers(adapted), moe_layers(changed), strict=True):
        inner, rank = layer.inner_size, 3

        def draw(*shape):
            return 0.1 * torch.randn(*shape, generator=generator)

        adapter = ExpertAdapter(
            gate_up_in=draw(rank, 64),
            gate_up_out=draw(8, 2 * inner, rank),
            down_in=draw(8, rank, inner),
            down_out=draw(64, rank),
        )
        expert_state(layer.experts).adapter = adapter
        target.experts.get_parameter("gate_up_proj").data += (
            adapter.gate_up_out @ adapter.gate_up_in
        )
        target.experts.get_parameter("down_proj").data += adapter.down_out @ adapter.down_in
    plain = logits(theirs(model.family))
    assert not torch.allclose(logits(adapted), plain, atol=1e-2)
    assert_near(logits(adapted), logits(changed), 2e-5)


def test_an_expert_adapter_acts_only_on_tokens_sent_to_that_expert(qwen):
    layer = moe_layers(ours("qwen2_moe"))[0]
    hidden, gates = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), torch.ones(4, 1)
    index = torch.tensor([[0], [1], [1], [2]])
    before = layer.experts(hidden, index, gates)
    trained = torch.zeros(8, 64, 2)
    trained[1] = 1.0
    expert_state(layer.experts).adapter = ExpertAdapter(
        torch.ones(2, 64), trained, torch.zeros(8, 2, 32), torch.ones(64, 2)
    )
    moved = (layer.experts(hidden, index, gates) != before).any(dim=1)
    assert moved.tolist() == [False, True, True, False]


def test_observers_see_what_every_routed_pick_contributes(qwen):
    layer = moe_layers(ours("qwen2_moe"))[0]
    generator = torch.Generator().manual_seed(0)
    hidden, gates = torch.randn(6, 64, generator=generator), torch.rand(6, 1, generator=generator)
    index = torch.tensor([[3], [1], [3], [0], [7], [3]])
    seen = []
    expert_state(layer.experts).observer = lambda *rows: seen.append(rows)
    result = layer.experts(hidden, index, gates)
    ((outputs, seen_gates, slots),) = seen
    assert slots.tolist() == sorted(index.flatten().tolist())
    order = index.flatten().argsort(stable=True)
    assert_near(outputs * seen_gates[:, None], result[order])


def test_a_stock_model_has_no_state_to_ask_for():
    with pytest.raises(AttributeError):
        expert_state(nn.Module())


def test_bf16_is_as_accurate_as_the_stock_backend_on_the_shipped_model(shipped):
    reference, tokens = stock(shipped.folder), torch.arange(5, 5 + 96).view(2, 48)
    ours_bf16 = logits(shipped.full.model, tokens)
    reference.set_experts_implementation("grouped_mm")
    theirs_bf16 = logits(reference, tokens)
    assert ours_bf16.dtype == theirs_bf16.dtype == torch.bfloat16
    exact = logits(reference.float(), tokens)
    assert_near(logits(load(shipped.full_folder, torch.float32).model, tokens), exact, 1e-4)
    assert (ours_bf16 - exact).norm() <= 1.1 * (theirs_bf16 - exact).norm()
