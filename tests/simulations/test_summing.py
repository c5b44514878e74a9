"""Masks and noise change what a sum gives away, and nothing else about it."""

import math
import sqlite3
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.errors import ConfigError, PrivacySpent
from proxymoe.common.experiment import Experiment
from proxymoe.common.privacy import Mechanism, Mode
from proxymoe.server.aggregate import PlainSum
from proxymoe.server.private_sum import PrivateSum
from proxymoe.server.spending import exposures
from proxymoe.simulations.faults.cohort import (
    InMemory,
    plain,
    small_federation,
    small_layout,
    small_plan,
)
from proxymoe.simulations.federate import federate
from proxymoe.simulations.secure import MaskedSum
from proxymoe.simulations.summing import SPENT, Summing, require_summable
from tests.laws import tried

FULL = small_layout()
PLANS = {"a": small_plan(0, 1), "b": small_plan(1, 2), "c": small_plan(0, 1, 2)}


def experiment(**changes) -> Experiment:
    table = {"name": "small", "devices": [{"data": "x", "names": list(PLANS)}], **changes}
    return Experiment.model_validate(table)


def updates(seed=0, norm=0.9):
    generator = torch.Generator().manual_seed(seed)
    for name, plan in PLANS.items():
        layout = FULL.held_under(plan)
        update = torch.randn(layout.size, generator=generator)
        yield name, layout, norm * update / update.norm()


def summed(summation, **which):
    for name, layout, update in updates(**which):
        summation.add(name, layout, update, 1.0)
    return summation.sum()


def private(mode, z=1.0, inner=None, seed=0, tolerated=0.0):
    noise = 0.0 if mode is Mode.CLIP_ONLY else z
    mechanism = Mechanism(mode, 1.0, noise, tolerated_dropouts=tolerated)
    rng = np.random.default_rng(seed)
    return PrivateSum(FULL, mechanism, inner or PlainSum(FULL), rng.bytes)


def masked_whole(seed=0):
    return MaskedSum(FULL, None, 2, np.random.default_rng(seed))


@given(st.integers(0, 1000), st.floats(0.1, 3.0))
def test_without_noise_only_the_grid_is_left(seed, norm):
    found = summed(private(Mode.CLIP_ONLY), seed=seed, norm=norm)
    expected = PlainSum(FULL)
    for name, layout, update in updates(seed, norm):
        expected.add(name, layout, update / max(1.0, norm), 1.0)
    assert torch.equal(found.weight, expected.sum().weight)
    assert torch.allclose(found.total, expected.sum().total, atol=len(PLANS) * 2.0**-20)


@tried(10)
@given(st.integers(0, 1000), st.sampled_from(list(Mode)))
def test_under_masks_the_very_same_numbers_come_out(seed, mode):
    found = summed(private(mode, inner=masked_whole(seed), seed=seed), seed=seed)
    clear = summed(private(mode, seed=seed), seed=seed)
    shared = found.weight > 0
    assert found.weight[shared].tolist() == clear.weight[shared].tolist()
    assert clear.weight[~shared].le(1).all()  # a block of one device is nobody's sum
    known = shared.repeat_interleave(torch.tensor(FULL.sizes))
    if mode is Mode.CENTRAL:  # drawn after what is withheld has been taken out
        assert (found.total - clear.total)[known].abs().max() < 12
    else:
        assert torch.equal(found.total[known], clear.total[known])
    assert found.total[~known].eq(0).all()


@pytest.mark.parametrize(
    ("mode", "deviation"),
    [(Mode.CENTRAL, 2.0), (Mode.DISTRIBUTED, 2.0), (Mode.LOCAL, 2.0 * math.sqrt(3))],
)
def test_the_noise_is_as_large_as_the_mode_says(mode, deviation):
    exact = summed(private(Mode.CLIP_ONLY)).total
    trunk = torch.zeros(FULL.size, dtype=torch.bool)
    for block, (start, end) in enumerate(zip(FULL.bounds, FULL.bounds[1:], strict=False)):
        trunk[start:end] = FULL.blocks[block].expert is None  # held by all three
    noise = torch.cat(
        [(summed(private(mode, 2.0, seed=seed)).total - exact)[trunk] for seed in range(200)]
    )
    assert noise.std().item() == pytest.approx(deviation, rel=0.05)
    assert abs(noise.mean().item()) < 0.1 * deviation


