"""Shamir's secret sharing (1979) over a prime field: t of n shares give the secret, fewer nothing.

A secret is the value at zero of a random polynomial of degree t - 1; holder i has its value at
i + 1. With t - 1 shares every secret is equally likely, whatever computer one has. Sharing protects
against nobody who lies: whoever combines shares must know the right secret by other means.

Python's integers take different times for different numbers. Shares are made and combined on the
machine that owns or learns the secret, so only someone who can time that machine could gain by it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache

from proxymoe.common.errors import ProtocolError

PRIME = 2**256 + 297
"""The smallest prime above every 32-byte secret."""
SECRET_BYTES = 32
SHARE_BYTES = 33
_MORE_BYTES = 48
"""Bytes per random coefficient: 16 more than the field has, so that the remainder is even."""


def split(
    secret: bytes, threshold: int, holders: Iterable[int], entropy: Callable[[int], bytes]
) -> dict[int, bytes]:
    """{holder: share}, of which any `threshold` give the secret back.

    Args:
        secret: `SECRET_BYTES` long.
        threshold: t, from 1 to the number of holders.
        holders: distinct numbers from 0.
        entropy: gives as many random bytes as it is asked for.
    """
    owners = sorted(holders)
    assert len(secret) == SECRET_BYTES
    assert 1 <= threshold <= len(set(owners)) == len(owners)
    assert owners[0] >= 0, "the value at zero is the secret"
    random = (int.from_bytes(entropy(_MORE_BYTES), "big") % PRIME for _ in range(threshold - 1))
    coefficients = [*random, int.from_bytes(secret, "big")]
    return {i: _value(coefficients, i + 1).to_bytes(SHARE_BYTES, "big") for i in owners}


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret, if none of the shares is false.

    Args:
        shares: {holder: share}; of more than `threshold`, the first holders' are used.
        threshold: as the secret was split with.

    Raises:
        ProtocolError: too few shares, a share is no number of the field, or they give no 32-byte
            secret, which false shares do once in a while; mostly they give another secret.
    """
    if len(shares) < threshold:
        raise ProtocolError(f"{len(shares)} shares of a secret, {threshold} are needed")
    holders = tuple(sorted(shares)[:threshold])
    total = 0
    for holder, weight in zip(holders, _weights_at_zero(holders), strict=True):
        value = int.from_bytes(shares[holder], "big")
        if len(shares[holder]) != SHARE_BYTES or value >= PRIME:
            raise ProtocolError(f"share of holder {holder}: no number of the field; it is broken")
        total += weight * value
    total %= PRIME
    if total >> (8 * SECRET_BYTES):
        raise ProtocolError(f"{threshold} shares give no secret; one of them is false")
    return total.to_bytes(SECRET_BYTES, "big")


@lru_cache(maxsize=64)
def _weights_at_zero(holders: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange weights: the value at zero is the weighted sum of the holders' values.

    They depend on the holders only: found once, they serve all secrets of one set of holders.
    """
    points = [holder + 1 for holder in holders]
    return tuple(_weight_at_zero(x, points) for x in points)


def _weight_at_zero(x: int, points: Sequence[int]) -> int:
    above, below = 1, 1
    for other in points:
        if other != x:
            above = above * other % PRIME
            below = below * (other - x) % PRIME
    return above * pow(below, -1, PRIME) % PRIME


def _value(coefficients: Sequence[int], x: int) -> int:
    """The polynomial at x, by Horner's rule; the highest coefficient comes first."""
    value = 0
    for coefficient in coefficients:
        value = (value * x + coefficient) % PRIME
    return value
