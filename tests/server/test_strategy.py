"""Server optimisers against their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.config import FederationSettings
from proxymoe.server import strategy
from tests.tiny import assert_near

SIZE = 6
ALL = torch.ones(SIZE, dtype=torch.bool)


def draws(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SIZE, generator=generator) for _ in range(count)]


def run(settings, updates, rates=None):
    state, adapter = strategy.init(SIZE), torch.zeros(SIZE)
    for update, rate in zip(updates, rates or [1.0] * len(updates), strict=True):
        state, adapter = strategy.apply(state, adapter, update, ALL, settings, rate)
    return state, adapter


@given(st.integers(0, 1000))
def test_plain_fedavg_adds_the_mean_update_exactly(seed):
    settings = FederationSettings(strategy="fedavg", server_learning_rate=1.0, momentum=0.0)
    (update,) = draws(1, seed)
    assert torch.equal(run(settings, [update])[1], update)
    adapter = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed + 1))
    found = strategy.apply(strategy.init(SIZE), adapter, update, ALL, settings)[1]
    assert torch.equal(found, adapter + update)


def test_momentum_is_an_exponential_mean_of_updates():
    settings = FederationSettings(server_learning_rate=2.0, momentum=0.75)
    updates = draws(3)
    mean, expected = torch.zeros(SIZE), torch.zeros(SIZE)
    for update in updates:
        mean = 0.75 * mean + 0.25 * update
        expected = expected + 2.0 * mean
    assert_near(run(settings, updates)[1], expected, 1e-6)


@pytest.mark.parametrize("kind", ["fedavg", "fedadam"])
def test_what_nobody_held_rests_and_is_remembered_as_it_was(kind):
    settings = FederationSettings(
        strategy=kind, server_learning_rate=0.1, momentum=0.9, beta2=0.99, epsilon=1e-3
    )
    first, second, third = draws(3, seed=6)
    held = torch.arange(SIZE) < 2
    state, adapter = run(settings, [first])
    between, rested = strategy.apply(state, adapter, second * held, held, settings)
    after, ended = strategy.apply(between, rested, third, ALL, settings)
    assert torch.equal(rested[2:], adapter[2:])
    assert (rested[:2] != adapter[:2]).all()
    # The round in which they rested has left no trace in the others.
    alone, expected = strategy.apply(state, adapter, third, ALL, settings)
    assert torch.equal(ended[2:], expected[2:])
    assert torch.equal(after.momentum[2:], alone.momentum[2:])
    assert torch.equal(after.variance[2:], alone.variance[2:])


def test_fedadam_equals_the_published_algorithm():
    settings = FederationSettings(
        strategy="fedadam", server_learning_rate=0.1, momentum=0.9, beta2=0.99, epsilon=1e-3
    )
    updates = draws(5, seed=4)
    m, v, x = np.zeros(SIZE), np.zeros(SIZE), np.zeros(SIZE)
    for update in updates:
        delta = update.double().numpy()
        m = 0.9 * m + (1 - 0.9) * delta
        v = 0.99 * v + (1 - 0.99) * delta**2
        x = x + 0.1 * m / (np.sqrt(v) + 1e-3)
    state, adapter = run(settings, updates)
    assert_near(adapter.double(), torch.from_numpy(x), 1e-5)
    assert_near(state.variance.double(), torch.from_numpy(v), 1e-5)
    assert_near(state.momentum.double(), torch.from_numpy(m), 1e-5)


@pytest.mark.parametrize("name", ["fedavg", "fedadam"])
def test_the_rate_scales_the_step_and_not_the_memory(name):
    settings = FederationSettings.model_validate({"strategy": name, "momentum": 0.5})
    (update,) = draws(1)
    whole, half = run(settings, [update]), run(settings, [update], [0.5])
    assert_near(half[1], 0.5 * whole[1], 1e-6)
    assert torch.equal(half[0].momentum, whole[0].momentum)
    assert torch.equal(half[0].variance, whole[0].variance)


@pytest.mark.parametrize("name", ["fedavg", "fedadam"])
def test_a_zero_mean_moves_nothing_from_the_start(name):
    settings = FederationSettings.model_validate({"strategy": name})
    assert run(settings, [torch.zeros(SIZE)])[1].eq(0).all()


def test_values_passed_in_are_not_changed():
    settings = FederationSettings(strategy="fedadam", momentum=0.5)
    state, (adapter, update) = strategy.init(SIZE), draws(2)
    before = adapter.clone(), update.clone()
    strategy.apply(state, adapter, update, ALL, settings)
    assert torch.equal(adapter, before[0])
    assert torch.equal(update, before[1])
    assert state.momentum.eq(0).all()
