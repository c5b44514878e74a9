"""The domain mixture of a device: found locally, and noised before it may leave.

Routing traces reconstruct text, so all that may ever describe private data is a few weights over
public domains. Each row is explained as a mixture of the domains' token distributions, by EM from
the same start for every row; the device's mixture is the mean over its rows. A row's weights sum
to 1 whatever it says, so putting another row in its place moves the mean of n rows by at most
2/n in L1 and √2/n in L2. Against that the Gaussian noise is calibrated; the number of rows counts
as public.

Shapes: M domains, V tokens of the vocabulary, n rows, N tokens of several rows in a line.
"""

import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from proxymoe.common.domains import DomainTable
from proxymoe.common.errors import ConfigError, DataError

Array = NDArray[np.float64]
Normals = Callable[[int], Sequence[float] | Array]
"""Draws that many independent standard normal numbers."""

EM_STEPS = 50
"""Fixed, so that a row's weights depend on that row and nothing else."""
MAX_ROW_TOKENS = 4096
"""Of a longer row only the beginning is read."""
CHUNK_TOKENS = 1 << 14
"""Tokens that are explained at one time; memory is this times M."""
USEFUL_NOISE = 0.1
"""Total variation that the noise may be expected to add; a noisier mixture is not released."""
GRID = 2.0**-12
"""Noised weights are rounded to this; see `release`."""
EPSILONS = (1e-3, 100.0)
DELTAS = (1e-10, 0.1)
"""Where the calibration keeps its accuracy in double precision, and promises mean something."""


def row_mixtures(table: DomainTable, rows: Sequence[Sequence[int]]) -> Array:
    """(n, M) weights of the domains in each row of tokens; every row sums to 1.

    A row without tokens fits every domain alike.

    Raises:
        DataError: a token lies outside the table's vocabulary.
    """
    weights = np.full((len(rows), len(table.domains)), 1.0 / len(table.domains))
    for chosen in _chunks(rows):
        parts = [np.asarray(rows[i][:MAX_ROW_TOKENS], dtype=np.int64) for i in chosen]
        tokens = np.concatenate(parts)
        if not 0 <= tokens.min() <= tokens.max() < table.vocab_size:
            raise DataError(
                f"tokens outside the {table.vocab_size} of the domain table; the table belongs to "
                "another tokenizer: fetch the one of this base model"
            )
        logs = table.log_probabilities.T[tokens].astype(np.float64)
        likelihoods = np.exp(logs - logs.max(axis=1, keepdims=True))
        weights[chosen] = _explain(likelihoods, np.array([len(part) for part in parts]))
    return weights


def mixture_of(table: DomainTable, rows: Sequence[Sequence[int]]) -> dict[str, float]:
    """The domain mixture of all rows, each with the same weight. Private: see `release`.

    Raises:
        DataError: no rows, or a token outside the table's vocabulary.
    """
    if not rows:
        raise DataError("no rows to describe; add data, or name a domain")
    mean = row_mixtures(table, rows).mean(axis=0)
    return dict(zip(table.domains, mean.tolist(), strict=True))


def release(
    mixture: Mapping[str, float],
    num_rows: int,
    epsilon: float,
    delta: float,
    normals: Normals | None = None,
) -> dict[str, float]:
    """The mixture of `num_rows` rows with noise, (epsilon, delta)-private per row; sums to 1.

    Noised weights are rounded to a coarse grid before they return to the simplex: the low bits of
    a floating-point sum can tell its terms (Mironov 2012), and here none are left. Whatever is
    done with the result costs no further privacy. Without `normals` they come from the operating
    system's secure source; pass others in tests and simulations only.

    Raises:
        DataError: too few rows for the noise to leave a useful mixture; tells how many it takes.
        ConfigError: epsilon or delta out of range, or weights that are no mixture.
    """
    needed = rows_needed(len(mixture), epsilon, delta)
    weights = np.array(list(mixture.values()))
    if not (weights >= 0).all() or not abs(float(weights.sum()) - 1.0) <= 1e-9:
        raise ConfigError("a domain mixture has weights >= 0 that sum to 1")
    if num_rows < needed:
        raise DataError(
            f"{num_rows} rows are too few for a domain mixture of {len(mixture)} domains at "
            f"epsilon {epsilon:g} and delta {delta:g}: the noise leaves it useful from {needed} "
            "rows on; add rows, allow a larger epsilon, or name a domain"
        )
    scale = noise_scale(math.sqrt(2.0) / num_rows, epsilon, delta)
    noise = np.asarray((normals or secure_normals)(len(mixture)))
    noised = np.round((weights + scale * noise) / GRID) * GRID
    return dict(zip(mixture, project(noised).tolist(), strict=True))


