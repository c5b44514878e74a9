"""The local tuning loop: plain PyTorch on one flat adapter vector."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from proxymoe.common.adapter import AdapterLayout
from proxymoe.common.attach import AttachedAdapter
from proxymoe.common.config import TrainSettings
from proxymoe.common.errors import Diverged
from proxymoe.common.experts import only_valid_tokens
from proxymoe.common.loss import completion_loss, only_predicted
from proxymoe.common.model import LoadedModel
from proxymoe.common.text import Batch, Example, shuffled_batches

EXPLOSION = 3.0
"""Training stops when the loss passes this many times the first loss plus one nat,"""
WORSE_THAN_GUESSING = 1.0
"""or, however bad the start was, passes start and uniform guessing by this many nats.

Normalisation bounds what absurd weights can do to the logits: a loss may never triple.
"""


@dataclass(frozen=True, slots=True)
class Tuned:
    """An adapter after tuning, and the loss of every step."""

    vector: Tensor
    """(P,) fp32."""
    losses: tuple[float, ...]


def tune(
    loaded: LoadedModel,
    layout: AdapterLayout,
    start: Tensor,
    examples: Sequence[Example],
    settings: TrainSettings,
    rng: np.random.Generator,
) -> Tuned:
    """Tunes the adapter from `start` (P,) on the examples; AdamW, the model stays frozen.

    Raises:
        Diverged: the loss or the adapter became non-finite, or the loss exploded.
    """
    vector = start.clone().requires_grad_()
    optimizer = _optimizer(vector, settings)
    batches = shuffled_batches(examples, settings.batch_size, settings.steps, rng)
    model, losses = loaded.model, list[float]()
    vocab_size = model.config.get_text_config().vocab_size
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # only reentrant checkpoints need it
        model.train()
    try:
        with AttachedAdapter(model, layout) as adapter:
            for step, batch in enumerate(batches):
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate * rate(step, settings)
                loss = _step(model, adapter, vector, batch)
                losses.append(loss)
                if not loss <= highest_sane_loss(losses[0], vocab_size):
                    raise Diverged(
                        f"loss {loss:.3g} at step {step + 1} after {losses[0]:.3g} at the start; "
                        "lower the learning rate or check the data"
                    )
                torch.nn.utils.clip_grad_norm_([vector], settings.gradient_clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    finally:
        if settings.gradient_checkpointing:
            model.activation_checkpointing_disable()
            model.eval()
    tuned = vector.detach()
    if not bool(torch.isfinite(tuned).all()):
        raise Diverged("the adapter is not finite after tuning; lower the learning rate")
    return Tuned(tuned, tuple(losses))


def highest_sane_loss(first: float, vocab_size: int) -> float:
    """The highest loss of a training that is still sane; −inf if it began with NaN."""
    if not math.isfinite(first):
        return -math.inf
    guessing = math.log(vocab_size)
    return min(EXPLOSION * (first + 1.0), max(first, guessing) + WORSE_THAN_GUESSING)


def rate(step: int, settings: TrainSettings) -> float:
    """Share of the learning rate used at this step: linear warm-up, then flat or linear decay."""
    warm = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    return warm * (1.0 - step / settings.steps) if settings.decay else warm


def _optimizer(vector: Tensor, settings: TrainSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD([vector], lr=settings.learning_rate)
    return torch.optim.AdamW([vector], lr=settings.learning_rate, weight_decay=0.0)


def _step(model: torch.nn.Module, adapter: AttachedAdapter, vector: Tensor, batch: Batch) -> float:
    # Checkpointed layers run again in the backward pass, and must skip the same tokens there.
    with only_valid_tokens(batch.valid), only_predicted(model, batch):
        adapter.bind(vector)
        loss = completion_loss(model, batch)
        loss.backward()
    return loss.item()
