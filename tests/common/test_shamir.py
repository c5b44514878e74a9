"""Any t shares give the secret; fewer fit every secret; false ones are not believed for long."""

import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.errors import ProtocolError
from proxymoe.common.shamir import PRIME, SECRET_BYTES, SHARE_BYTES, combine, split

secrets = st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES)


@given(secrets, st.integers(1, 9), st.data())
def test_any_threshold_of_shares_gives_the_secret(secret, count, data):
    threshold = data.draw(st.integers(1, count))
    holders = data.draw(st.sets(st.integers(0, 255), min_size=count, max_size=count))
    shares = split(secret, threshold, holders, os.urandom)
    assert shares.keys() == holders
    assert all(len(share) == SHARE_BYTES for share in shares.values())
    chosen = data.draw(st.permutations(sorted(shares)))[: max(threshold, count - 1)]
    assert combine({holder: shares[holder] for holder in chosen}, threshold) == secret


def test_every_subset_will_do():
    secret = os.urandom(SECRET_BYTES)
    shares = split(secret, 3, range(6), os.urandom)
    for chosen in itertools.combinations(shares, 3):
        assert combine({holder: shares[holder] for holder in chosen}, 3) == secret


def test_fewer_shares_fit_every_secret():
    """For t - 1 shares and any secret there is a polynomial; the one share left decides."""
    shares = split(bytes(32), 2, [0, 1], os.urandom)
    for wanted in (1, 77, 2**256 - 1):
        # The line through (0, wanted) and the one known share, at 2.
        slope = (int.from_bytes(shares[0], "big") - wanted) % PRIME
        other = ((wanted + 2 * slope) % PRIME).to_bytes(SHARE_BYTES, "big")
        assert combine({0: shares[0], 1: other}, 2) == wanted.to_bytes(32, "big")


def test_shares_of_the_same_secret_differ_each_time():
    secret = bytes(SECRET_BYTES)
    one, other = (split(secret, 2, range(3), os.urandom) for _ in range(2))
    assert not set(one.values()) & set(other.values())
    assert secret not in b"".join(one.values())


def test_extreme_secrets_survive():
    for secret in (bytes(32), b"\xff" * 32):
        assert combine(split(secret, 4, range(5), os.urandom), 4) == secret


def test_the_field_is_a_field_and_just_large_enough():
    assert PRIME > 2**256
    assert all(pow(base, PRIME - 1, PRIME) == 1 for base in range(2, 60))
    odd = PRIME - 1
    while odd % 2 == 0:
        odd //= 2
    for base in range(2, 40):  # Miller and Rabin
        x = pow(base, odd, PRIME)
        exponent = odd
        while exponent != PRIME - 1 and x not in (1, PRIME - 1):
            x, exponent = x * x % PRIME, exponent * 2
        assert x == PRIME - 1 or exponent % 2 == 1


def test_too_few_shares_are_refused():
    shares = split(os.urandom(32), 3, range(4), os.urandom)
    with pytest.raises(ProtocolError, match="2 shares of a secret, 3 are needed"):
        combine({holder: shares[holder] for holder in (0, 1)}, 3)


@pytest.mark.parametrize("share", [b"", bytes(32), bytes(34), b"\xff" * 33])
def test_a_share_that_is_no_number_of_the_field_is_refused(share):
    shares = split(os.urandom(32), 2, range(2), os.urandom)
    with pytest.raises(ProtocolError, match="share of holder 1"):
        combine({**shares, 1: share}, 2)


def test_a_false_share_gives_another_secret_or_none():
    secret = os.urandom(32)
    shares = split(secret, 2, range(2), os.urandom)
    wrong = (int.from_bytes(shares[1], "big") ^ 1).to_bytes(SHARE_BYTES, "big")
    assert combine({0: shares[0], 1: wrong}, 2) != secret
    # Shares of a number between 2^256 and the prime: no 32 bytes stand for it.
    line = {x: ((2**256 + 5 + 9 * (x + 1)) % PRIME).to_bytes(SHARE_BYTES, "big") for x in (0, 1)}
    with pytest.raises(ProtocolError, match="give no secret"):
        combine(line, 2)


@pytest.mark.parametrize(
    ("secret", "threshold", "holders"),
    [(bytes(31), 1, [0]), (bytes(32), 0, [0]), (bytes(32), 3, [0, 1]), (bytes(32), 1, [-1])],
)
def test_impossible_sharings_are_bugs(secret, threshold, holders):
    with pytest.raises(AssertionError):
        split(secret, threshold, holders, os.urandom)