def rows_needed(num_domains: int, epsilon: float, delta: float) -> int:
    """The fewest rows for which noise is expected to move at most `USEFUL_NOISE` of the weight.

    Each of M weights errs by σ√(2/π) on average, with σ = √2/n times the noise for sensitivity 1,
    and total variation is half their sum. The projection afterwards only takes noise away.

    Raises:
        ConfigError: epsilon or delta out of range.
    """
    unit = noise_scale(1.0, epsilon, delta)
    return max(1, math.ceil(num_domains * unit / (math.sqrt(math.pi) * USEFUL_NOISE)))


def noise_scale(sensitivity: float, epsilon: float, delta: float) -> float:
    """The smallest standard deviation that makes a Gaussian release (epsilon, delta)-private.

    The analytic Gaussian mechanism of Balle and Wang (ICML 2018, arXiv 1805.06530): the exact
    condition is solved by bisection, and the end that satisfies it is returned.

    Raises:
        ConfigError: epsilon or delta outside of `EPSILONS` or `DELTAS`.
    """
    for name, value, (low, high) in (("epsilon", epsilon, EPSILONS), ("delta", delta, DELTAS)):
        if not low <= value <= high:
            raise ConfigError(f"{name} {value:g} is out of range; choose {low:g} to {high:g}")
    low = high = 1.0
    while gaussian_delta(high, epsilon) > delta:
        low, high = high, 2.0 * high
    while gaussian_delta(low, epsilon) <= delta:
        low, high = 0.5 * low, low
    while high - low > 1e-9 * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if gaussian_delta(middle, epsilon) > delta else (low, middle)
    return sensitivity * high


def gaussian_delta(scale: float, epsilon: float) -> float:
    """The exact delta of Gaussian noise at sensitivity 1 (Balle and Wang 2018, theorem 8)."""
    half, shift = 0.5 / scale, epsilon * scale
    return _normal_below(half - shift) - math.exp(epsilon) * _normal_below(-half - shift)


def project(point: Array) -> Array:
    """The nearest point of the probability simplex (Duchi et al. 2008)."""
    descending = np.sort(point)[::-1]
    excess = (np.cumsum(descending) - 1.0) / np.arange(1, point.size + 1)
    kept = int(np.flatnonzero(descending > excess)[-1])
    positive = np.maximum(point - excess[kept], 0.0)
    nearest: Array = positive / positive.sum()
    return nearest


def secure_normals(count: int) -> list[float]:
    """Standard normal numbers from the operating system's secure source, by inversion.

    52 bits put an end to the tails at 8 standard deviations, beyond which lies 10⁻¹⁵.
    """
    normal = NormalDist()
    return [normal.inv_cdf((secrets.randbits(52) + 0.5) / 2.0**52) for _ in range(count)]


def _normal_below(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def _chunks(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Numbers of the rows that have tokens, in groups of about `CHUNK_TOKENS` tokens."""
    chosen: list[int] = []
    size = 0
    for number, row in enumerate(rows):
        if len(row):
            chosen.append(number)
            size += min(len(row), MAX_ROW_TOKENS)
        if size >= CHUNK_TOKENS:
            yield chosen
            chosen, size = [], 0
    if chosen:
        yield chosen


def _explain(likelihoods: Array, lengths: NDArray[np.int64]) -> Array:
    """(n, M) weights of rows of these lengths, whose tokens have these (N, M) likelihoods."""
    owner = np.repeat(np.arange(lengths.size), lengths)
    first = np.cumsum(lengths) - lengths
    weights = np.full((lengths.size, likelihoods.shape[1]), 1.0 / likelihoods.shape[1])
    for _ in range(EM_STEPS):
        # Never 0 / 0: a step takes from the best domain of a token at most the factor 1 / length.
        share = likelihoods * weights[owner]
        share /= share.sum(axis=1, keepdims=True)
        weights = np.add.reduceat(share, first) / lengths[:, None]
    whole: Array = weights / weights.sum(axis=1, keepdims=True)
    return whole
