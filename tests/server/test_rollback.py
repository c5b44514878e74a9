"""Versions for an operator: read one, or go back to one while a round is on."""

import time

import pytest
import torch

from proxymoe.common.errors import ConfigError
from proxymoe.server.rollback import adapter_of, roll_back
from proxymoe.server.run_directory import RunDirectory
from proxymoe.server.store import Phase
from proxymoe.simulations.faults.cohort import InMemory, small_federation
from tests.runs import run_directory
from tests.server.test_engine import engine_of

NOW = time.time()
FEDERATION = small_federation(rounds=3)
SIZE = FEDERATION.layout.size


@pytest.fixture
def run(tmp_path):
    return run_directory(tmp_path / "d", run=FEDERATION.run)


@pytest.fixture
def trained(run):
    """A run directory after two committed rounds."""
    engine_of(run.path, small_federation(rounds=2)).run()
    return run


def test_the_current_version_is_what_is_read(trained):
    store = trained.store(SIZE)
    number, vector = adapter_of(trained, None)
    assert number == 2
    assert torch.equal(vector, store.version_state(2).adapter)
    store.close()


def test_any_version_can_be_read(trained):
    assert adapter_of(trained, 1)[0] == 1
    number, vector = adapter_of(trained, 0)
    assert number == 0
    assert not vector.any()


def test_the_next_round_starts_from_the_version_that_was_gone_back_to(trained):
    roll_back(trained, 1, NOW)
    assert adapter_of(trained, None)[0] == 1
    engine_of(trained.path, FEDERATION).run()
    store = trained.store(SIZE)
    assert [(v.version, v.parent) for v in store.versions()] == [(1, 0), (2, 1), (3, 1)]
    store.close()


@pytest.mark.parametrize("phase", [Phase.SELECTING, Phase.TRAINING, Phase.COLLECTING])
def test_a_round_that_is_on_comes_to_nothing(trained, phase):
    def passed(now):
        if (now.number, now.phase) == (3, phase):
            roll_back(trained, 1, NOW)

    engine_of(trained.path, FEDERATION, InMemory(), passed=passed).run()
    store = trained.store(SIZE)
    last = store.latest()
    assert (last.number, last.phase, store.current()) == (3, Phase.ROLLED_BACK, 1)
    assert last.reason == "built on version 2, and version 1 is current since"
    assert [v.version for v in store.versions()] == [1, 2]
    store.close()


@pytest.mark.parametrize("phase", [Phase.AGGREGATED, Phase.EVALUATED])
def test_a_round_that_is_being_concluded_is_waited_for(trained, phase):
    refused = []

    def passed(now):
        if (now.number, now.phase) == (3, phase):
            with pytest.raises(ConfigError, match="round 3 is being concluded; try again"):
                roll_back(trained, 1, NOW)
            refused.append(now)

    engine_of(trained.path, FEDERATION, InMemory(), passed=passed).run()
    assert len(refused) == 1
    assert adapter_of(trained, None)[0] == 3


def test_an_unknown_version_is_refused_with_those_there_are(trained):
    with pytest.raises(ConfigError, match=r"no version 7; there are \[0, 1, 2\]"):
        roll_back(trained, 7, NOW)
    with pytest.raises(ConfigError, match="no version 7"):
        adapter_of(trained, 7)


def test_before_any_round_there_is_no_version(run):
    with pytest.raises(ConfigError, match="no round has begun"):
        adapter_of(RunDirectory(run.path), None)
    assert not (run.path / "state.db").exists()
