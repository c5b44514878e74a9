"""How a model is run over public text: whole, or one layer at a time (`server/streamed.py`)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from proxymoe.common.loss import predicted_states
from proxymoe.common.text import Batch

Reader = Callable[[Any, Sequence[Batch]], Iterator[Batch]]
"""Runs a model over batches, and yields each that all layers with experts have seen."""


def read_whole(
    model: Any, batches: Sequence[Batch], progress: Callable[[int, int], None] = lambda *_: None
) -> Iterator[Batch]:
    """Runs a model that is whole in memory; `progress` is told of the batches done, and of all."""
    for done, batch in enumerate(batches, start=1):
        with torch.no_grad():
            predicted_states(model, batch)
        yield batch
        progress(done, len(batches))
