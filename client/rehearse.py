"""Rehearses a training job in a process of its own: a few steps at full rows, and what they took.

A prediction of memory is worth what a measurement says of it. The steps are those of a real job,
on public text cut into rows of exactly `max_tokens`, all of it predicted: the most that a job can
ask for. `python -m proxymoe.client.rehearse` reads a `Rehearsal` as JSON from standard input and
writes a `Measured` as JSON.
"""

import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from proxymoe.client.train import tune
from proxymoe.common.adapter import adapter_layout
from proxymoe.common.config import AdapterSettings, TrainSettings
from proxymoe.common.errors import DataError
from proxymoe.common.measure import Measured, measured
from proxymoe.common.model import compute_dtype, load
from proxymoe.common.text import Example, read_rows, tokenise

STEPS = 3
"""The optimiser's state exists from the first step on; the third finds the heap as it stays."""


class Rehearsal(BaseModel):
    """What to rehearse."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    """A materialised submodel."""
    text: Path
    """Public text as JSONL."""
    adapter: AdapterSettings
    train: TrainSettings


def rehearse(asked: Rehearsal) -> Measured:
    """The memory of this process after the steps, the peak over its whole life included.

    Raises:
        CheckpointError: the submodel is not there, or damaged.
        DataError: there is no text.
    """
    torch.set_num_threads(1)
    loaded = load(asked.folder, compute_dtype(asked.train.dtype))
    targets, rank = asked.adapter.targets, asked.adapter.rank
    layout = adapter_layout(loaded.model, targets, rank, seed=0).held_under(loaded.plan)
    text = tokenise(read_rows(asked.text), loaded.tokenizer, asked.train.max_tokens).examples
    count, length = asked.train.batch_size * STEPS, asked.train.max_tokens
    rows = list(full_rows((token for row in text for token in row.tokens), count, length))
    # Nobody sits out: that is the most work that a step can be.
    how = {"steps": STEPS, "expert_dropout": 0.0, "learning_rate": 1e-4}
    train = asked.train.model_copy(update=how)
    tune(loaded, layout, layout.zeros(), rows, train, np.random.default_rng(0))
    return measured()


def full_rows(tokens: Iterable[int], count: int, length: int) -> Iterator[Example]:
    """`count` rows of exactly `length` tokens, read on and on from a text; all is predicted.

    Raises:
        DataError: a text without tokens.
    """
    stream = tuple(tokens)
    if not stream:
        raise DataError("a rehearsal needs public text, and there is none")
    endless = itertools.cycle(stream)
    for _ in range(count):
        yield Example(tuple(itertools.islice(endless, length)), start=1)


def main() -> None:
    """Entry point of the process."""
    asked = Rehearsal.model_validate_json(sys.stdin.read())
    sys.stdout.write(rehearse(asked).model_dump_json())


if __name__ == "__main__":
    main()
