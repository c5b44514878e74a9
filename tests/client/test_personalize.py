"""A client round: nothing but a clipped update leaves, and whatever is wrong becomes a refusal."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from proxymoe.client.personalize import Device, clip, personalize
from proxymoe.common.adapter import adapter_layout
from proxymoe.common.config import TrainSettings
from proxymoe.common.errors import ProtocolError
from proxymoe.common.messages import Refusal, TrainReply, TrainTask, decode, encode
from proxymoe.common.model import load
from proxymoe.common.moe import moe_layers
from proxymoe.common.plan import LayerPlan, Plan
from proxymoe.common.text import Example
from tests.tiny import some_tokens

SETTINGS = TrainSettings(steps=2, batch_size=2, warmup_steps=0)
ROWS = tuple(Example(tuple(row), 4) for row in some_tokens(5, 12).tolist())


@pytest.fixture(scope="module")
def device(qwen, tmp_path_factory):
    """A device with half the experts and five rows."""
    layers = {at: LayerPlan(num_experts=8, kept=(0, 3, 4, 6)) for at in qwen.base.num_experts}
    plan = Plan(base=qwen.base.digest, layers=layers)
    folder = qwen.base.materialise(plan, tmp_path_factory.mktemp("device"))
    full = adapter_layout(qwen.base.skeleton, ("attention", "experts"), 4, 0)
    return Device("kitchen", load(folder), full.held_under(plan), ROWS)


def task_for(device, vector=None, changes=None, **fields):
    """A task that fits the device; `changes` are those of its address."""
    address = {
        "run": "run",
        "round": 2,
        "device": device.name,
        "base": device.loaded.plan.base,
        "plan": device.loaded.plan.digest,
        "layout": device.layout.digest,
    }
    task = TrainTask.model_validate(
        {
            **address,
            **(changes or {}),
            "train": SETTINGS,
            "clip_norm": 1.0,
            "seed": 3,
            **fields,
        }
    )
    return encode(task, device.layout.zeros().numpy() if vector is None else vector)


def changed(device, **fields):
    return Device(
        **{
            "name": device.name,
            "loaded": device.loaded,
            "layout": device.layout,
            "examples": device.examples,
            **fields,
        }
    )


def refused(device, content):
    reply, vector = decode(personalize(device, content))
    assert isinstance(reply, Refusal)
    assert vector.size == 0
    return reply.reason


def norm_of(array):
    return float(np.linalg.norm(array.astype(np.float64)))


@given(
    hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    st.floats(1e-6, 1e6),
)
def test_a_clipped_update_is_never_longer_than_the_limit(update, limit):
    clipped, norm = clip(torch.from_numpy(update), limit)
    assert norm == pytest.approx(norm_of(update), rel=1e-12)
    assert norm_of(clipped.numpy()) <= limit
    if norm <= limit:
        assert torch.equal(clipped, torch.from_numpy(update))
    else:
        assert norm_of(clipped.numpy()) >= 0.999 * limit


@given(hnp.arrays(np.float32, 20, elements=st.floats(-100, 100, width=32)))
def test_clipping_keeps_the_direction(update):
    clipped, norm = clip(torch.from_numpy(update), 1.0)
    if norm > 1.0:
        cosine = float(np.dot(clipped.double().numpy(), update.astype(np.float64))) / norm
        assert cosine == pytest.approx(norm_of(clipped.numpy()), rel=1e-5)


@pytest.mark.parametrize("limit", [1e-3, 0.1, 1e3])
def test_what_leaves_is_the_clipped_difference_and_its_address(device, limit):
    start = 0.01 * np.random.default_rng(0).standard_normal(device.layout.size).astype(np.float32)
    reply, update = decode(personalize(device, task_for(device, start, clip_norm=limit)))
    assert isinstance(reply, TrainReply)
    assert (reply.run, reply.round, reply.device) == ("run", 2, "kitchen")
    assert (reply.base, reply.plan, reply.layout) == (
        device.loaded.plan.base,
        device.loaded.plan.digest,
        device.layout.digest,
    )
    assert update.shape == (device.layout.size,)
    assert 0 < norm_of(update) <= limit
    assert (reply.norm > limit) == (limit < 1)
    assert reply.num_examples == 5


def test_the_same_task_gives_the_same_bytes_and_another_seed_others(device):
    replies = [decode(personalize(device, task_for(device, seed=seed))) for seed in (1, 1, 2)]
    (first, a), (again, b), (_, c) = replies
    assert a.tobytes() == b.tobytes()
    volatile = {"seconds", "peak_rss_mb"}
    assert first.model_dump(exclude=volatile) == again.model_dump(exclude=volatile)
    assert a.tobytes() != c.tobytes()


def test_the_update_is_relative_to_the_adapter_that_was_sent(device):
    start = np.full(device.layout.size, 0.01, np.float32)
    _, from_zero = decode(personalize(device, task_for(device, clip_norm=1e6)))
    _, from_start = decode(personalize(device, task_for(device, start, clip_norm=1e6)))
    assert norm_of(from_start) < 2 * norm_of(from_zero)
    assert norm_of(from_start) < norm_of(start + from_start)


@pytest.mark.parametrize(
    "fields",
    [
        {"device": "garden"},
        {"base": "cd" * 32},
        {"plan": "cd" * 32},
        {"layout": "cd" * 32},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_task_for_something_else_is_a_mismatch(device, fields):
    assert refused(device, task_for(device, changes=fields)) == "mismatch"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_adapter_that_is_not_finite_is_a_mismatch(device, value):
    vector = device.layout.zeros().numpy()
    vector[-1] = value
    assert refused(device, task_for(device, vector)) == "mismatch"


def test_an_adapter_of_another_size_is_a_mismatch_or_no_message(device):
    short = np.zeros(device.layout.size - 1, np.float32)
    assert refused(device, task_for(device, short)) == "mismatch"
    long = np.zeros(device.layout.size + 1, np.float32)
    with pytest.raises(ProtocolError, match="the limit is"):
        personalize(device, task_for(device, long))


def test_divergence_is_refused_and_sends_no_vector(device):
    one = changed(device, examples=ROWS[:1])
    settings = SETTINGS.model_copy(update={"steps": 12, "learning_rate": 5e-2})
    content = task_for(one, train=settings, clip_norm=1e6)
    _, learned = decode(personalize(one, content))
    absurd = settings.model_copy(update={"learning_rate": 1e3})
    assert refused(one, task_for(one, learned, train=absurd)) == "diverged"


def test_damaged_weights_are_refused_as_diverged(device, qwen, tmp_path):
    folder = qwen.base.materialise(device.loaded.plan, tmp_path)
    damaged = load(folder, torch.float32)
    down = moe_layers(damaged.model)[0].experts.get_parameter("down_proj")
    down.data = torch.full_like(down, float("inf"))
    assert refused(changed(device, loaded=damaged), task_for(device)) == "diverged"


@pytest.mark.parametrize("value", [1e30, 3e38])
def test_an_absurd_adapter_is_refused_and_not_sent_back(device, value):
    vector = np.full(device.layout.size, value, np.float32)
    assert refused(device, task_for(device, vector)) == "diverged"


def test_a_device_without_data_says_so(device):
    assert refused(changed(device, examples=()), task_for(device)) == "data"


def test_a_device_with_one_row_takes_part(device):
    one = changed(device, examples=ROWS[:1])
    reply, update = decode(personalize(one, task_for(one)))
    assert isinstance(reply, TrainReply)
    assert reply.num_examples == 1
    assert norm_of(update) > 0


@pytest.mark.parametrize("content", [b"", b"PXM1", b"\x00" * 50])
def test_what_is_no_message_gets_no_answer(device, content):
    with pytest.raises(ProtocolError):
        personalize(device, content)


def test_a_message_that_is_no_task_gets_no_answer(device):
    answer = personalize(device, task_for(device))
    with pytest.raises(ProtocolError, match="a device answers training tasks, not 'update'"):
        personalize(device, answer)


def test_a_refusal_carries_no_private_detail(device):
    content = personalize(device, task_for(device, changes={"device": "garden"}))
    reply, _ = decode(content)
    assert set(reply.model_dump()) == {
        *("run", "round", "device", "base", "plan", "layout"),
        *("kind", "reason"),
    }
