"""Personal tuning: an adapter on the owner's data that never leaves this device.

It starts from the last federated adapter that reached this device, or from nothing, and is tuned
like any other, but for the owner's own use. A tenth of the examples is held out, and an adapter
that does not help there is not kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from proxymoe.client.home import Home
from proxymoe.client.personalize import Device
from proxymoe.client.proxy import open_device
from proxymoe.client.service import FEDERATED
from proxymoe.client.train import tune
from proxymoe.common.adapter import AdapterLayout, adapter_layout
from proxymoe.common.assignment import Assignment
from proxymoe.common.attach import AttachedAdapter
from proxymoe.common.checkpoint import read_tensors, write_tensors
from proxymoe.common.errors import ConfigError, DataError, Diverged, ProtocolError
from proxymoe.common.loss import token_quality
from proxymoe.common.messages import TrainTask, decode
from proxymoe.common.peft_format import export_peft
from proxymoe.common.text import Example, packed_batches

HELD_OUT = 10
"""Every so manieth example is held out."""
FEWEST = 2 * HELD_OUT
"""With fewer examples nothing is held out, and all are trained on."""

StepDone = Callable[[int, int, float], None]
"""Told after each step: its number from 1, how many there are, the loss in nats per token."""


@dataclass(frozen=True, slots=True)
class Personal:
    """What personal tuning has come to; losses in nats per token."""

    num_examples: int
    """Trained on."""
    num_held_out: int
    round: int | None
    """Of the federated adapter that it started from; None if it started from nothing."""
    before: float
    """Loss with what it started from, on what was held out, or else of the first step."""
    after: float
    """Loss with the personal adapter there, or else of the last step."""


def personalize(
    home: Home,
    steps: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    done: StepDone = lambda *_: None,
) -> Personal:
    """Tunes the personal adapter of the device in this home anew, and keeps it there.

    Args:
        steps: None trains as long as one round of the assignment.
        learning_rate: None takes the assignment's.

    Raises:
        ConfigError: not enrolled, or nothing is assigned yet.
        DataError: the owner's data cannot be used.
        Diverged: the training got out of hand, or does not help on what was held out; what was
            kept before stays.
    """
    with home.alone():
        settings = assigned(home).train
        changes = {"steps": steps, "learning_rate": learning_rate}
        settings = settings.model_copy(update={k: v for k, v in changes.items() if v is not None})
        device = open_device(home)
        if not device.examples:
            raise DataError("there are no examples to learn from; see [data] in the policy")
        begin, number = federated(home, device.layout)
        seen, unseen = _split(device.examples)
        losses = list[float]()

        def step_done(loss: float) -> None:
            losses.append(loss)
            done(len(losses), settings.steps, loss)

        rng = np.random.default_rng(seed)
        tuned = tune(device.loaded, device.layout, begin, seen, settings, rng, step_done).vector
        before, after = losses[0], losses[-1]
        if unseen:
            before, after = (_loss(device, vector, unseen) for vector in (begin, tuned))
        if not after <= before:
            raise Diverged(
                f"the loss is {after:.3f} after the training and was {before:.3f} before it, so "
                "the adapter is not kept; take fewer steps, a lower learning rate, or more data"
            )
        write_tensors(home.personal_adapter, {device.layout.digest: tuned})
        return Personal(len(seen), len(unseen), number, before, after)


def federated(home: Home, layout: AdapterLayout) -> tuple[Tensor, int | None]:
    """The last federated adapter (P,) that reached this device, and its round.

    Zeros, and None, if there is none of this layout.
    """
    try:
        task, vector = decode((home.adapters / FEDERATED).read_bytes(), 4 * layout.size)
    except (FileNotFoundError, ProtocolError):
        return layout.zeros(), None
    fits = isinstance(task, TrainTask) and task.layout == layout.digest
    if not fits or vector.size != layout.size or not bool(np.isfinite(vector).all()):
        return layout.zeros(), None
    return torch.from_numpy(vector), task.round


def export(home: Home, folder: Path, base_name: str | None = None) -> Path:
    """Writes the personal adapter as a PEFT folder for the full base model; returns the folder.

    Args:
        base_name: where its user finds the base model, for PEFT's config; None names its digest.

    Raises:
        ConfigError: there is no personal adapter of the present plan.
        CheckpointError: it is damaged.
    """
    assignment = assigned(home)
    device = open_device(home)
    kept = read_tensors(home.personal_adapter) if home.personal_adapter.exists() else {}
    if device.layout.digest not in kept:
        raise ConfigError(
            f"{home.path}: no personal adapter for the present plan; personalize first"
        )
    adapter = assignment.adapter
    model, seed = device.loaded.model, assignment.adapter_seed
    full = adapter_layout(model, adapter.targets, adapter.rank, seed)
    vector = _in_full(kept[device.layout.digest], device.layout, full)
    return export_peft(full, vector, folder, base_name or assignment.base)


def assigned(home: Home) -> Assignment:
    """What is assigned to the device in this home.

    Raises:
        ConfigError: not enrolled, or nothing yet.
    """
    home.enrolled()
    if assignment := home.assignment():
        return assignment
    raise ConfigError(f"{home.path}: nothing is assigned to this device yet; join first")


def _in_full(vector: Tensor, held: AdapterLayout, full: AdapterLayout) -> Tensor:
    """The adapter in the full layout; zeros where this device holds no block."""
    whole = full.zeros()
    for block, begin, end in held.positions_in(full):
        whole[full.bounds[block] : full.bounds[block + 1]] = vector[begin:end]
    return whole


def _split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """The examples to learn from, and those held out."""
    if len(examples) < FEWEST:
        return list(examples), []
    numbered = list(enumerate(examples))
    kept = [e for i, e in numbered if i % HELD_OUT != HELD_OUT - 1]
    return kept, [e for i, e in numbered if i % HELD_OUT == HELD_OUT - 1]


def _loss(device: Device, vector: Tensor, examples: list[Example]) -> float:
    with AttachedAdapter(device.loaded.model, device.layout) as adapter:
        adapter.bind(vector)
        return token_quality(device.loaded.model, packed_batches(examples)).loss
