"""What left is on the record, before it leaves, for good, and whoever touches the record shows."""

import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from proxymoe.client import ledger as ledger_module
from proxymoe.client.entries import Entry, Kind
from proxymoe.client.ledger import Head, Ledger, Totals
from proxymoe.common.errors import DataError, IntegrityError
from tests.laws import tried

NOVEMBER = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()
DAY = 86400.0
DIGEST = "ab" * 32
UPDATE = Entry(
    kind=Kind.UPDATE,
    receiver="coordinator 127.0.0.1:9000",
    num_bytes=100,
    digest=DIGEST,
    run="trial",
    round=3,
    clip_norm=30.0,
)
FETCH = Entry(
    kind=Kind.REQUEST, receiver="x", num_bytes=10, digest=DIGEST, fetched_bytes=5_000_000_000
)
MIXTURE = Entry(
    kind=Kind.MIXTURE, receiver="x", num_bytes=1, digest=DIGEST, noise=0.01, epsilon=0.5, delta=1e-5
)
WRITER = """
import sys
from pathlib import Path
from proxymoe.client.entries import Entry, Kind
from proxymoe.client.ledger import Ledger
path, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
ledger = Ledger.create(path)
for number in range(count):
    entry = Entry(kind=Kind.UPDATE, receiver=name, num_bytes=1, digest="ab" * 32, round=number)
    print(ledger.write(entry), flush=True)
"""
amounts = st.none() | st.floats(min_value=1e-300, max_value=1e300)
entries = st.builds(
    Entry,
    kind=st.sampled_from(Kind),
    receiver=st.text(min_size=1, max_size=20),
    num_bytes=st.integers(0, 1 << 50),
    digest=st.just(DIGEST),
    run=st.none() | st.text(max_size=20),
    round=st.none() | st.integers(0, 1 << 50),
    fetched_bytes=st.integers(0, 1 << 50),
    clip_norm=amounts,
    noise=amounts,
    epsilon=amounts,
    delta=st.none() | st.floats(1e-300, 0.5),
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "device" / "ledger.db"


def filled(path, *written):
    ledger = Ledger.create(path, lambda: NOVEMBER)
    for entry in written:
        ledger.write(entry)
    return ledger


def tamper(path, *statements):
    """What someone with a database tool can do, the triggers put aside."""
    connection = sqlite3.connect(path)
    connection.execute("DROP TRIGGER no_UPDATE")
    connection.execute("DROP TRIGGER no_DELETE")
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


@tried(20)
@given(st.lists(entries, max_size=4))
def test_what_is_written_is_read_back_newest_first_and_verifies(tmp_path_factory, written):
    ledger = filled(tmp_path_factory.mktemp("ledger") / "ledger.db", *written)
    assert [record.entry for record in ledger.newest()] == written[::-1]
    assert ledger.verify().number == len(written)
    assert ledger.totals().sent_bytes == sum(entry.num_bytes for entry in written)


def test_an_entry_tells_when_what_and_to_whom(path):
    number = filled(path).write(UPDATE)
    (record,) = Ledger(path).newest()
    assert record.number == number == 1
    assert record.time == datetime(2026, 11, 22, 12, tzinfo=UTC)
    assert record.entry == UPDATE
    assert record.hash == Ledger(path).verify().hash


def test_an_entry_is_there_before_its_bytes_are_sent_and_confirmed_after(path):
    ledger = filled(path)
    with ledger.sending(UPDATE) as number:
        (before,) = Ledger(path).newest()
        assert not before.is_confirmed
    (after,) = ledger.newest()
    assert after.number == number
    assert after.is_confirmed
    assert after.entry == UPDATE


def test_what_failed_on_the_way_counts_as_sent_and_is_not_confirmed(path):
    ledger = filled(path)
    with pytest.raises(ConnectionError), ledger.sending(UPDATE):
        raise ConnectionError("cut")
    (record,) = ledger.newest()
    assert not record.is_confirmed
    assert ledger.totals() == Totals(num_entries=1, epsilon=0.0, sent_bytes=100, fetched_bytes=0)


def test_a_second_confirmation_changes_nothing(path):
    ledger = filled(path, UPDATE)
    ledger.confirm(1)
    head = ledger.verify()
    ledger.confirm(1)
    assert ledger.verify() == head


@pytest.mark.parametrize("number", [0, 2, 3, -1])
def test_only_entries_can_be_confirmed(path, number):
    ledger = filled(path, UPDATE)
    ledger.confirm(1)  # row 2
    with pytest.raises(DataError, match=f"there is no entry {number} to confirm"):
        ledger.confirm(number)


def test_only_so_many_entries_are_listed_as_asked_for(path):
    ledger = filled(path, UPDATE, FETCH, MIXTURE)
    assert [record.entry for record in ledger.newest(2)] == [MIXTURE, FETCH]
    assert ledger.newest(0) == ledger.newest(-1) == []


def test_totals_are_kept_by_month(path):
    now = [NOVEMBER]
    ledger = Ledger.create(path, lambda: now[0])
    ledger.write(FETCH)
    ledger.write(MIXTURE)
    now[0] += 9 * DAY
    ledger.write(MIXTURE)
    assert ledger.month() == "2026-12"
    assert ledger.monthly() == {
        "2026-12": Totals(1, 0.5, 1, 0),
        "2026-11": Totals(2, 0.5, 11, 5_000_000_000),
    }
    assert list(ledger.monthly()) == ["2026-12", "2026-11"]
    assert ledger.totals(since="2026-12") == Totals(1, 0.5, 1, 0)
    assert ledger.totals() == Totals(3, 1.0, 12, 5_000_000_000)
    assert ledger.totals(since="2027-01") == Totals(0, 0.0, 0, 0)


def test_setting_the_clock_back_frees_no_budget(path):
    now = [NOVEMBER]
    ledger = Ledger.create(path, lambda: now[0])
    ledger.write(FETCH)
    now[0] -= 40 * DAY
    assert ledger.month() == "2026-10"
    assert ledger.totals(since=ledger.month()).fetched_bytes == 5_000_000_000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_bytes", -1),
        ("num_bytes", 1.5),
        ("num_bytes", 1 << 51),
        ("digest", "AB" * 32),
        ("receiver", ""),
        ("receiver", "\ud800"),
        ("kind", "gossip"),
        ("epsilon", float("nan")),
        ("epsilon", float("inf")),
        ("clip_norm", -1.0),
        ("delta", 1.0),
        ("text", "private"),
    ],
)
def test_an_entry_that_makes_no_sense_cannot_be_made(field, value):
    with pytest.raises(ValidationError):
        Entry(**{**UPDATE.model_dump(), field: value})


