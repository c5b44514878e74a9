"""The ClientApp: our bytes in, our bytes out, and no private word when something goes wrong."""

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from proxymoe.client import app as client_module
from proxymoe.client import personalize as personalizing
from proxymoe.client.app import client_app
from proxymoe.client.personalize import Device, personalize
from proxymoe.common.adapter import adapter_layout
from proxymoe.common.config import TrainSettings
from proxymoe.common.errors import DataError
from proxymoe.common.messages import (
    CONTENT,
    DESCRIBE,
    RECORD,
    TRAIN,
    Description,
    Refusal,
    TrainReply,
    TrainTask,
    decode,
    encode,
)
from proxymoe.common.text import Example
from tests.grid import context_of, identify
from tests.tiny import some_tokens

SECRET = "/home/ada/diary.jsonl:3"


@pytest.fixture(autouse=True)
def process():
    """A process that has opened no device, in a Flower run."""
    identify()
    client_module._open.clear()


@pytest.fixture(scope="module")
def device(qwen):
    rows = tuple(Example(tuple(row), 4) for row in some_tokens(4, 12).tolist())
    layout = adapter_layout(qwen.base.skeleton, ("attention",), 2, 0)
    return Device("kitchen", qwen.full, layout, rows)


@pytest.fixture(scope="module")
def task(device):
    settings = TrainSettings(steps=1, batch_size=2, warmup_steps=0)
    plan = device.loaded.plan
    task = TrainTask(
        run="run",
        round=1,
        device=device.name,
        base=plan.base,
        plan=plan.digest,
        layout=device.layout.digest,
        train=settings,
        clip_norm=1.0,
        seed=3,
    )
    return encode(task, device.layout.zeros().numpy())


def ask(app, kind, fields=None, node=1):
    record = RecordDict({RECORD: ConfigRecord(fields)}) if fields is not None else RecordDict()
    return app(Message(record, node, kind), context_of(node))


def fails(context):
    raise DataError(f"{SECRET}: not JSON")


def test_a_device_describes_itself_by_name_and_plan(device):
    reply = ask(client_app(lambda _: device), DESCRIBE, {})
    plan = device.loaded.plan.digest
    assert dict(reply.content[RECORD]) == {"device": "kitchen", "plan": plan}


def test_a_device_that_can_be_described_is_not_opened_for_it(device):
    plan = device.loaded.plan.digest
    app = client_app(fails, lambda context: Description(device=f"{context.node_id}", plan=plan))
    assert dict(ask(app, DESCRIBE, {}, 3).content[RECORD]) == {"device": "3", "plan": plan}
    assert not client_module._open


def test_a_device_that_cannot_say_who_it_is_says_no_private_word_either(device):
    reply = ask(client_app(lambda _: device, fails), DESCRIBE, {})
    assert reply.error.reason == "the device failed (DataError)"


def test_a_task_is_answered_as_the_device_itself_answers(device, task):
    reply = ask(client_app(lambda _: device), TRAIN, {CONTENT: task})
    found, update = decode(reply.content[RECORD][CONTENT])
    expected, same = decode(personalize(device, task))
    assert isinstance(found, TrainReply)
    measured = {"seconds", "peak_rss_mb"}
    assert found.model_dump(exclude=measured) == expected.model_dump(exclude=measured)
    assert np.array_equal(update, same)
    assert update.any()


@pytest.mark.parametrize(
    "fields", [None, {}, {CONTENT: "text"}, {CONTENT: b"no message"}, {"other": b""}]
)
def test_what_is_no_task_gets_a_protocol_error(device, fields):
    reply = ask(client_app(lambda _: device), TRAIN, fields)
    assert reply.error.reason in ("a message without a task", "not a ProxyMoE message of version 1")


def test_a_device_that_cannot_be_opened_refuses_without_a_private_word(task):
    app = client_app(fails)
    reply = ask(app, TRAIN, {CONTENT: task})
    refusal, vector = decode(reply.content[RECORD][CONTENT])
    assert isinstance(refusal, Refusal)
    assert (refusal.device, refusal.reason, vector.size) == ("kitchen", "failed", 0)
    assert SECRET.encode() not in reply.content[RECORD][CONTENT]
    assert ask(app, DESCRIBE, {}).error.reason == "the device failed (DataError)"


def test_an_unexpected_error_while_training_is_a_refusal(device, task, monkeypatch, caplog):
    def breaks(*_):
        raise RuntimeError(SECRET)

    monkeypatch.setattr(personalizing, "personalize", breaks)
    reply = ask(client_app(lambda _: device), TRAIN, {CONTENT: task})
    refusal, _ = decode(reply.content[RECORD][CONTENT])
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "failed"
    assert SECRET.encode() not in reply.content[RECORD][CONTENT]
    assert "a task failed on this device" in caplog.text


def test_a_failure_on_something_that_is_no_task_has_nobody_to_refuse_to():
    reply = ask(client_app(fails), TRAIN, {CONTENT: b"no message"})
    assert reply.error.reason == "not a ProxyMoE message of version 1"


def test_a_process_keeps_few_devices_open_those_used_last(device):
    opened = []

    def open_device(context):
        opened.append(context.node_id)
        return device

    app = client_app(open_device, max_open=2)
    for node in (1, 2, 1, 3, 1, 2):
        ask(app, DESCRIBE, {}, node)
    assert opened == [1, 2, 3, 2]
    assert [node for _, node in client_module._open] == [1, 2]


def test_a_new_app_of_the_same_process_finds_its_devices_open(device):
    ask(client_app(lambda _: device), DESCRIBE, {})
    assert ask(client_app(fails), DESCRIBE, {}).has_content()


def test_runs_do_not_share_devices(device):
    ask(client_app(lambda _: device), DESCRIBE, {})
    message = Message(RecordDict({RECORD: ConfigRecord()}), 1, DESCRIBE)
    assert client_app(fails)(message, context_of(1, run_id=8)).has_error()
