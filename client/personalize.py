"""★ One client round, top to bottom: check the task, tune, take the difference, clip, reply.

The device trusts nothing it is sent: the task must name the base model, plan and adapter layout
that the device holds, and carry a finite vector of the right size. Whatever goes wrong becomes a
refusal that tells a reason and no private detail; nothing but a clipped update ever leaves.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from proxymoe.client.train import tune
from proxymoe.common.adapter import AdapterLayout
from proxymoe.common.errors import DataError, Diverged, ProtocolError
from proxymoe.common.measure import peak_rss_mb
from proxymoe.common.messages import Refusal, TrainReply, TrainTask, address_of, decode, encode
from proxymoe.common.model import LoadedModel
from proxymoe.common.text import Example


@dataclass(frozen=True, slots=True)
class Device:
    """What a device holds: a proxy submodel, the layout of its adapter, and private examples."""

    name: str
    loaded: LoadedModel
    layout: AdapterLayout
    examples: Sequence[Example]


def personalize(device: Device, content: bytes) -> bytes:
    """Answers one training task, both as message bytes.

    Raises:
        ProtocolError: the task is malformed, or no task; there is nobody to answer.
    """
    started = time.monotonic()
    task, vector = decode(content, max_vector_bytes=4 * device.layout.size)
    if not isinstance(task, TrainTask):
        raise ProtocolError(f"a device answers training tasks, not {task.kind!r}")
    if (reason := _mismatch(device, task, vector)) is not None:
        return encode(_refusal(task, reason))
    start = torch.from_numpy(vector)
    try:
        tuned = tune(
            device.loaded,
            device.layout,
            start,
            device.examples,
            task.train,
            np.random.default_rng(task.seed),
        )
    except Diverged:
        return encode(_refusal(task, "diverged"))
    except DataError:
        return encode(_refusal(task, "data"))

    update, norm = clip(tuned.vector - start, task.clip_norm)
    reply = TrainReply(
        **address_of(task),
        num_examples=len(device.examples),
        first_loss=tuned.losses[0],
        last_loss=tuned.losses[-1],
        norm=norm,
        seconds=time.monotonic() - started,
        peak_rss_mb=peak_rss_mb(),
    )
    return encode(reply, update.numpy())


def clip(update: Tensor, limit: float) -> tuple[Tensor, float]:
    """The update (P,) scaled down to an L2 norm of at most `limit`, and its norm before."""
    norm = float(update.double().norm())
    if norm <= limit:
        return update, norm
    # One part in 10⁶ below the limit, so that rounding to fp32 cannot end above it.
    return update * (limit / norm * (1.0 - 1e-6)), norm


def _mismatch(
    device: Device, task: TrainTask, vector: np.ndarray
) -> Literal["mismatch", "data"] | None:
    plan = device.loaded.plan
    held = (device.name, plan.base, plan.digest, device.layout.digest, device.layout.size)
    asked = (task.device, task.base, task.plan, task.layout, vector.size)
    if held != asked or not bool(np.isfinite(vector).all()):
        return "mismatch"
    return None if device.examples else "data"


def _refusal(
    task: TrainTask, reason: Literal["diverged", "mismatch", "policy", "data", "failed"]
) -> Refusal:
    return Refusal(**address_of(task), reason=reason)
