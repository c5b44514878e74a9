"""What a run directory tells, whatever runs, and whatever is damaged."""

import contextlib
import sqlite3
import time

import pytest

from proxymoe.common.errors import CheckpointError, ConfigError
from proxymoe.common.files import write_json
from proxymoe.server.devices import Devices
from proxymoe.server.lock import held
from proxymoe.server.run_directory import RunDirectory
from proxymoe.server.status import (
    OVER,
    Engine,
    RoundEntry,
    engine,
    engine_file,
    engine_lock,
    rounds,
    serve_lock,
    status,
)
from proxymoe.server.store import Phase
from tests.runs import run_directory

SIZE = 6


@pytest.fixture
def run(tmp_path):
    return run_directory(tmp_path / "d")


@pytest.fixture
def store(run):
    store = run.store(SIZE)
    yield store
    store.close()


def test_a_new_run_directory_tells_that_nothing_has_happened(run):
    found = status(run)
    assert (found.serving, found.finished, found.round, found.version) == (False, False, None, 0)
    assert (found.engine, found.children, found.devices) == (None, (), {})
    assert found.rounds_wanted == 3
    assert 0 < found.run_bytes < 1 << 20 < found.free_bytes


def test_reading_makes_no_files(run):
    before = sorted(run.path.rglob("*"))
    status(run)
    assert sorted(run.path.rglob("*")) == before


def test_the_ends_of_a_round_are_those_of_the_store():
    assert set(OVER) == {phase for phase in Phase if phase.over}


def test_rounds_are_told_as_they_stand(run, store):
    store.begin(1, time.time())
    store.enter(1, Phase.SELECTING, time.time())
    store.enter(1, Phase.TRAINING, time.time(), cohort=["b", "a"])
    store.keep_update(1, "a", b"update", "0" * 64, time.time())
    found = rounds(run)
    assert found.rounds == (RoundEntry(1, "training", 0, ("b", "a"), 1, None, None, None),)
    assert (found.current, found.versions, found.size) == (0, (), SIZE)


def test_rounds_are_finished_when_the_last_one_is_over(run, store):
    for number in (1, 2):
        assert not rounds(run).finished(2)
        store.begin(number, time.time())
        assert not rounds(run).finished(2)
        store.enter(number, Phase.ABANDONED, time.time(), reason="too few updates")
    found = rounds(run)
    assert found.finished(2)
    assert not found.finished(3)
    assert found.rounds[-1].reason == "too few updates"


def test_devices_are_counted_by_standing(run):
    devices = Devices(run.devices_db)
    devices.invite("phone", "0" * 64, time.time() + 60)
    devices.close()
    assert status(run).devices == {"invited": 1}


def test_the_process_of_the_rounds_lives_as_long_as_it_holds_its_lock(run):
    assert engine(run) is None
    write_json(engine_file(run), {"pid": 7, "run": 2**64 - 1, "state": "running"})
    with held(engine_lock(run), "taken"):
        assert engine(run) == Engine(7, 2**64 - 1, "running", alive=True)
    assert engine(run) == Engine(7, 2**64 - 1, "running", alive=False)


def test_children_are_told_only_while_somebody_serves(run):
    write_json(run.log / "children.json", {"gateway": {"pid": 9, "ready": True, "failures": 2}})
    assert status(run).children == ()
    with held(serve_lock(run), "taken"):
        (child,) = status(run).children
    assert (child.name, child.pid, child.ready, child.failures) == ("gateway", 9, True, 2)


@pytest.mark.parametrize("name", ["state.db", "devices.db"])
def test_a_damaged_database_is_named(run, store, name):
    Devices(run.devices_db).close()
    store.close()
    for leftover in run.path.glob(f"{name}-*"):
        leftover.unlink()
    (run.path / name).write_bytes(b"not a database, but long enough to be taken for one" * 100)
    with pytest.raises(CheckpointError, match=rf"{name}.*backup"):
        status(run)


def test_what_is_no_run_directory_is_said_to_be_none(tmp_path):
    with pytest.raises(ConfigError, match="init"):
        status(RunDirectory(tmp_path))


def test_a_database_that_is_being_made_has_no_rounds_yet(run):
    path = run.path / "state.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        assert rounds(run).rounds == ()
    # With some of its tables it is damaged: they appear together.
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE rounds (number INTEGER)")
    with pytest.raises(CheckpointError, match="restore the run directory"):
        rounds(run)
