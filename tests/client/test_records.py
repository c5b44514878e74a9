"""Keys of peers are pinned for good, and what was consented to is never forgotten."""

import sqlite3

import pytest

from proxymoe.client.records import Records
from proxymoe.common.contribution import Record
from proxymoe.common.directory import signer
from proxymoe.common.errors import DataError, ProtocolError
from proxymoe.common.identity import key_digest, new_device_key, public_key
from proxymoe.common.secagg import Phase

KEYS = {name: new_device_key() for name in "abc"}
PUBLIC = {name: public_key(key).decode() for name, key in KEYS.items()}


@pytest.fixture
def records(tmp_path):
    return Records(tmp_path / "sums.db", clock=lambda: 7.0)


def test_peers_are_known_by_the_keys_that_were_seen_first(records, tmp_path):
    assert records.peers() == {}
    directory = records.pinned({"a": PUBLIC["a"], "b": PUBLIC["b"]})
    directory.check("a", b"word", signer(KEYS["a"])(b"word"))
    with pytest.raises(ProtocolError, match="not its own"):
        directory.check("b", b"word", signer(KEYS["a"])(b"word"))
    again = Records(tmp_path / "sums.db")
    again.pinned(PUBLIC)
    assert again.peers() == {name: key_digest(key.encode()) for name, key in PUBLIC.items()}


def test_another_key_for_a_known_name_is_refused_and_nothing_is_pinned(records):
    records.pinned({"a": PUBLIC["a"]})
    with pytest.raises(ProtocolError, match=r"pinned was \w+; .* under a new name"):
        records.pinned({"c": PUBLIC["c"], "a": PUBLIC["b"]})
    assert list(records.peers()) == ["a"]


def test_what_is_no_key_is_refused(records):
    with pytest.raises(ProtocolError):
        records.pinned({"a": PUBLIC["a"], "b": "no key"})
    assert records.peers() == {}


def test_records_come_back_as_they_were_kept(records, tmp_path):
    kept = [
        Record("run", 3, 0, Phase.CONSENT, "ab" * 32, "cd" * 32),
        Record("run", 3, 0, Phase.RELEASE, "ab" * 32, "cd" * 32),
    ]
    assert records.all() == []
    for record in kept:
        records.keep(record)
    assert Records(tmp_path / "sums.db").all() == kept
    assert (tmp_path / "sums.db").stat().st_mode & 0o777 == 0o600


def test_a_file_that_cannot_be_used_is_named(tmp_path):
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(b"no database" * 100)
    for path in (damaged, tmp_path / "missing" / "sums.db"):
        with pytest.raises(DataError, match=f"{path}: cannot be used now"):
            Records(path).all()


def test_an_unknown_phase_is_damage(records, tmp_path):
    records.keep(Record("run", 3, 0, Phase.CONSENT, "ab" * 32, "cd" * 32))
    with sqlite3.connect(tmp_path / "sums.db") as database:
        database.execute("UPDATE records SET phase = 'dreaming'")
    with pytest.raises(DataError, match=r"sums\.db: damaged"):
        records.all()
