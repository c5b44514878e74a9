"""Heals a proxy submodel on public text: an adapter that makes it imitate the full model.

What a device learns on a proxy is partly repair of what was cut, and repair must not go home: in
the full model nothing is missing. So the server first learns the repair D₀ on public text, by
distilling the outputs of every layer (as FitNets, arXiv 1412.6550, and offsite-tuning do), the
device tunes on top of it, and only the difference to D₀ returns. Healing trains, so it is reported
apart from modes that do not.

Shapes: T tokens, D hidden size, P trained parameters of the submodel's adapter.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from proxymoe.common.adapter import AdapterLayout
from proxymoe.common.attach import AttachedAdapter
from proxymoe.common.context import rows_for
from proxymoe.common.errors import Diverged
from proxymoe.common.loss import predicted_states
from proxymoe.common.moe import moe_layers
from proxymoe.common.text import Batch

LayerOutputs = list[Tensor]
"""(T, D) outputs of every decoder layer with experts, for one batch; padding is left out."""


def layer_outputs(model: nn.Module, batches: Sequence[Batch]) -> list[LayerOutputs]:
    """What the full model's layers make of each batch."""
    found = []
    with torch.no_grad():
        for batch in batches:
            with watched(model, batch) as outputs:
                predicted_states(model, batch)
            found.append([each.clone() for each in outputs])
    return found


def heal(
    model: nn.Module,
    layout: AdapterLayout,
    batches: Sequence[Batch],
    wanted: Sequence[LayerOutputs],
    steps: int,
    learning_rate: float,
) -> Tensor:
    """The adapter (P,) with which the submodel's layers come nearest to the full model's.

    Args:
        model: the submodel.
        layout: of the adapter that the submodel holds.
        batches: public text, of few shapes; taken in turns.
        wanted: `layer_outputs` of the full model on these batches.
        steps: of AdamW; the learning rate falls linearly to zero.
        learning_rate: at the first step.

    Raises:
        Diverged: the adapter is not finite.
    """
    vector = layout.zeros().requires_grad_()
    optimizer = torch.optim.AdamW([vector], lr=learning_rate, weight_decay=0.0)
    with AttachedAdapter(model, layout) as adapter:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1.0 - step / steps)
            adapter.bind(vector)
            batch = batches[step % len(batches)]
            with watched(model, batch) as outputs:
                predicted_states(model, batch)
            loss = distance(outputs, wanted[step % len(batches)])
            loss.backward()
            torch.nn.utils.clip_grad_norm_([vector], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    if not bool(torch.isfinite(vector).all()):
        raise Diverged("the healing adapter is not finite; lower the learning rate")
    return vector.detach()


def distance(found: LayerOutputs, wanted: LayerOutputs) -> Tensor:
    """Mean over layers of ‖found − wanted‖² / ‖wanted‖²."""
    errors = [
        (mine.float() - theirs.float()).square().sum() / theirs.float().square().sum()
        for mine, theirs in zip(found, wanted, strict=True)
    ]
    return torch.stack(errors).mean()


@contextlib.contextmanager
def watched(model: nn.Module, batch: Batch) -> Iterator[LayerOutputs]:
    """Yields a list that layers fill with their outputs at the valid tokens of the batch."""
    outputs: LayerOutputs = []
    valid = rows_for(model, batch).valid.reshape(-1)

    def keep(_layer: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        outputs.append(hidden.reshape(-1, hidden.shape[-1])[valid])

    layers = [layer.decoder_layer for layer in moe_layers(model)]
    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