def test_nobodys_blocks_get_no_noise():
    found = summed(private(Mode.CENTRAL))
    nobody = found.weight == 0
    assert nobody.any()  # expert 3 is held by none
    assert found.total[nobody.repeat_interleave(torch.tensor(FULL.sizes))].eq(0).all()
    assert found.mean(FULL).isfinite().all()


def test_more_influence_cannot_be_bought():
    name, layout, update = next(updates())
    with pytest.raises(ConfigError, match=r"weight 2\.0 of a private update"):
        private(Mode.CENTRAL).add(name, layout, update, 2.0)


def rounds_of(federation, summing):
    return federate(federation, lambda _: InMemory(), summing, None, lambda _: None).state


def test_secure_rounds_end_where_rounds_in_the_clear_with_as_few_holders_do():
    plans = {**PLANS, "b": small_plan(1, 3)}  # nobody else has expert 3
    alone, clear = small_federation(plans), small_federation(plans, fewest_holders=2)
    secure = rounds_of(alone, Summing(alone, experiment(secure=True)))
    state = rounds_of(clear, Summing(clear, experiment()))
    assert torch.allclose(secure.adapter, state.adapter, atol=1e-4)
    assert secure.adapter.any()
    assert not torch.equal(state.adapter, rounds_of(alone, Summing(alone, experiment())).adapter)


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("mode", ["central", "distributed", "local"])
def test_what_was_promised_is_what_is_spent_and_what_is_told(tmp_path, secure, mode):
    federation = small_federation()
    promise = {"mode": mode, "epsilon": 8.0, "delta": 1e-3, "tolerated_dropouts": 0.0}
    summing = Summing(federation, experiment(secure=secure, privacy=promise), tmp_path)
    first = rounds_of(federation, summing)
    told = summing.summary()["privacy"]
    assert told["participations"] == 4
    assert 7.9 < told["epsilon_spent"] <= 8.0
    with sqlite3.connect(tmp_path / SPENT) as database:
        assert set(exposures(database)) == {"a", "b", "c"}
    # Asked for again, as after a crash, it costs nothing more and is the same.
    again = rounds_of(federation, summing)
    assert summing.summary()["privacy"]["epsilon_spent"] == told["epsilon_spent"]
    assert torch.equal(again.adapter, first.adapter)


def test_rounds_beyond_the_promise_are_refused(tmp_path):
    promise = {"mode": "central", "epsilon": 8.0}
    few, many = small_federation(rounds=2), small_federation(rounds=3)
    summing = Summing(few, experiment(privacy=promise), tmp_path)
    rounds_of(few, summing)
    z = summing.price.noise_multiplier
    longer = Summing(many, experiment(privacy=promise), tmp_path)
    object.__setattr__(longer, "price", replace(longer.price, noise_multiplier=z))
    with pytest.raises(PrivacySpent, match="round 3"):
        rounds_of(many, longer)


def test_plain_is_what_it_was():
    federation = small_federation()
    found = rounds_of(federation, Summing(federation, experiment()))
    assert torch.equal(found.adapter, rounds_of(federation, plain(federation)).adapter)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"privacy": {"mode": "central", "epsilon": 1.0, "sampling": "poisson"}},
            "sampling poisson",
        ),
        ({"privacy": {"adaptive": True}}, "adaptive True"),
        (
            {"secure": True, "smallest_sum": 3, "federation": {"cohort_size": 2}},
            "secure sums over 2 devices: smallest_sum is 3",
        ),
        ({"secure": True, "smallest_sum": 4}, "secure sums over 3 devices"),
    ],
)
def test_what_a_simulation_cannot_do_is_refused(changes, told):
    require_summable(experiment())
    with pytest.raises(ConfigError, match=told):
        require_summable(experiment(**changes))
