"""Neurons of an expert may be put in any order, found again, and averaged."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.server.neurons import Fused, Neurons, aligned, averaged, read_neurons, write_neurons

INNER, HIDDEN = 5, 4
LAYOUTS = [Fused(*flags) for flags in product((False, True), repeat=2)]


def weights(fused: Fused, seed: int, *, bias: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "gate_up_proj": (2 * INNER, HIDDEN),
        "down_proj": (HIDDEN, INNER),
    }
    if fused.transposed:
        shapes = {name: shape[::-1] for name, shape in shapes.items()}
    if bias:
        shapes |= {"gate_up_proj_bias": (2 * INNER,), "down_proj_bias": (HIDDEN,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def output(found: dict[str, torch.Tensor], fused: Fused, x: torch.Tensor) -> torch.Tensor:
    """The expert written out, from its fused weights."""
    gate_up, down = found["gate_up_proj"], found["down_proj"]
    if fused.transposed:
        gate_up, down = gate_up.T, down.T
    inner = x @ gate_up.T + found.get("gate_up_proj_bias", torch.zeros(()))
    halves = inner.chunk(2, -1) if fused.concatenated else (inner[..., 0::2], inner[..., 1::2])
    gate, up = halves
    return (gate.sigmoid() * up) @ down.T + found.get("down_proj_bias", torch.zeros(()))


def bias_of(neurons: Neurons) -> torch.Tensor:
    assert neurons.output_bias is not None
    return neurons.output_bias


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fused", LAYOUTS)
def test_reading_and_writing_gives_the_same_weights(fused, bias):
    before = weights(fused, 0, bias=bias)
    after = write_neurons(read_neurons(before, fused), fused, torch.float32)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fused", LAYOUTS)
@given(st.permutations(range(INNER)))
def test_the_order_of_neurons_does_not_change_the_expert(fused, bias, order):
    before = weights(fused, 1, bias=bias)
    moved = read_neurons(before, fused).reordered(torch.tensor(order))
    after = write_neurons(moved, fused, torch.float32)
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(output(before, fused, x), output(after, fused, x), atol=1e-5)


@given(st.permutations(range(INNER)), st.floats(0, 0.01))
def test_alignment_finds_the_order_again(order, noise):
    reference = read_neurons(weights(LAYOUTS[0], 3, bias=False), LAYOUTS[0])
    member = reference.reordered(torch.tensor(order))
    member.rows.add_(noise)
    found = aligned(reference, member)
    assert torch.equal(torch.tensor(order)[found], torch.arange(INNER))


def test_an_average_of_equal_experts_is_that_expert():
    one = read_neurons(weights(LAYOUTS[0], 4, bias=True), LAYOUTS[0])
    for shares in ((1.0, 3.0), (0.0, 0.0)):
        same = averaged([one, one], shares)
        assert torch.allclose(same.rows, one.rows)
        assert torch.allclose(bias_of(same), bias_of(one))


def test_an_average_follows_the_weights():
    one, two = (read_neurons(weights(LAYOUTS[0], s, bias=True), LAYOUTS[0]) for s in (5, 6))
    mean = averaged([one, two], (1.0, 3.0))
    assert torch.allclose(mean.rows, 0.25 * one.rows + 0.75 * two.rows)
    assert torch.allclose(bias_of(mean), 0.25 * bias_of(one) + 0.75 * bias_of(two))
