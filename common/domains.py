"""Public domains as a small table: how likely each token is in the text of each domain.

The server counts tokens of public calibration text and ships the table; a device explains its
private rows by it, locally, and so finds its domain mixture (`client/mixture.py`). Every domain is
interpolated with what all domains share (Jelinek-Mercer smoothing),

    p(token | domain) = (1 − λ) · count / total + λ · background(token),

so words that every domain uses say little, and a token that no domain knows says nothing.

Shapes: M domains, in the order of their names; V tokens of the vocabulary.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from proxymoe.common.errors import CheckpointError, DataError
from proxymoe.common.files import write_bytes

BACKGROUND_SHARE = 0.7
"""λ. The text of a domain is short, so single counts deserve little trust."""
MAX_DOMAINS = 256
MAX_TABLE_BYTES = 128 << 20
NORMALISATION_SLACK = 1e-3
"""Probabilities of a domain sum to 1 up to this; single precision stays far below."""
DOMAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

Table = TypeVar("Table")


@dataclass(frozen=True, slots=True, eq=False)
class DomainTable:
    """Log-probabilities of the vocabulary's tokens by public domain; always a valid table.

    Raises:
        CheckpointError: too few or too many domains, a bad name, or rows that are no
            distributions over one vocabulary.
    """

    domains: tuple[str, ...]
    """Sorted names."""
    log_probabilities: NDArray[np.float32]
    """(M, V), natural logarithms."""

    def __post_init__(self) -> None:
        table = self.log_probabilities
        require_names(self.domains)
        if table.dtype != np.float32 or table.ndim != 2 or len(table) != len(self.domains):
            raise CheckpointError(f"table of {table.dtype} {table.shape}, not of float32 (M, V)")
        totals = np.exp(table.astype(np.float64).clip(max=1.0)).sum(axis=1)  # NaN stays NaN
        whole = (np.abs(totals - 1.0) <= NORMALISATION_SLACK) & np.isfinite(table).all(axis=1)
        if bad := [name for name, good in zip(self.domains, whole, strict=True) if not good]:
            raise CheckpointError(f"domains {bad}: not finite, or probabilities not summing to 1")

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.log_probabilities.shape[1])


def require_names(domains: Sequence[str]) -> None:
    """Returns if these can be the domains of a table: a few proper names, sorted and distinct.

    Raises:
        CheckpointError: they cannot.
    """
    if not 2 <= len(domains) <= MAX_DOMAINS:
        raise CheckpointError(f"table of {len(domains)} domains; it needs 2 to {MAX_DOMAINS}")
    if list(domains) != sorted(set(domains)):
        raise CheckpointError("table of domains that are not sorted or not distinct")
    if bad := [name for name in domains if not DOMAIN.fullmatch(name)]:
        raise CheckpointError(f"domain {bad[0][:80]!r}: a name is like {DOMAIN.pattern}")


def count_tokens(rows: Iterable[Sequence[int]], vocab_size: int) -> NDArray[np.int64]:
    """(V,) how often each token occurs in the rows.

    Raises:
        DataError: a token lies outside the vocabulary.
    """
    tokens = np.fromiter((token for row in rows for token in row), dtype=np.int64)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise DataError(f"tokens outside a vocabulary of {vocab_size}; of another tokenizer?")
    return np.bincount(tokens, minlength=vocab_size)


def domain_table(token_counts_by_domain: Mapping[str, ArrayLike]) -> DomainTable:
    """The smoothed table of domains, each given as its (V,) token counts.

    The background is the mean over domains, each with one more of every token: long domains
    count as much as short ones, and nothing is impossible.

    Raises:
        DataError: counts of different sizes, negative or not finite, or a domain without text.
        CheckpointError: see `DomainTable`.
    """
    names = sorted(token_counts_by_domain)
    rows = [np.asarray(token_counts_by_domain[name], dtype=np.float64) for name in names]
    if len(sizes := {row.shape for row in rows}) > 1 or any(row.ndim != 1 for row in rows):
        raise DataError(f"token counts of shapes {sorted(sizes)}; one vocabulary is needed")
    for name, row in zip(names, rows, strict=True):
        if not np.isfinite(row).all() or (row < 0).any() or row.sum() == 0:
            raise DataError(f"domain {name}: token counts are negative, not finite or all zero")
    counts = np.stack(rows) if rows else np.zeros((0, 0))
    totals = counts.sum(axis=1, keepdims=True)
    background = np.mean((counts + 1.0) / (totals + counts.shape[1]), axis=0) if rows else counts
    mixed = (1.0 - BACKGROUND_SHARE) * counts / totals + BACKGROUND_SHARE * background
    return DomainTable(tuple(names), np.log(mixed).astype(np.float32))


def table_bytes(table: DomainTable) -> bytes:
    """The table as safetensors, one tensor per domain; equal tables have equal bytes."""
    rows = np.ascontiguousarray(table.log_probabilities)  # safetensors reads memory as it lies
    return safetensors.save(dict(zip(table.domains, rows, strict=True)))


def table_from(content: bytes) -> DomainTable:
    """The table that these bytes stand for; they may come from anywhere.

    Raises:
        CheckpointError: too large, no safetensors, or no valid table.
    """
    tensors = tensors_of(content)
    names = sorted(tensors)
    kinds = {(tensors[name].dtype.name, tensors[name].shape) for name in names}
    if len(kinds) > 1:
        raise CheckpointError(f"domains of different types or sizes: {sorted(kinds)[:4]}")
    table = np.stack([tensors[name] for name in names]) if names else np.zeros((0, 0), np.float32)
    return DomainTable(tuple(names), table)


def tensors_of(content: bytes) -> dict[str, NDArray[Any]]:
    """The tensors of a shipped table; its bytes may come from anywhere.

    Raises:
        CheckpointError: too large, or no safetensors.
    """
    if len(content) > MAX_TABLE_BYTES:
        raise CheckpointError(f"table of {len(content)} bytes, the limit is {MAX_TABLE_BYTES}")
    try:
        return safetensors.load(content)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"not a safetensors table ({error})") from error


def save_table(path: Path, table: DomainTable) -> None:
    """Writes the table to a safetensors file, atomically."""
    write_bytes(path, table_bytes(table))


def load_table(path: Path) -> DomainTable:
    """The table in a file.

    Raises:
        CheckpointError: the file is missing, too large or no valid table; names the file.
    """
    return read_table(path, table_from)


def read_table(path: Path, read: Callable[[bytes], Table]) -> Table:
    """What `read` makes of a table's file, of which no more is read than a table may have.

    Raises:
        CheckpointError: the file is missing, or `read` refuses it; names the file.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TABLE_BYTES + 1)
        return read(content)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; fetch the table again") from error


def total_variation(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Distance of two domain mixtures, 0 to 1: the weight that would have to move."""
    names = one.keys() | other.keys()
    gaps = (abs(one.get(name, 0.0) - other.get(name, 0.0)) for name in names)
    return 0.5 * math.fsum(gaps)  # exact, whatever order a set has


def changed_enough(
    old: Mapping[str, float] | None, new: Mapping[str, float], threshold: float
) -> bool:
    """Whether a plan for `old` should be made anew for `new`; always, if there was none.

    A plan is refreshed with hysteresis, because every change costs a download. Compare mixtures
    that have been released: what follows from them costs no further privacy, while a decision
    taken on the private mixture itself would give some of it away.
    """
    return old is None or total_variation(old, new) >= threshold
