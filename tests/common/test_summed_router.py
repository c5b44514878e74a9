"""Probabilities of merged experts add up before top-k, where gates are probabilities."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.errors import UnsupportedModel
from proxymoe.common.moe import moe_layers
from proxymoe.common.summed_router import (
    AfterTopK,
    after_top_k,
    install_summed_router,
    summed_top_k,
)
from tests.tiny import tiny_model

PLAIN = AfterTopK(normalised=False, scale=1.0)


def drawn(seed: int, experts: int) -> torch.Tensor:
    return torch.randn(6, experts, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 9), st.lists(st.integers(-1, 2), min_size=4, max_size=8))
def test_a_slot_has_the_probability_of_all_its_members(seed, slots):
    slots = [0, 1, 2, *slots]
    logits = drawn(seed, len(slots))
    gates, found = summed_top_k(logits, torch.tensor(slots), 3, PLAIN)
    probability = logits.softmax(-1)
    for slot in range(3):
        members = [e for e, s in enumerate(slots) if s == slot]
        expected = probability[:, members].sum(-1)
        assert torch.allclose(gates[found == slot], expected, atol=1e-6)


@given(st.integers(0, 9))
def test_with_all_experts_kept_it_is_the_routers_own_choice(seed):
    logits = drawn(seed, 8)
    gates, found = summed_top_k(logits, torch.arange(8), 2, PLAIN)
    own = logits.softmax(-1).topk(2)
    assert torch.equal(found, own.indices)
    assert torch.allclose(gates, own.values)


@pytest.mark.parametrize(
    ("family", "rule"),
    [
        ("mixtral", AfterTopK(normalised=True, scale=1.0)),
        ("olmoe", AfterTopK(normalised=False, scale=1.0)),
        ("granitemoe", AfterTopK(normalised=True, scale=1.0)),
        ("gpt_oss", AfterTopK(normalised=True, scale=1.0)),
    ],
)
def test_what_a_family_does_after_top_k_is_found_out(family, rule):
    found = after_top_k(moe_layers(tiny_model(family))[0])
    assert found.normalised == rule.normalised
    assert found.scale == pytest.approx(rule.scale, rel=1e-3)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "granitemoe"])
def test_installed_with_every_expert_kept_it_changes_nothing(family):
    layer = moe_layers(tiny_model(family))[0]
    tokens = torch.randn(16, layer.hidden_size, generator=torch.Generator().manual_seed(0))
    _, before, chosen = layer.router(tokens)
    install_summed_router(layer, torch.arange(layer.num_routed))
    _, after, again = layer.router(tokens)
    assert torch.equal(chosen.sort().values, again.sort().values)
    assert torch.allclose(before.sort().values, after.sort().values, atol=1e-5)


@pytest.mark.parametrize("family", ["deepseek_v3", "phimoe"])
def test_a_router_without_probabilities_is_refused(family):
    layer = moe_layers(tiny_model(family))[0]
    with pytest.raises(UnsupportedModel, match="does not weigh experts by softmax"):
        install_summed_router(layer, torch.arange(layer.num_routed))
