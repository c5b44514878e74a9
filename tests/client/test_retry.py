"""A transfer that moves on is never given up; one that does not, soon."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.client.retry import MAX_DAMAGED, Backoff, Failures, TransferError
from proxymoe.common.errors import IntegrityError


@given(failures=st.integers(1, 10_000), draw=st.floats(0, 1, exclude_max=True))
def test_a_pause_is_in_the_upper_half_of_a_doubling_limit(failures, draw):
    backoff = Backoff(first_seconds=0.5, max_seconds=30.0)
    limit = min(30.0, 0.5 * 2.0 ** min(failures - 1, 20))
    assert limit / 2 <= backoff.seconds(failures, draw) <= limit


def test_pauses_double_and_then_stay():
    backoff = Backoff(first_seconds=1.0, max_seconds=5.0)
    assert [backoff.seconds(n, 0.0) for n in range(1, 6)] == [0.5, 1.0, 2.0, 2.5, 2.5]


@given(st.lists(st.booleans(), max_size=60))
def test_a_transfer_ends_with_one_failure_too_many_in_a_row_and_never_before(advances):
    failures = Failures(retries=3, reached=0)
    reached = in_a_row = 0
    for advance in advances:
        reached += advance
        in_a_row = 1 if advance else in_a_row + 1
        if in_a_row > 3:
            with pytest.raises(TransferError, match=r"cut; 4 failures in a row, the limit is 3"):
                failures.add("cut", reached, damaged=False)
            return
        assert failures.add("cut", reached, damaged=False) == in_a_row


def test_going_again_where_one_was_before_is_no_progress():
    failures = Failures(retries=2, reached=10)
    assert failures.add("cut", 10, damaged=False) == 1
    assert failures.add("cut", 5, damaged=False) == 2
    with pytest.raises(TransferError):
        failures.add("cut", 9, damaged=False)


def test_damage_at_one_place_ends_earlier_than_a_bad_network():
    failures = Failures(retries=100, reached=0)
    for _ in range(MAX_DAMAGED):
        failures.add("wrong", 7, damaged=True)
        failures.add("cut", 7, damaged=False)
    with pytest.raises(IntegrityError, match=r"wrong; wrong 3 times in a row"):
        failures.add("wrong", 7, damaged=True)


def test_damage_that_is_got_over_is_forgiven():
    failures = Failures(retries=100, reached=0)
    for reached in range(20):
        assert failures.add("wrong", reached + 1, damaged=True) == 1
