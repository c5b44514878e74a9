"""What is spent is on record before, counts per device, and stops a run in time."""

import sqlite3

import pytest

from proxymoe.common.accounting import Exposure, epsilon_of
from proxymoe.common.errors import ConfigError, PrivacySpent, ProtocolError
from proxymoe.server.spending import SCHEMA, Budget, Release, exposures, reserve

DELTA = 1e-5
RICH = Budget(epsilon=1e6, delta=DELTA)


@pytest.fixture
def database(tmp_path):
    found = sqlite3.connect(tmp_path / "state.db", isolation_level=None)
    found.executescript(SCHEMA)
    yield found
    found.close()


def release(number=1, devices=("a", "b"), attempt=0, probability=None, z=2.0, run="run"):
    return Release(
        run=run,
        round=number,
        attempt=attempt,
        mode="central",
        clip_norm=1.0,
        noise_multiplier=z,
        probability=probability,
        devices=devices,
    )


def cost(z, times=1):
    return epsilon_of(Exposure().after(z, None, times), DELTA)


def test_every_device_is_counted_for_its_own_rounds(database):
    assert reserve(database, 0.0, release(1, ("a", "b")), RICH) == pytest.approx(cost(2.0))
    assert reserve(database, 0.0, release(2, ("a", "c")), RICH) == pytest.approx(cost(2.0, 2))
    assert reserve(database, 0.0, release(3, ("b", "c")), RICH) == pytest.approx(cost(2.0, 2))
    assert reserve(database, 0.0, release(4, ("d",)), RICH) == pytest.approx(cost(2.0))
    spent = {device: found.inverse_squares for device, found in exposures(database).items()}
    assert spent == {"a": 0.5, "b": 0.5, "c": 0.5, "d": 0.25}


def test_runs_add_up(database):
    reserve(database, 0.0, release(run="one"), RICH)
    assert reserve(database, 0.0, release(run="two"), RICH) == pytest.approx(cost(2.0, 2))


def test_a_release_on_record_costs_nothing_more(database):
    first = reserve(database, 0.0, release(), RICH)
    assert reserve(database, 9.0, release(), Budget(first, DELTA)) == first
    assert exposures(database)["a"].inverse_squares == 0.25


def test_another_release_for_the_same_attempt_is_refused(database):
    reserve(database, 0.0, release(), RICH)
    with pytest.raises(ProtocolError, match="make another attempt"):
        reserve(database, 0.0, release(z=3.0), RICH)
    reserve(database, 0.0, release(attempt=1, z=3.0), RICH)


def test_the_run_stops_before_a_device_spends_too_much(database):
    budget = Budget(cost(2.0, 3) * 1.0001, DELTA)
    for number in (1, 2, 3):
        reserve(database, 0.0, release(number), budget)
    with pytest.raises(PrivacySpent, match=r"promised.*spent.*took part less often"):
        reserve(database, 0.0, release(4), budget)
    reserve(database, 0.0, release(5, ("c",)), budget)
    assert exposures(database)["a"].inverse_squares == 0.75


def test_what_was_sampled_counts_for_everybody(database):
    dealt = reserve(database, 0.0, release(1, ("a",)), RICH)
    sampled = reserve(database, 0.0, release(2, (), probability=0.1), RICH)
    assert sampled > dealt
    both = Exposure(0.25, {(2.0, 0.1): 1})
    assert sampled == pytest.approx(epsilon_of(both, DELTA))
    later = reserve(database, 0.0, release(3, ("z",)), RICH)
    assert later == pytest.approx(epsilon_of(both, DELTA))
    assert exposures(database)["a"].sampled == {(2.0, 0.1): 1}


def test_nothing_is_on_record_unless_the_caller_s_transaction_is(database):
    database.execute("BEGIN IMMEDIATE")
    reserve(database, 0.0, release(), RICH)
    database.execute("ROLLBACK")
    assert exposures(database) == {}


def test_a_crash_forgets_nothing(database, tmp_path):
    reserve(database, 0.0, release(), RICH)
    database.close()
    again = sqlite3.connect(tmp_path / "state.db", isolation_level=None)
    again.executescript(SCHEMA)
    assert exposures(again)["b"].inverse_squares == 0.25
    again.close()


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM releases",
        "DELETE FROM exposures",
        "UPDATE releases SET content = '{}'",
        "UPDATE exposures SET inverse_square = 0",
    ],
)
def test_the_record_only_grows(database, change):
    reserve(database, 0.0, release(), RICH)
    with pytest.raises(sqlite3.IntegrityError, match="stays on record"):
        database.execute(change)


def test_a_device_twice_in_a_cohort_is_refused(database):
    with pytest.raises(ConfigError, match="twice"):
        reserve(database, 0.0, release(devices=("a", "a")), RICH)
    assert exposures(database) == {}
