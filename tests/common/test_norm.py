"""Our RMSNorm is the stock one, bit for bit forward, and in its gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeRMSNorm

from proxymoe.common.norm import install_norms
from tests.reference import direction_of_gradient
from tests.tiny import assert_near


@given(
    st.integers(0, 1000),
    st.integers(1, 9),
    st.floats(-4, 4),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_forward_pass_has_the_stock_bits(seed, rows, exponent, dtype):
    generator = torch.Generator().manual_seed(seed)
    norm = Qwen2MoeRMSNorm(48, eps=1e-6).to(dtype).requires_grad_(False)
    norm.weight.copy_(1.0 + 0.2 * torch.randn(48, generator=generator))
    hidden = (10.0**exponent * torch.randn(rows, 48, generator=generator)).to(dtype)
    expected = norm(hidden)
    install_norms(norm)
    assert torch.equal(norm(hidden), expected)


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 100.0])
def test_the_gradient_is_the_stock_one(scale):
    generator = torch.Generator().manual_seed(0)
    norm = Qwen2MoeRMSNorm(48, eps=1e-6).requires_grad_(False)
    norm.weight.copy_(1.0 + 0.2 * torch.randn(48, generator=generator))
    gradients = []
    values, upstream = torch.randn(2, 5, 48, generator=generator)
    for ours in (False, True):
        if ours:
            install_norms(norm)
        hidden = (scale * values).requires_grad_()
        norm(hidden).backward(upstream)
        gradients.append(scale * hidden.grad)
    assert_near(gradients[1], gradients[0])


def test_a_whole_model_has_the_stock_gradients(model):
    gradients = []
    reference = model.own_stock()
    for ours in (False, True):
        if ours:
            install_norms(reference)
        gradients.append(direction_of_gradient(reference))
    assert_near(gradients[1], gradients[0], 1e-6)
