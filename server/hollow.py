"""A model without weights, and its weights from a checkpoint, some at a time.

What such a model computes is what the whole model computes: it is made as transformers makes one
to be loaded, with the same types, and what is computed and not stored is there from the start.
"""

import re
from collections.abc import Iterable

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from proxymoe.common.checkpoint import DTYPES
from proxymoe.common.manifest import Piece, by_target
from proxymoe.server.base import BaseCheckpoint


def hollow_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model with all that is computed and not stored, such as rotary tables; no weights."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="eager"
        )
    return model


class Weights:
    """Gives a hollow model its weights, and takes them away."""

    def __init__(self, base: BaseCheckpoint, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._checkpoint, self._model = base.checkpoint, model
        self._pieces = by_target(base.pieces)
        self._dtypes = _dtypes(model, self._pieces, dtype)
        self._held: dict[str, nn.Parameter] = {}

    def below(self, path: str) -> set[str]:
        """The names of all weights of a module."""
        return {name for name in self._pieces if name.startswith(f"{path}.")}

    def load(self, names: Iterable[str]) -> None:
        """Reads these weights, in the type that they have in a model that is loaded whole."""
        for name in names:
            owner, leaf = self._place(name)
            hollow = getattr(owner, leaf)
            weight = self._read(self._pieces[name], hollow.shape, self._dtypes[name])
            if leaf in owner._buffers:
                owner._buffers[leaf] = weight
            else:
                self._held[name] = hollow
                owner._parameters[leaf] = nn.Parameter(weight, requires_grad=False)

    def drop(self) -> None:
        """Takes the parameters away again; buffers are small and stay."""
        for name, hollow in self._held.items():
            owner, leaf = self._place(name)
            owner._parameters[leaf] = hollow
        self._held = {}

    def keep(self) -> None:
        """What was read up to now stays."""
        self._held = {}

    def _place(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self._model.get_submodule(path), leaf

    def _read(self, pieces: list[Piece], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        weight = torch.empty(shape, dtype=dtype)
        for piece, part in zip(pieces, weight.view(len(pieces), -1), strict=True):
            stored = part if DTYPES[piece.dtype] is dtype else part.to(DTYPES[piece.dtype])
            buffer = stored.view(torch.uint8).numpy().data
            self._checkpoint.read_into(piece.source, buffer, piece.offset)
            if stored is not part:
                part.copy_(stored)
        return weight


def _dtypes(
    model: PreTrainedModel, names: Iterable[str], dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """The type of each weight: its own, or fp32 where a family insists on it."""
    wide = model._get_dtype_plan(dtype)
    pattern = build_glob_alternation(list(wide))[0] if wide else re.compile(r"(?!)")
    return {
        name: torch.float32 if pattern.search(name) else model.get_parameter_or_buffer(name).dtype
        for name in names
    }
