"""Our attention is the stock one, forward and in its gradient, and stands in only for that one."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.mixtral.modeling_mixtral import eager_attention_forward

from proxymoe.common.attention import NAME, attention, install_attention
from tests.reference import direction_of_gradient
from tests.tiny import assert_near, some_tokens


class _Heads(nn.Module):
    def __init__(self, num_key_value_groups):
        super().__init__()
        self.num_key_value_groups = num_key_value_groups


shapes = st.tuples(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(0, 4),
    st.sampled_from([4, 6]),
    st.sampled_from([4, 8]),
)


def _inputs(shape, dtype, seed=0):
    batch, groups, shared, length, before, size, value_size = shape
    generator = torch.Generator().manual_seed(seed)
    keys = length + before
    query = torch.randn(batch, length, groups * shared, size, generator=generator)
    key = torch.randn(batch, groups, keys, size, generator=generator)
    value = torch.randn(batch, groups, keys, value_size, generator=generator)
    hidden = torch.ones(length, keys, dtype=torch.bool).triu(before + 1)
    mask = torch.zeros(batch, 1, length, keys, dtype=dtype)
    mask.masked_fill_(hidden, torch.finfo(dtype).min)
    # As models make it: heads second, by a view.
    tensors = [query.to(dtype).transpose(1, 2), key.to(dtype), value.to(dtype)]
    return _Heads(shared), tensors, mask


@given(shapes, st.integers(0, 1000), st.booleans())
def test_output_and_gradient_are_the_stock_ones(shape, seed, masked):
    heads, tensors, mask = _inputs(shape, torch.float64, seed)
    results = []
    for function in (eager_attention_forward, attention):
        query, key, value = (t.clone().requires_grad_() for t in tensors)
        output, _ = function(heads, query, key, value, mask if masked else None, scaling=0.3)
        assert output.is_contiguous()
        upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        output.backward(upstream)
        results.append((output.detach(), query.grad, key.grad, value.grad))
    for ours, theirs in zip(*reversed(results), strict=True):
        # The stock softmax computes in fp32.
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, atol=2e-6, rtol=2e-5)


@given(shapes, st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_narrow_type_loses_no_more_than_the_stock_one(shape, dtype):
    heads, tensors, mask = _inputs(shape, dtype)
    query, key, value = (t.double() for t in tensors)
    exact, _ = attention(heads, query, key, value, mask.double(), 0.5)
    query, key, value = tensors
    ours, _ = attention(heads, query, key, value, mask, 0.5)
    theirs, _ = eager_attention_forward(heads, query, key, value, mask, 0.5)
    room = 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= (theirs - exact).abs().max() + room


def test_the_gradient_is_the_derivative():
    heads, tensors, mask = _inputs((1, 2, 2, 3, 1, 4, 6), torch.float64)
    assert torch.autograd.gradcheck(
        lambda query, key, value: attention(heads, query, key, value, mask, 0.7)[0],
        [t.clone().requires_grad_() for t in tensors],
    )


def test_dropout_is_left_to_the_stock_function():
    heads, (query, key, value), mask = _inputs((2, 2, 1, 5, 0, 4, 4), torch.float32)
    heads.train()
    results = []
    for function in (eager_attention_forward, attention):
        torch.manual_seed(3)
        results.append(function(heads, query, key, value, mask, 0.5, 0.5)[0])
    assert torch.equal(*results)


def test_a_whole_model_has_the_stock_gradients(model):
    gradients = []
    reference = model.own_stock()
    for ours in (False, True):
        if ours:
            install_attention(reference)
            assert reference.config._attn_implementation == NAME
        gradients.append(direction_of_gradient(reference))
    assert_near(gradients[1], gradients[0], 1e-6)


def test_a_variant_of_the_stock_attention_stays():
    config = GptOssConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=16,
    )
    model = GptOssForCausalLM._from_config(config, attn_implementation="eager")
    install_attention(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("use_cache", [False, True])
def test_generation_works_with_it(model, use_cache):
    reference: Any = model.own_stock()
    tokens = some_tokens()[:1, :5]
    want = reference.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=use_cache)
    install_attention(reference)
    got = reference.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=use_cache)
    assert torch.equal(got, want)