@pytest.mark.parametrize("change", ["UPDATE rows SET hash = ''", "DELETE FROM rows"])
def test_the_file_itself_refuses_to_forget(path, change):
    filled(path, UPDATE)
    connection = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(change)
    connection.close()


@pytest.mark.parametrize(
    ("change", "row"),
    [
        ("UPDATE rows SET content = replace(content, '100', '99') WHERE number = 1", 1),
        ("UPDATE rows SET hash = replace(hash, 'a', 'b') WHERE number = 2", 2),
        ("UPDATE rows SET confirms = NULL WHERE number = 2", 2),
        ("UPDATE rows SET confirms = 3 WHERE number = 2", 2),
        ("UPDATE rows SET number = 9 WHERE number = 4", 9),
        ("DELETE FROM rows WHERE number = 1", 2),
        ("DELETE FROM rows WHERE number = 3", 4),
        ("INSERT INTO rows SELECT 5, NULL, content, hash FROM rows WHERE number = 1", 5),
    ],
)
def test_whatever_is_changed_in_the_chain_shows(path, change, row):
    ledger = filled(path, UPDATE)
    ledger.confirm(1)
    ledger.write(FETCH)
    ledger.write(MIXTURE)
    assert ledger.verify().number == 4
    tamper(path, change)
    with pytest.raises(IntegrityError, match=rf"ledger\.db: row {row} "):
        ledger.verify()


def test_rows_cut_off_at_the_end_show_against_a_head_noted_before(path):
    ledger = filled(path, UPDATE, FETCH)
    noted = ledger.verify()
    ledger.write(MIXTURE)
    assert ledger.verify(noted).number == 3
    tamper(path, "DELETE FROM rows WHERE number >= 2")
    assert ledger.verify().number == 1
    with pytest.raises(IntegrityError, match="row 2 is missing, or not the one that was noted"):
        ledger.verify(noted)
    ledger.write(MIXTURE)
    with pytest.raises(IntegrityError, match="row 2 is missing, or not"):
        ledger.verify(noted)


