"""Four rounds equal two, a stop, and two more; whatever a killed run left behind."""

import numpy as np
import pytest
import torch

from proxymoe.common.checkpoint import write_tensors
from proxymoe.common.errors import CheckpointError, LayoutMismatch
from proxymoe.server.aggregate import PlainSum
from proxymoe.server.journal import KEPT_STATES, Journal, initial_state
from proxymoe.server.round import run_round
from proxymoe.simulations.faults.cohort import InMemory, honest, small_federation

SIZE = small_federation().layout.size
SETTINGS = [
    {"strategy": "fedavg", "momentum": 0.0},
    {"strategy": "fedavg", "momentum": 0.9},
    {"strategy": "fedadam", "momentum": 0.9},
    {"strategy": "fedavg", "cohort_size": 2},
]


def rounds(journal, count, transport=None, **settings):
    """Runs `count` more rounds from what the journal knows, as a fresh process would."""
    federation = small_federation(**settings)
    for _ in range(count):
        state = journal.latest(SIZE)
        summation = PlainSum(federation.layout)
        state, report = run_round(federation, state, transport or InMemory(), summation)
        journal.write(state, [report])
    return journal.latest(SIZE)


@pytest.mark.parametrize("settings", SETTINGS)
def test_four_rounds_equal_two_a_stop_and_two_more(tmp_path, settings):
    whole = rounds(Journal(tmp_path / "whole"), 4, **settings)
    rounds(Journal(tmp_path / "parts"), 2, **settings)
    resumed = rounds(Journal(tmp_path / "parts"), 2, **settings)
    assert whole.round == resumed.round == 4
    assert torch.equal(whole.adapter, resumed.adapter)
    assert torch.equal(whole.strategy.momentum, resumed.strategy.momentum)
    assert torch.equal(whole.strategy.variance, resumed.strategy.variance)
    assert Journal(tmp_path / "whole").reports(4) == Journal(tmp_path / "parts").reports(4)


def test_rounds_differ_from_each_other(tmp_path):
    journal = Journal(tmp_path)
    adapters = [rounds(journal, 1).adapter for _ in range(4)]
    assert len({tuple(adapter.tolist()) for adapter in adapters}) == 4


def test_before_the_first_round_the_adapter_changes_nothing(tmp_path):
    state = Journal(tmp_path).latest(SIZE)
    assert state.round == 0
    assert state.adapter.eq(0).all()
    assert Journal(tmp_path).reports(0) == []


def test_a_state_survives_the_disk_bit_for_bit(tmp_path):
    state = rounds(Journal(tmp_path), 1, momentum=0.5)
    again = Journal(tmp_path).latest(SIZE)
    assert torch.equal(again.adapter, state.adapter)
    assert torch.equal(again.strategy.momentum, state.strategy.momentum)
    assert again.round == 1


def test_only_the_newest_states_are_kept_and_all_reports(tmp_path):
    rounds(Journal(tmp_path), 4)
    states = sorted(path.name for path in (tmp_path / "states").iterdir())
    assert states == [f"{number:05d}.safetensors" for number in (3, 4)]
    assert len(states) == KEPT_STATES
    assert [report["round"] for report in Journal(tmp_path).reports(4)] == [1, 2, 3, 4]


def test_half_written_files_of_a_killed_run_are_ignored(tmp_path):
    expected = rounds(Journal(tmp_path), 2)
    (tmp_path / "states" / ".00003.safetensors.4711.partial").write_bytes(b"half a state")
    (tmp_path / "rounds" / ".00003.json.4711.partial").write_bytes(b'{"round": 3')
    found = Journal(tmp_path).latest(SIZE)
    assert found.round == 2
    assert torch.equal(found.adapter, expected.adapter)
    assert rounds(Journal(tmp_path), 1).round == 3


def test_a_round_whose_state_was_never_written_is_done_again(tmp_path):
    expected = rounds(Journal(tmp_path / "whole"), 3)
    rounds(Journal(tmp_path / "killed"), 3)
    (tmp_path / "killed" / "states" / "00003.safetensors").unlink()
    assert Journal(tmp_path / "killed").latest(SIZE).round == 2
    assert torch.equal(rounds(Journal(tmp_path / "killed"), 1).adapter, expected.adapter)


def test_a_rolled_back_round_is_a_round_too(tmp_path):
    journal = Journal(tmp_path)
    before = rounds(journal, 1)
    after = rounds(journal, 1, canary=lambda _: 9.0)
    assert after.round == 2
    assert torch.equal(after.adapter, before.adapter)
    assert [report["committed"] for report in journal.reports(2)] == [True, False]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_round_with_a_canary_that_is_not_finite_can_be_written(tmp_path, loss):
    journal = Journal(tmp_path)
    assert rounds(journal, 1, canary=lambda _: loss).round == 1
    (report,) = journal.reports(1)
    assert not report["committed"]
    assert report["canary_loss"] is None


def test_reports_hold_refusals(tmp_path):
    transport = InMemory(answers={"b": lambda task: honest(task, lambda u: u * np.float32(np.nan))})
    rounds(Journal(tmp_path), 1, transport)
    (report,) = Journal(tmp_path).reports(1)
    assert list(report["refused"]) == ["b"]


def test_a_run_with_another_layout_is_refused_with_both_sizes(tmp_path):
    rounds(Journal(tmp_path), 1)
    with pytest.raises(LayoutMismatch, match=rf"adapter of {SIZE} parameters, expected 7; "):
        Journal(tmp_path).latest(7)


def test_a_damaged_state_is_named(tmp_path):
    rounds(Journal(tmp_path), 1)
    path = tmp_path / "states" / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"00001\.safetensors: truncated"):
        Journal(tmp_path).latest(SIZE)
    write_tensors(path, {"adapter": torch.zeros(SIZE)})
    with pytest.raises(CheckpointError, match=r"00001\.safetensors"):
        Journal(tmp_path).latest(SIZE)


def test_a_damaged_report_is_named(tmp_path):
    rounds(Journal(tmp_path), 2)
    (tmp_path / "rounds" / "00001.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"00001\.json: a report is unreadable"):
        Journal(tmp_path).reports(2)


def test_a_missing_report_is_noticed(tmp_path):
    rounds(Journal(tmp_path), 2)
    (tmp_path / "rounds" / "00001.json").unlink()
    with pytest.raises(CheckpointError, match="reports of rounds 1 to 2 are not whole"):
        Journal(tmp_path).reports(2)


def test_a_state_that_no_canary_has_seen_is_not_written(tmp_path):
    federation = small_federation(canary_every=3)
    summation = PlainSum(federation.layout)
    state, report = run_round(federation, initial_state(SIZE), InMemory(), summation)
    with pytest.raises(AssertionError, match="passed the canary"):
        Journal(tmp_path).write(state, [report])


def test_the_initial_state_has_no_memory():
    state = initial_state(5)
    assert state.strategy.momentum.eq(0).all()
    assert state.strategy.variance.eq(0).all()
    assert state.adapter is not state.strategy.momentum
