"""Level 3: a device that is asked for what it must not do, or whose training goes wrong."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from proxymoe.client.personalize import Device, personalize
from proxymoe.common.adapter import adapter_layout
from proxymoe.common.config import TrainSettings
from proxymoe.common.errors import ProtocolError
from proxymoe.common.messages import Refusal, TrainTask, Vector, decode, encode
from proxymoe.common.model import load
from proxymoe.common.plan import LayerPlan, Plan
from proxymoe.common.text import Example
from proxymoe.server.base import BaseCheckpoint
from proxymoe.simulations.faults.report import Ground, Scenario
from proxymoe.simulations.site import asset

LEVEL = "device"
FOREIGN = "00" * 32
DUPLICATES = 4
TRAIN = TrainSettings(steps=2, batch_size=2, max_tokens=32)

Change = Callable[[TrainTask, Vector], tuple[TrainTask, Vector]]


def open_device(ground: Ground) -> Device:
    """A device with a small proxy submodel of the shipped model, and a few rows of noise."""
    base = BaseCheckpoint(asset("tiny-moe"))
    layers = {at: LayerPlan(num_experts=n, kept=(0, 1)) for at, n in base.num_experts.items()}
    plan = Plan(base=base.digest, layers=layers)
    loaded = load(base.materialise(plan, ground.folder()))
    layout = adapter_layout(base.skeleton, ("attention",), 4, 0).held_under(plan)
    rows = ground.rng.integers(10, 1000, (4, 24)).tolist()
    return Device("a", loaded, layout, [Example(tuple(row), 12) for row in rows])


def task_of(device: Device) -> tuple[TrainTask, Vector]:
    """A task that the device answers."""
    plan = device.loaded.plan
    task = TrainTask(
        run="run",
        round=1,
        device=device.name,
        base=plan.base,
        plan=plan.digest,
        layout=device.layout.digest,
        train=TRAIN,
        clip_norm=1.0,
        seed=1,
    )
    return task, device.layout.zeros().numpy()


def duplicate_tasks(ground: Ground) -> Iterator[str]:
    """The same task again and again: the same update, which the coordinator counts once."""
    device = open_device(ground)
    task = encode(*task_of(device))
    first = decode(personalize(device, task))[1]
    for _ in range(DUPLICATES):
        again = decode(personalize(device, task))[1]
        yield "" if again.size and np.array_equal(first, again) else "another update came back"


def bad_tasks(ground: Ground) -> Iterator[str]:
    """Tasks for another device, model, plan or layout, or with vectors that cannot be."""
    device = open_device(ground)
    task, vector = task_of(device)
    for change in ({"device": "b"}, {"base": FOREIGN}, {"plan": FOREIGN}, {"layout": FOREIGN}):
        yield _refused(device, encode(task.model_copy(update=change), vector), "mismatch")
    for bad in (vector[:-1], vector * np.nan, vector + np.inf):
        yield _refused(device, encode(task, bad.astype(np.float32)), "mismatch")
    whole = encode(task, vector)
    for content in (encode(task, np.tile(vector, 2)), whole[:-6], whole[:50], b""):
        try:
            personalize(device, content)
            yield "a task that is none was answered"
        except ProtocolError:
            yield ""


def wild_training(ground: Ground) -> Iterator[str]:
    """NaN in the weights, a learning rate without bounds, no data: the device refuses itself."""
    device = open_device(ground)
    task, vector = task_of(device)
    wild = task.train.model_copy(update={"learning_rate": 1e6, "steps": 6, "gradient_clip": 1e6})
    content = encode(task.model_copy(update={"train": wild}), vector)
    yield _refused(device, content, "diverged")
    yield _refused(replace(device, examples=[]), encode(task, vector), "data")
    for poison in (float("nan"), float("inf")):
        for weight in list(device.loaded.model.parameters())[:3]:
            before = weight.detach().clone()
            with torch.no_grad():
                weight.view(-1)[:] = poison
            yield _refused(device, encode(task, vector), "diverged")
            with torch.no_grad():
                weight.copy_(before)
    if not decode(personalize(device, encode(task, vector)))[1].size:
        yield "never well again"


def _refused(device: Device, content: bytes, reason: str) -> str:
    reply, vector = decode(personalize(device, content))
    if not isinstance(reply, Refusal) or vector.size:
        return f"{reason}: the device sent an update, of {vector.size} numbers"
    return "" if reply.reason == reason else f"refused for {reply.reason}, expected {reason}"


SCENARIOS = (
    Scenario(LEVEL, "the same task again", "the same update", duplicate_tasks),
    Scenario(LEVEL, "task for another base, plan, device; damaged", "refused", bad_tasks),
    Scenario(LEVEL, "NaN device, diverging, without data", "refuses, nothing sent", wild_training),
)
