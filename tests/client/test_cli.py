"""What the owner says and sees: every mistake one line and exit code 1, and no stack trace."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from proxymoe.client import cli
from proxymoe.client.entries import Entry, Kind
from proxymoe.client.home import Home
from proxymoe.common.files import digest_of
from tests.settled import NOWHERE, enrolled, settle, write_policy

runner = CliRunner()


@pytest.fixture
def home(tmp_path, qwen):
    home = enrolled(tmp_path)
    settle(home, qwen)
    return home


@pytest.fixture
def started(monkeypatch):
    """What `join` would have put in its own place."""
    found = []
    monkeypatch.setattr(cli, "start", lambda home, *, once: found.append((home.path, once)))
    return found


def say(home, *words, code=0, **options):
    """What the command prints, in one line without line breaks of its own."""
    done = runner.invoke(cli.app, [words[0], "--home", str(home.path), *words[1:]], **options)
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def send(home, num_bytes=100, number=3):
    entry = Entry(
        kind=Kind.UPDATE,
        receiver=NOWHERE,
        num_bytes=num_bytes,
        digest=digest_of(b"update"),
        run="run",
        round=number,
        fetched_bytes=7,
        clip_norm=1.0,
    )
    with home.ledger().sending(entry):
        pass


def test_join_prepares_and_becomes_the_supervisor(home, started):
    assert "proxy submodel of 1.0 MB is in place" in say(home, "join")
    say(home, "join", "--once")
    assert started == [(home.path, False), (home.path, True)]


def test_join_refuses_what_the_policy_does_not_allow(home, started):
    write_policy(home, data={"folder": home.path.parent / "data"}, training={"largest_steps": 1})
    told = say(home, "join", code=1)
    assert told.startswith("error: ")
    assert "change training.largest_steps" in told
    assert started == []


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ("[when]\nwindows = 1", "unknown key; the nearest is when.window"),
        ("", "name one as data.folder in the policy"),
    ],
)
def test_join_says_what_is_wrong_with_the_policy(home, started, policy, told):
    home.policy_file.write_text(policy)
    assert told in say(home, "join", code=1)
    assert started == []


def test_a_second_client_is_refused(home, started):
    with home.alone():
        for verb in (["join"], ["personalize"], ["wipe", "--yes"]):
            assert "a second client" in say(Home(home.path), *verb, code=1)
    assert started == []
    assert home.ledger_file.exists()


@pytest.mark.parametrize("verb", [["join"], ["personalize"], ["status"]])
def test_a_device_that_is_not_enrolled_is_told_so(tmp_path, verb):
    assert "enrol first" in say(Home(tmp_path / "none"), *verb, code=1)
    assert not (tmp_path / "none").exists()


def test_a_domain_and_a_mixture_are_one_too_many(home):
    assert "choose one" in say(home, "join", "--domain", "a", "--mixture", code=1)


def test_a_damaged_token_is_refused_from_the_command_line_and_from_stdin(tmp_path):
    home = Home(tmp_path / "new")
    for words, options in ((["abc!"], {}), (["-"], {"input": "abc!\n"})):
        assert "enrolment token: damaged" in say(home, "enrol", *words, code=1, **options)
    assert not home.path.exists()


def test_personalize_trains_keeps_and_exports(home, tmp_path):
    told = say(home, "personalize", "--steps", "20", "--export", str(tmp_path / "peft"))
    assert "Tuned on 22 examples, starting from nothing." in told
    assert "Loss on 2 held-out examples:" in told
    assert home.personal_adapter.exists()
    assert (tmp_path / "peft" / "adapter_model.safetensors").exists()


def test_a_personal_adapter_that_diverges_is_refused(home):
    told = say(home, "personalize", "--steps", "30", "--learning-rate", "1e5", code=1)
    assert told.startswith("error: ")
    assert not home.personal_adapter.exists()


def test_status_shows_every_gate_with_value_and_limit_and_what_is_used(home):
    send(home, num_bytes=5 * 10**6)
    home.refusals.write_text('{"time": "2026-11-22T10:00:00Z", "word": "policy", "reason": "no"}\n')
    found = json.loads(say(home, "status", "--json"))
    names = [gate["name"] for gate in found["gates"]]
    assert names == ["memory", "disk", "load", "battery", "charging", "network", "time"]
    assert all(gate["value"] and gate["limit"] for gate in found["gates"])
    assert found["used"]["resources.network_mb_per_month"] == {"used": 5.000007, "limit": 2000}
    assert (found["device"], found["is_fetched"]) == ("phone", True)
    assert found["assignment"]["plan"] == home.assignment().plan
    assert found["processes"] == {}
    assert found["refusals"][0]["word"] == "policy"
    shown = say(home, "status")
    for word in (*names, "phone", "in place", "No client is at work", "2026-11-22T10:00:00Z"):
        assert word in shown


def test_a_process_that_ended_is_not_shown_as_running(home):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    child = {"pid": ended.pid, "ready": True, "failures": 0}
    (home.log / "children.json").write_text(json.dumps({"node": child}))
    assert json.loads(say(home, "status", "--json"))["processes"] == {}


def test_sent_lists_the_newest_first_with_totals_and_checks_the_chain(home):
    for number in (1, 2, 3):
        send(home, number=number)
    found = json.loads(say(home, "sent", "--limit", "2", "--verify", "--json"))
    assert [entry["round"] for entry in found["entries"]] == [3, 2]
    assert [totals["sent_bytes"] for totals in found["months"].values()] == [300]
    assert found["head"]["number"] == 6
    shown = say(home, "sent", "--verify")
    assert "update" in shown
    assert f"its head is {found['head']['hash']}" in shown.replace("\n", " ")


def test_a_ledger_that_was_changed_is_reported(home):
    send(home)
    content = home.ledger_file.read_bytes()
    wal = home.ledger_file.with_name("ledger.db-wal")
    for path in (home.ledger_file, wal):
        if path.exists():
            path.write_bytes(path.read_bytes().replace(b'"num_bytes":100', b'"num_bytes":101'))
    assert home.ledger_file.read_bytes() != content or not wal.exists()
    assert "tampered" in say(home, "sent", "--verify", code=1)


def test_wipe_asks_removes_everything_and_says_what_stays_sent(home):
    send(home, num_bytes=2 * 10**6)
    say(home, "wipe", code=1, input="n\n")
    assert home.ledger_file.exists()
    told = say(home, "wipe", input="y\n")
    assert not home.path.exists()
    assert "What was sent stays sent: 1 messages, 2.0 MB" in told
    assert "not the home of a device" in say(home, "wipe", "--yes", code=1)


def test_the_command_line_is_there_and_quick_to_answer(home):
    code = "import sys; from proxymoe.client import cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
