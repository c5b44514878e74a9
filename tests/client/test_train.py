"""Local tuning: it learns, it is reproducible, it stops when it diverges, it leaves no trace."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from proxymoe.client.train import expert_dropout, highest_sane_loss, rate, tune
from proxymoe.common.adapter import AdapterLayout, adapter_layout
from proxymoe.common.config import TrainSettings
from proxymoe.common.errors import Diverged
from proxymoe.common.experts import Redirect, expert_state
from proxymoe.common.model import LoadedModel, load
from proxymoe.common.moe import moe_layers
from proxymoe.common.plan import LayerPlan, Plan, RouterMode
from proxymoe.common.text import Example
from tests.families import SOME
from tests.tiny import TinyBase, assert_near, some_tokens

TASK = [Example(tuple(row), 4) for row in some_tokens(6, 12).tolist()]
SETTINGS = TrainSettings(steps=4, batch_size=2, warmup_steps=0, learning_rate=1e-2)


def layout_of(tiny: TinyBase, targets=("attention", "experts")) -> AdapterLayout:
    return adapter_layout(tiny.base.skeleton, targets, 4, 0)


def tuned(tiny: TinyBase, seed: int = 0, loaded: LoadedModel | None = None, start=None, **settings):
    loaded = loaded or tiny.full
    layout = layout_of(tiny).held_under(loaded.plan)
    return tune(
        loaded,
        layout,
        layout.zeros() if start is None else start,
        TASK,
        SETTINGS.model_copy(update=settings),
        np.random.default_rng(seed),
    )


@pytest.mark.parametrize("family", SOME)
def test_tuning_lowers_the_loss(tiny, family):
    losses = tuned(tiny(family), steps=8, batch_size=6).losses
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.3


def test_the_same_seed_gives_the_same_bits_and_another_one_others(qwen):
    first, again, other = tuned(qwen, 1), tuned(qwen, 1), tuned(qwen, 2)
    assert torch.equal(first.vector, again.vector)
    assert first.losses == again.losses
    assert not torch.equal(first.vector, other.vector)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_two_steps_equal_the_optimizer_by_hand(qwen, optimizer):
    """One example, so that every batch is the same; SGD or AdamW on clipped gradients."""
    layout, examples = layout_of(qwen), TASK[:1]
    settings = SETTINGS.model_copy(update={"optimizer": optimizer, "steps": 1, "batch_size": 1})
    start = layout.zeros()
    step = tune(qwen.full, layout, start, examples, settings, np.random.default_rng(0)).vector
    if optimizer == "adamw":
        moved = step[step != 0]
        assert_near(moved.abs().median(), torch.tensor(SETTINGS.learning_rate), 1e-3)
    else:
        assert float(step.norm()) <= SETTINGS.learning_rate * SETTINGS.gradient_clip * 1.001


def test_a_zero_learning_rate_at_the_end_of_the_decay():
    settings = TrainSettings(steps=4, warmup_steps=0, decay=True)
    assert [rate(step, settings) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_learning_rates_warm_up_linearly_and_stay():
    settings = TrainSettings(steps=6, warmup_steps=3)
    assert [rate(step, settings) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_gradient_checkpointing_gives_the_same_update(tiny, family):
    plain, recomputed = (
        tuned(tiny(family), gradient_checkpointing=wanted) for wanted in (False, True)
    )
    assert_near(recomputed.vector, plain.vector, 1e-6)
    assert recomputed.losses == pytest.approx(plain.losses, rel=1e-6)


def test_tuning_goes_on_from_where_it_starts(qwen):
    half = tuned(qwen).vector
    assert tuned(qwen, start=half).losses[0] < tuned(qwen).losses[0]


def test_the_start_is_not_changed(qwen):
    start = 0.01 * torch.randn(layout_of(qwen).size, generator=torch.Generator().manual_seed(1))
    before = start.clone()
    result = tuned(qwen, start=start)
    assert torch.equal(start, before)
    assert not result.vector.requires_grad


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("learning_rate", [1e-2, 1e30])
def test_tuning_leaves_the_model_as_it_was(qwen, learning_rate, checkpointing):
    model = qwen.full.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        tuned(qwen, learning_rate=learning_rate, gradient_checkpointing=checkpointing)
        assert learning_rate == 1e-2
    except Diverged:
        assert learning_rate == 1e30
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module.training for module in model.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_absurd_learning_rate_diverges_from_a_good_start(qwen):
    layout, rng = layout_of(qwen), np.random.default_rng(0)
    settings = SETTINGS.model_copy(update={"steps": 12, "learning_rate": 5e-2})
    learned = tune(qwen.full, layout, layout.zeros(), TASK[:1], settings, rng)
    assert learned.losses[-1] < 0.9
    absurd = settings.model_copy(update={"learning_rate": 1e3})
    with pytest.raises(
        Diverged, match=r"loss .* at step 2 after 0\.\d+ .*; lower the learning rate"
    ):
        tune(qwen.full, layout, learned.vector, TASK[:1], absurd, rng)


@given(st.floats(0, 50), st.integers(2, 10**6))
def test_a_loss_may_rise_but_neither_triple_nor_be_far_worse_than_guessing(first, vocab_size):
    limit = highest_sane_loss(first, vocab_size)
    assert first < limit <= 3 * (first + 1)
    assert limit <= max(first, math.log(vocab_size)) + 1
    assert not limit < highest_sane_loss(first, vocab_size // 2 + 1)


def test_no_loss_is_sane_after_one_that_is_no_number():
    assert highest_sane_loss(math.nan, 100) == -math.inf


def test_a_learning_rate_that_no_number_holds_is_no_setting():
    with pytest.raises(ValidationError, match="less than or equal to 1000000"):
        TrainSettings(learning_rate=1e38)


def test_weights_that_are_not_numbers_diverge_at_the_first_step(qwen):
    damaged = load(qwen.full_folder, torch.float32)
    parameter = moe_layers(damaged.model)[1].experts.get_parameter("gate_up_proj")
    parameter.data = torch.full_like(parameter, float("nan"))
    with pytest.raises(Diverged, match="loss nan at step 1"):
        tuned(qwen, loaded=damaged)


def test_a_start_that_is_absurd_diverges(qwen):
    with pytest.raises(Diverged):
        tuned(qwen, start=torch.full((layout_of(qwen).size,), 1e38))


def test_one_example_is_enough(qwen):
    layout = layout_of(qwen)
    result = tune(qwen.full, layout, layout.zeros(), TASK[:1], SETTINGS, np.random.default_rng(0))
    assert len(result.losses) == SETTINGS.steps
    assert result.losses[-1] < result.losses[0]


@pytest.fixture(scope="module", params=[RouterMode.FULL, RouterMode.SLICED])
def proxy(request, qwen, tmp_path_factory) -> LoadedModel:
    """A submodel that lacks half of the experts."""
    layers = {
        at: LayerPlan(num_experts=count, kept=tuple(range(0, count, 2)))
        for at, count in qwen.base.num_experts.items()
    }
    plan = Plan(base=qwen.base.digest, layers=layers, router=request.param)
    return load(qwen.base.materialise(plan, tmp_path_factory.mktemp("proxy")))


def redirects_of(loaded: LoadedModel) -> list[Redirect | None]:
    return [expert_state(layer.experts).redirect for layer in moe_layers(loaded.model)]


def test_experts_that_sat_out_are_back_after_tuning(qwen, proxy):
    before = redirects_of(proxy)
    tuned(qwen, loaded=proxy, expert_dropout=0.5)
    assert list(map(id, redirects_of(proxy))) == list(map(id, before))
    broken = layout_of(qwen).held_under(proxy.plan).zeros() + math.nan
    with pytest.raises(Diverged):
        tuned(qwen, loaded=proxy, start=broken, expert_dropout=0.5)
    assert list(map(id, redirects_of(proxy))) == list(map(id, before))


def test_expert_dropout_changes_what_is_learned_and_the_seed_decides_how(qwen, proxy):
    without, some, again = (
        tuned(qwen, loaded=proxy, expert_dropout=chance).vector for chance in (0.0, 0.5, 0.5)
    )
    assert torch.equal(some, again)
    assert not torch.equal(some, without)


def test_where_no_expert_is_missing_expert_dropout_changes_nothing(qwen):
    assert torch.equal(tuned(qwen, expert_dropout=0.5).vector, tuned(qwen).vector)


@given(chance=st.floats(0.01, 0.99), seed=st.integers(0, 1000))
def test_an_expert_sits_out_or_keeps_its_slot(proxy, chance, seed):
    kept = [layer.num_experts for layer in moe_layers(proxy.model)]
    with expert_dropout(proxy, chance, np.random.default_rng(seed)) as draw:
        draw()
        for redirect, count in zip(redirects_of(proxy), kept, strict=True):
            assert redirect is not None
            present = redirect.slot[redirect.slot >= 0].tolist()
            assert sorted(set(present)) == sorted(present)
            assert set(present) <= set(range(count))
