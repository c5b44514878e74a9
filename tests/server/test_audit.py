"""The audit log gives every change of itself away."""

import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.errors import IntegrityError
from proxymoe.server import audit

events = st.lists(
    st.tuples(
        st.floats(0, 1e10), st.text(max_size=8), st.dictionaries(st.text(max_size=4), st.text())
    ),
    max_size=6,
)


def log_of(written):
    database = sqlite3.connect(":memory:")
    database.executescript(audit.SCHEMA)
    for time, event, body in written:
        audit.append(database, time, event, body=body)
    return database


@given(events)
def test_what_was_written_is_read_in_order(written):
    found = list(audit.entries(log_of(written)))
    assert [(e.time, e.event, e.body["body"]) for e in found] == written
    assert [e.seq for e in found] == list(range(1, len(written) + 1))


CHANGES = {
    "a changed time": "UPDATE audit SET time = time + 1 WHERE seq = 2",
    "a changed event": "UPDATE audit SET event = 'other' WHERE seq = 2",
    "a changed body": "UPDATE audit SET body = '{}' WHERE seq = 2",
    "a changed hash": "UPDATE audit SET hash = '00' WHERE seq = 2",
    "a dropped entry": "DELETE FROM audit WHERE seq = 2",
    "two swapped bodies": "UPDATE audit SET body = (SELECT body FROM audit a WHERE a.seq = 3) "
    "WHERE seq = 2",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_found_at_its_entry(change):
    database = log_of([(float(i), "event", {"i": str(i)}) for i in range(4)])
    database.execute(CHANGES[change])
    with pytest.raises(IntegrityError, match="changed at entry 2"):
        list(audit.entries(database))


def test_an_entry_at_the_end_that_nobody_chained_is_found():
    database = log_of([(0.0, "event", {})])
    database.execute("INSERT INTO audit VALUES (2, 0.0, 'event', '{}', '00')")
    with pytest.raises(IntegrityError, match="changed at entry 2"):
        list(audit.entries(database))
