"""The local tuning loop: plain PyTorch on one flat adapter vector."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from proxymoe.common.adapter import AdapterLayout
from proxymoe.common.attach import AttachedAdapter
from proxymoe.common.config import TrainSettings
from proxymoe.common.context import rows_for
from proxymoe.common.errors import Diverged
from proxymoe.common.experts import Redirect, expert_state, only_valid_tokens
from proxymoe.common.loss import completion_loss, only_predicted
from proxymoe.common.model import LoadedModel
from proxymoe.common.moe import moe_layers
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
    done: Callable[[float], None] = lambda _: None,
) -> Tuned:
    """Tunes the adapter from `start` (P,) on the examples; AdamW, the model stays frozen.

    `done` is told the loss of every step.

    Raises:
        Diverged: the loss or the adapter became non-finite, or the loss exploded.
    """
    vector = start.clone().requires_grad_()
    optimizer = _optimizer(vector, settings)
    batches = shuffled_batches(examples, settings.batch_size, settings.steps, rng)
    absences = rng.spawn(1)[0]  # apart, so that the order of the rows does not depend on them
    model, losses = loaded.model, list[float]()
    vocab_size = model.config.get_text_config().vocab_size
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # only reentrant checkpoints need it
        # The layers alone: what lies in them stays as it is at inference, routers without jitter.
        for module in model.modules():
            module.training = isinstance(module, GradientCheckpointingLayer)
    try:
        with (
            AttachedAdapter(model, layout) as adapter,
            expert_dropout(loaded, settings.expert_dropout, absences) as draw_absences,
        ):
            for step, batch in enumerate(batches):
                draw_absences()
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
                done(loss)
    finally:
        if settings.gradient_checkpointing:
            model.activation_checkpointing_disable()
            model.eval()
    tuned = vector.detach()
    if not bool(torch.isfinite(tuned).all()):
        raise Diverged("the adapter is not finite after tuning; lower the learning rate")
    return Tuned(tuned, tuple(losses))


@contextmanager
def expert_dropout(
    loaded: LoadedModel, chance: float, rng: np.random.Generator
) -> Iterator[Callable[[], None]]:
    """Yields what draws anew, in every layer, which kept experts sit out; after it, none does.

    Each does with this chance. Where no expert is missing there is nothing to get used to: a
    model that keeps all is left alone.
    """
    layers = [] if loaded.plan.keeps_all or not chance else moe_layers(loaded.model)
    states = [expert_state(layer.experts) for layer in layers]
    before = [state.redirect for state in states]
    # Under a sliced router every routed id is a slot.
    wholes = [
        redirect or Redirect(torch.arange(layer.num_experts))
        for redirect, layer in zip(before, layers, strict=True)
    ]

    def draw() -> None:
        for state, whole in zip(states, wholes, strict=True):
            absent = torch.from_numpy(rng.random(whole.slot.numel()) < chance)
            state.redirect = replace(whole, slot=whole.slot.masked_fill(absent, -1))

    try:
        yield draw
    finally:
        for state, redirect in zip(states, before, strict=True):
            state.redirect = redirect


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
    batch = rows_for(model, batch)
    # Checkpointed layers run again in the backward pass, and must skip the same tokens there.
    with only_valid_tokens(batch.valid), only_predicted(model, batch):
        adapter.bind(vector)
        loss = completion_loss(model, batch)
        loss.backward()
    return loss.item()
