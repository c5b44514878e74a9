"""The fault matrix sees what is wrong: its law is broken by every way to cheat it."""

import io
import json

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from proxymoe.server.aggregate import PlainSum
from proxymoe.server.engine import RoundEngine, Rules
from proxymoe.server.store import RoundStore
from proxymoe.simulations.faults import cli
from proxymoe.simulations.faults.children import Child, steps_of
from proxymoe.simulations.faults.cohort import InMemory, honest
from proxymoe.simulations.faults.device import keep_book
from proxymoe.simulations.faults.law import Law
from proxymoe.simulations.faults.matrix import SCENARIOS
from proxymoe.simulations.faults.messages import Fault, instead, strike
from proxymoe.simulations.faults.report import (
    Ground,
    Scenario,
    report_of,
    selected,
    suffer,
    table_of,
)
from proxymoe.simulations.faults.rounds import coordinate, federation_of, undisturbed
from proxymoe.simulations.faults.sealed import SealingDevices


@pytest.fixture
def ground(tmp_path):
    (tmp_path / "ground").mkdir()
    return Ground(tmp_path / "ground", np.random.default_rng(0))


@pytest.fixture
def folder(tmp_path):
    coordinate(lambda _: None, tmp_path / "run")
    return tmp_path / "run"


def store_of(folder):
    federation = federation_of()
    return RoundStore(folder, federation.run, federation.layout.size)


def test_an_undisturbed_run_breaks_no_law(folder, tmp_path):
    law = Law(federation_of(), folder)
    assert law.broken() == ""
    assert law.unfinished(undisturbed(tmp_path / "again")) == ""


def test_an_update_that_counts_twice_is_seen(tmp_path):
    class Twice(PlainSum):
        def add(self, device, layout, update, weight):
            super().add(device, layout, update, 2.0 if device == "a" else weight)

    federation = federation_of()
    engine = RoundEngine(
        federation,
        store_of(tmp_path),
        InMemory(),
        lambda _: Twice(federation.layout),
        Rules(quorum=1.0),
    )
    engine.run()
    assert "version 1 is not the mean of the updates" in Law(federation, tmp_path).broken()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("UPDATE audit SET body = '{}' WHERE seq = 3", "the audit log was changed at entry 3"),
        ("DELETE FROM versions WHERE version = 4", "version 4 was committed, and is lost"),
        ("DELETE FROM updates WHERE number = 2", "round 2: updates differ"),
        ("UPDATE rounds SET phase = 'training' WHERE number = 4", "not at the end of round 4"),
    ],
)
def test_a_database_that_forgot_something_is_seen(folder, change, told):
    law = Law(federation_of(), folder)
    assert law.unfinished() == ""
    store = store_of(folder)
    store.database.execute(change)
    store.close()
    assert told in law.unfinished()


def test_other_bits_are_seen(folder, tmp_path):
    expected = undisturbed(tmp_path / "again")
    store = store_of(folder)
    store.roll_back(1, 0.0)
    store.close()
    assert "other bits" in Law(federation_of(), folder).unfinished(expected)


def test_a_fault_strikes_in_every_round_and_a_wrong_receipt_is_seen(ground):
    assert list(strike([Fault(lambda _: [])], ground)) == [""] * 4
    hoped = Fault(lambda sight: [(sight.name, b"", "accepted")])  # type: ignore[list-item]
    assert all("receipts" in complaint for complaint in strike([hoped], ground))


def test_envelopes_are_struck_too(ground):
    in_the_clear = instead(lambda sight: honest(sight.task))
    assert list(strike([in_the_clear], ground, SealingDevices)) == [""] * 4
    assert all("receipts" in complaint for complaint in strike([in_the_clear], ground))


def scenario(*verdicts, error=None):
    def inject(_):
        yield from verdicts
        if error:
            raise error

    return Scenario("level", "fault", "checked", inject)


@pytest.mark.parametrize(
    ("broken", "sound", "counts"),
    [
        (scenario("", ""), True, (2, 2)),
        (scenario("", "lost"), False, (2, 1)),
        (scenario(), False, (0, 0)),
        (scenario("", error=ValueError("odd")), False, (1, 1)),
    ],
    ids=["sound", "complaint", "nothing injected", "error"],
)
def test_only_a_scenario_without_complaint_is_sound(broken, sound, counts):
    outcome = suffer(broken, 0, lambda _: None)
    assert outcome.is_sound is sound
    assert (outcome.injected, outcome.survived) == counts
    report = report_of([outcome], 3)
    assert json.loads(json.dumps(report))["sound"] is sound
    screen = io.StringIO()
    Console(file=screen, width=120).print(table_of([outcome]))
    assert f"{counts[1]}" in screen.getvalue()


def test_a_part_of_a_name_selects():
    assert selected(SCENARIOS, None) == list(SCENARIOS)
    assert {s.level for s in selected(SCENARIOS, "Disk Full")} == {"transfer"}
    assert selected(SCENARIOS, "flood") == []


@pytest.mark.slow
def test_a_tripwire_kills_at_every_step(tmp_path):
    (tmp_path / "0").mkdir()
    steps = steps_of(keep_book, tmp_path / "0")
    for step in (1, steps // 2, steps, steps + 1):
        (tmp_path / f"{step}").mkdir(exist_ok=True)
        child = Child(keep_book, tmp_path / f"{step}", deadly=step)
        assert child.was_killed() is (step <= steps)


@pytest.mark.slow
def test_the_command_writes_a_report(tmp_path):
    path = tmp_path / "report.json"
    result = CliRunner().invoke(cli.app, ["--only", "ledger's clock", "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert json.loads(path.read_bytes())["sound"]
    result = CliRunner().invoke(cli.app, ["--only", "flood"])
    assert result.exit_code == 1
    assert "--only 'flood' matches no fault" in result.output
