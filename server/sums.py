"""Statistics that are sums over tokens: those of a mixture of texts are weighted sums of theirs."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def weighted_sum(parts: Sequence[tuple[float, T]]) -> T:
    """Field by field the weighted sum of some dataclasses of tensors, all of one kind."""
    kind: Any = type(parts[0][1])

    def total(name: str) -> Tensor:
        return torch.stack([weight * getattr(sums, name) for weight, sums in parts]).sum(0)

    found: T = kind(*(total(field.name) for field in fields(kind)))
    return found
