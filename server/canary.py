"""The canary: whether the full model with an adapter still reads public text as before.

A few rows of every public domain, in one batch. They are taken from the end of each file, because
profiling reads from the start. Rows, batch and arithmetic are those of a simulation.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from proxymoe.common.adapter import AdapterLayout
from proxymoe.common.attach import AttachedAdapter
from proxymoe.common.loss import token_quality
from proxymoe.common.model import LoadedModel, load
from proxymoe.common.text import Batch, collate, read_rows, tokenise


class Canary:
    """Loss in nats per token of the full model with an adapter; the model is loaded on first use.

    Args:
        full: folder of the full model, materialised; its weights are mapped.
        layout: of the full model's adapter.
        texts: one JSONL file per public domain.
        rows: how many are read of each file.
        tokens: how many are read of each row, at most.
        dtype: that the model computes in; None for the stored one.
        threads: of torch, for the whole process; a simulation has 1.
    """

    def __init__(
        self,
        full: Path,
        layout: AdapterLayout,
        texts: Sequence[Path],
        rows: int,
        tokens: int,
        dtype: torch.dtype | None = None,
        threads: int = 1,
    ) -> None:
        self._full, self._layout, self._texts = full, layout, tuple(texts)
        self._rows, self._tokens = rows, tokens
        self._dtype, self._threads = dtype, threads

    def __call__(self, adapter: Tensor | None) -> float:
        """The loss with this adapter (P,), or without one.

        Raises:
            CheckpointError: the full model cannot be loaded.
            DataError: a text cannot be read; see `common/text.py`.
            LayoutMismatch: the adapter is of another layout.
        """
        torch.set_num_threads(self._threads)
        return public_loss(self._loaded, self._layout, adapter, self._batch)

    @cached_property
    def _loaded(self) -> LoadedModel:
        return load(self._full, self._dtype)

    @cached_property
    def _batch(self) -> Batch:
        tokenizer = self._loaded.tokenizer
        found = [tokenise(read_rows(path), tokenizer, self._tokens) for path in self._texts]
        return collate([row for examples in found for row in examples.examples[-self._rows :]])


def public_loss(
    full: LoadedModel, layout: AdapterLayout, adapter: Tensor | None, batch: Batch
) -> float:
    """Loss in nats per token on a batch of public rows, with an adapter (P,) or without one."""
    with AttachedAdapter(full.model, layout) as attached:
        if adapter is not None:
            attached.bind(adapter)
        return token_quality(full.model, [batch]).loss
