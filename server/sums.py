"""Statistics that are sums over tokens, by decoder layer: how they add up, and where they lie.

A kind of statistics is a dataclass of tensors. Those of a mixture of texts are weighted sums of
theirs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from proxymoe.common.checkpoint import read_tensors, write_tensors
from proxymoe.common.errors import CheckpointError

TOKENS = "num_tokens"

T = TypeVar("T")


def weighted_sum(parts: Sequence[tuple[float, T]]) -> T:
    """Field by field the weighted sum of some statistics, all of one kind."""
    kind: Any = type(parts[0][1])

    def total(name: str) -> Tensor:
        return torch.stack([weight * getattr(sums, name) for weight, sums in parts]).sum(0)

    found: T = kind(*(total(field.name) for field in fields(kind)))
    return found


def save_sums(path: Path, layers: Mapping[int, Any], num_tokens: int, **others: Tensor) -> None:
    """Writes one text's sums, the tokens behind them, and other tensors, atomically."""
    sums = {
        f"{at}.{field.name}": getattr(found, field.name)
        for at, found in layers.items()
        for field in fields(found)
    }
    write_tensors(path, sums | {TOKENS: torch.tensor([num_tokens])} | others)


def load_sums(
    path: Path, kind: type[T], *others: str
) -> tuple[dict[int, T], int, dict[str, Tensor]]:
    """What `save_sums` wrote: the sums, the tokens behind them, and the other tensors.

    Raises:
        CheckpointError: unreadable, or of another kind or version.
    """
    tensors, columns = read_tensors(path), [field.name for field in fields(cast(Any, kind))]
    layers = {name.partition(".")[0] for name in tensors} - {TOKENS, *others}
    wanted = {f"{at}.{column}" for at in layers for column in columns} | {TOKENS, *others}
    if missing := wanted - set(tensors):
        raise CheckpointError(f"{path}: no {min(missing)}; remove it and profile again")
    sums = {int(at): kind(*(tensors[f"{at}.{column}"] for column in columns)) for at in layers}
    rest = {name: tensors[name] for name in others}
    return dict(sorted(sums.items())), int(tensors[TOKENS]), rest