def test_an_empty_ledger_has_a_head_too(path):
    head = filled(path).verify()
    assert head == Head(0, "0" * 64)
    filled(path, UPDATE)
    assert Ledger(path).verify(head).number == 1


def test_a_row_that_is_no_entry_is_told_and_not_shown(path):
    ledger = filled(path, UPDATE)
    tamper(path, 'UPDATE rows SET content = \'{"time": "2026-11-22T12:00:00Z"}\'')
    with pytest.raises(IntegrityError, match="row 1 tells of nothing that left"):
        ledger.newest()
    tamper_again = sqlite3.connect(path)
    tamper_again.execute("UPDATE rows SET content = '{'")
    tamper_again.commit()
    tamper_again.close()
    for read in (ledger.newest, ledger.totals):
        with pytest.raises(IntegrityError, match=r"ledger\.db"):
            read()


def test_a_missing_ledger_is_not_made_up(path):
    with pytest.raises(IntegrityError, match="the ledger is missing; restore it, or wipe"):
        Ledger(path)
    assert not path.parent.exists()


def test_making_a_ledger_again_keeps_what_is_in_it_and_finishes_what_was_begun(path):
    filled(path, UPDATE)
    assert Ledger.create(path).verify().number == 1
    begun = path.with_name("begun.db")
    begun.touch()
    with pytest.raises(IntegrityError, match="no ledger of version 1"):
        Ledger(begun)
    assert Ledger.create(begun).verify().number == 0


def test_only_the_owner_can_read_the_file(path):
    filled(path, UPDATE)
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_disk_is_asked_to_keep_what_was_written(path):
    with filled(path)._connection() as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_a_foreign_file_is_refused_and_left_alone(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("no database, but long enough to look like one" * 40)
    other = tmp_path / "other.db"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE photos (name TEXT)")
    connection.commit()
    connection.close()
    newer = filled(tmp_path / "newer.db").path
    connection = sqlite3.connect(newer)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    for path in (text, other, newer):
        before = path.read_bytes()
        for opening in (Ledger, Ledger.create):
            with pytest.raises(IntegrityError, match=f"{path.name}: .*no ledger"):
                opening(path)
        assert path.read_bytes() == before


def test_a_damaged_file_is_told(path):
    ledger = filled(path, *[UPDATE] * 50)
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    for use in (ledger.verify, ledger.newest, ledger.totals, lambda: ledger.write(UPDATE)):
        with pytest.raises(IntegrityError, match=r"ledger\.db: "):
            use()


def test_a_ledger_that_cannot_be_written_stops_the_sending(path, monkeypatch):
    ledger = filled(path, UPDATE)
    monkeypatch.setattr(ledger_module, "BUSY_SECONDS", 0.05)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    sent = []
    with pytest.raises(DataError, match=r"nothing is sent without it"), ledger.sending(UPDATE):
        sent.append(UPDATE)
    holder.close()
    assert sent == []
    assert ledger.verify().number == 1


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        Ledger.create(tmp_path / "file" / "ledger.db")


def test_threads_share_a_ledger(path):
    ledger = filled(path)
    with ThreadPoolExecutor(4) as pool:
        numbers = list(pool.map(lambda _: ledger.write(UPDATE), range(20)))
    assert sorted(numbers) == list(range(1, 21))
    assert ledger.verify().number == 20


def writer(path, name, count):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), name, str(count)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_that_make_and_write_one_ledger_at_once_lose_nothing(path):
    processes = [writer(path, name, 8) for name in ("a", "b", "c")]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    numbers = sorted(int(line) for output in outputs for line in output.split())
    assert numbers == list(range(1, 25))
    ledger = Ledger(path)
    assert ledger.verify().number == 24
    for name in ("a", "b", "c"):
        rounds = [r.entry.round for r in ledger.newest() if r.entry.receiver == name]
        assert rounds == list(range(8))[::-1]


def test_a_killed_process_leaves_every_entry_that_it_was_told_is_written(path):
    with writer(path, "a", 100_000) as process:
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(5)]
        process.send_signal(signal.SIGKILL)
        told += process.stdout.readlines()
    numbers = [int(line) for line in told if line.endswith("\n")]
    ledger = Ledger(path)
    head = ledger.verify()
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) <= head.number <= len(numbers) + 1
    assert ledger.write(UPDATE) == head.number + 1
    assert ledger.verify(head).number == head.number + 1
