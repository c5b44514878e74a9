"""The full model straight from its shards, one decoder layer at a time.

A base model may be many times larger than memory. Here the model's own code runs, whatever its
family, on a model without weights: those of a decoder layer are read when the first batch enters
it, and given back when the last one has left it. So they are read once for many batches, and memory
holds one layer, the embeddings, and what every batch carries from layer to layer.

While a layer is there, the first batch waits in it, in the midst of its own forward pass, and the
others are brought to the same place: the model runs again, and the layers before this one answer
what they have answered already. Masks, positions and whatever else a family passes to its layers
are made by its own code each time. The arithmetic is that of the whole model, batch for batch, and
so are the bits. This rests on layers that hand on nothing but what they return, which is tried: the
very first batch goes both ways, and a model whose bits then differ is refused.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from proxymoe.common.errors import UnsupportedModel
from proxymoe.common.experts import expert_state
from proxymoe.common.loss import predicted_states
from proxymoe.common.model import LoadedModel, install
from proxymoe.common.moe import MoELayer, moe_layers
from proxymoe.common.text import Batch
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.hollow import Weights, hollow_model

STATE_BYTES = 256 << 20
"""What batches may carry from layer to layer at one time; for more text, layers are read again."""

Progress = Callable[[int, int], None]


class Streamed:
    """A full model that is never whole in memory, and only good for `read`.

    Args:
        base: has the weights.
        dtype: that the model computes in.
    """

    def __init__(self, base: BaseCheckpoint, dtype: torch.dtype) -> None:
        model = hollow_model(base.config, dtype)
        install(model)
        self.loaded = LoadedModel(
            model,
            AutoTokenizer.from_pretrained(base.folder, local_files_only=True),
            base.keep_all(),
        )
        self._experts = moe_layers(model)
        self._weights = Weights(base, model, dtype)
        root = re.sub(r"\.\d+\..*", "", self._experts[0].name)
        layers = list(model.get_submodule(root).named_children())
        self._layers = [
            _Layer(module, self._weights.below(f"{root}.{name}"))
            for name, module in layers[: self._experts[-1].position + 1]
        ]
        in_layers = self._weights.below(root)
        self._weights.load(self._weights.below(model.base_model_prefix) - in_layers)
        self._weights.keep()
        width = self._experts[0].hidden_size
        self._tokens_at_once = STATE_BYTES // (width * dtype.itemsize)
        self._tried = False

    def read(
        self, model: Any, batches: Sequence[Batch], progress: Progress = lambda *_: None
    ) -> Iterator[Batch]:
        """Brings the batches through all layers up to the last with experts; yields them then.

        Args:
            model: the own one.
            batches: in the order in which they pass through each layer.
            progress: told how many steps are done, one batch in one layer each, and of how many.

        Raises:
            UnsupportedModel: the layers cannot be run one by one; load the model whole.
        """
        done, total = 0, len(self._layers) * len(batches)
        for group in _groups(batches, self._tokens_at_once):
            untried = () if self._tried else self._experts
            advance = partial(_advance, progress, done, total)
            _Reading(model, self._layers, self._weights, group, untried, advance).run()
            self._tried = True
            done += len(self._layers) * len(group)
            yield from group


@dataclass(frozen=True, slots=True)
class _Layer:
    module: nn.Module
    weights: set[str]


class _Answered(Exception):
    """The layer that a forward pass was for has answered; the rest of the model is not needed."""


class _Reading:
    """All layers, once, for a group of batches.

    Args:
        model: without weights in its layers.
        layers: in the order in which the model asks them.
        weights: of the layers.
        batches: the group.
        untried: MoE layers whose observers must not see the trial; none if there is to be no trial.
        advance: told how many steps are done.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[_Layer],
        weights: Weights,
        batches: Sequence[Batch],
        untried: Sequence[MoELayer],
        advance: Callable[[int], None],
    ) -> None:
        self._model, self._layers, self._weights = model, layers, weights
        self._batches, self._untried, self._advance = batches, untried, advance
        self._states: list[Any] = [None] * len(batches)
        """What the layer before this one has said to each batch."""
        self._at = 0
        """The layer whose turn it is."""
        self._following: int | None = None
        """The batch that is just brought to this layer; None while the first is on its way."""

    @torch.no_grad()
    def run(self) -> None:
        """Ends when the last layer has answered every batch."""
        handles = []
        for number, layer in enumerate(self._layers):
            enter = self._enter(number)
            handles += [
                layer.module.register_forward_pre_hook(enter),
                layer.module.register_forward_hook(self._leave(number)),
            ]
        try:
            predicted_states(self._model, self._batches[0])
        except _Answered:
            return
        finally:
            for handle in handles:
                handle.remove()
            for layer in self._layers:
                vars(layer.module).pop("forward", None)
            self._weights.drop()
        raise self._unsupported("is never asked")

    def _enter(self, number: int) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            if self._following is None:
                if number != self._at:
                    raise self._unsupported(f"comes after layer {number}")
                self._weights.load(self._layers[number].weights)

        return enter

    def _leave(self, number: int) -> Callable[..., None]:
        def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._following is None:
                self._let_others_pass(output)
            elif number == self._at:
                raise _Answered(output)

        return leave

    def _let_others_pass(self, output: Any) -> None:
        """The first batch has its answer; before it goes on, all others get theirs."""
        count = len(self._batches)
        if self._untried:
            self._try(output)
        for number in range(1, count):
            self._advance(self._at * count + number)
            self._states[number] = self._follow(number)
        self._states[0] = output
        self._weights.drop()
        self._layers[self._at].module.forward = self._known
        self._at += 1
        self._advance(self._at * count)
        if self._at == len(self._layers):
            raise _Answered

    def _known(self, *_: Any, **__: Any) -> Any:
        """What a layer that is done says: only the last of them is listened to."""
        assert self._following is not None
        return self._states[self._following]

    def _follow(self, number: int) -> Any:
        """What the layer whose turn it is says to this batch."""
        self._following = number
        try:
            predicted_states(self._model, self._batches[number])
        except _Answered as answered:
            return answered.args[0]
        finally:
            self._following = None
        raise self._unsupported("is not asked again")

    def _try(self, output: Any) -> None:
        """Brings the first batch to this layer as the others are; it must say the same bits."""
        states = [expert_state(layer.experts) for layer in self._untried]
        observers = [state.observer for state in states]
        for state in states:
            state.observer = None
        try:
            same = _same_bits(self._follow(0), output)
        finally:
            for state, observer in zip(states, observers, strict=True):
                state.observer = observer
        if not same:
            raise self._unsupported("is told more than what the layer before it returns")

    def _unsupported(self, what: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{type(self._model).__name__}: layer {self._at} {what}, so that its layers cannot be "
            "read one by one; profile it on a machine that holds it whole"
        )


def _advance(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _groups(batches: Sequence[Batch], max_tokens: int) -> Iterator[list[Batch]]:
    """The batches in order, as many at a time as have that many tokens, or one."""
    group: list[Batch] = []
    total = 0
    for batch in batches:
        if group and total + batch.tokens.numel() > max_tokens:
            yield group
            group, total = [], 0
        group.append(batch)
        total += batch.tokens.numel()
    if group:
        yield group


def _same_bits(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_same_bits, one, other))
    return bool(one == other)
