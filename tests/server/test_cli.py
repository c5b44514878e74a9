"""The command line: what it makes and tells, and that a mistake is one line and exit code 1."""

import json
import re
import time

import pytest
from typer.testing import CliRunner

from proxymoe.common.experiment import load_experiment
from proxymoe.common.keys_at_rest import PASSPHRASE_FILE, read_key, write_key
from proxymoe.common.tickets import is_secret, parse_token
from proxymoe.server.cli import app
from proxymoe.server.devices import Devices
from proxymoe.server.lock import held
from proxymoe.server.run_directory import RunDirectory
from proxymoe.server.status import serve_lock
from proxymoe.simulations.cli import EXPERIMENTS
from proxymoe.simulations.site import asset
from tests.runs import run_directory


@pytest.fixture
def call():
    """Calls the command line; gives exit code, and output with its line ends as spaces."""

    def invoke(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result.exit_code, " ".join(result.output.split())

    return invoke


@pytest.fixture
def run(tmp_path):
    return run_directory(tmp_path / "d")


GIVEN = ("--base-model", asset("tiny-moe"), "--calibration", asset("calibration"))


def test_init_makes_a_run_directory_for_these_folders(call, tmp_path):
    code, said = call(
        "init", tmp_path / "d", *GIVEN, "--name", "acme", "--host-name", "moe.acme.eu"
    )
    assert code == 0, said
    settings = RunDirectory(tmp_path / "d").settings
    assert (settings.run, settings.base_model) == ("acme", asset("tiny-moe"))
    assert settings.network.names == ("moe.acme.eu", "localhost", "127.0.0.1")
    assert settings.network.gateway_address == "moe.acme.eu:9443"


def test_init_takes_over_what_an_experiment_shares_with_a_coordinator(call, tmp_path):
    path = EXPERIMENTS / "default.toml"
    assert call("init", tmp_path / "d", *GIVEN, "--config", path)[0] == 0
    experiment, settings = load_experiment(path), RunDirectory(tmp_path / "d").settings
    assert settings.run == "default"
    for shared in ("seed", "calibration_tokens", "extract", "adapter", "train", "privacy"):
        assert getattr(settings, shared) == getattr(experiment, shared)
    every_round = {"canary_every": 1}
    assert settings.federation == experiment.federation.model_copy(update=every_round)
    assert settings.public_domains == experiment.evaluate.public_domains


def test_init_takes_a_coordinators_file_with_paths_from_where_it_lies(call, tmp_path):
    (tmp_path / "model").symlink_to(asset("tiny-moe"))
    (tmp_path / "c.toml").write_text(
        f'run = "two"\nbase_model = "model"\ncalibration = "{asset("calibration")}"\n'
    )
    assert call("init", tmp_path / "d", "--config", tmp_path / "c.toml")[0] == 0
    assert RunDirectory(tmp_path / "d").settings.base_model == tmp_path / "model"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "which base_model? Give --base-model"),
        (("--base-model", "/nowhere", *GIVEN[2:]), "/nowhere: no config.json"),
        ((*GIVEN[:2], "--calibration", "/nowhere"), "public_domains ['code', 'math']: no such"),
        ((*GIVEN, "--name", "a b"), "run: "),
        ((*GIVEN, "--host-name", "a b"), "neither a host name nor an address"),
        ((*GIVEN, "--config", "/nowhere.toml"), "/nowhere.toml: cannot be read"),
    ],
)
def test_init_refuses_what_cannot_be(call, tmp_path, options, told):
    code, said = call("init", tmp_path / "d", *options)
    assert code == 1
    assert said.startswith("error: ")
    assert told in said
    assert not (tmp_path / "d").exists()


def test_init_refuses_unknown_settings(call, tmp_path):
    (tmp_path / "c.toml").write_text("rouns = 3\n")
    code, said = call("init", tmp_path / "d", *GIVEN, "--config", tmp_path / "c.toml")
    assert code == 1
    assert "rouns" in said


def test_init_leaves_a_folder_with_something_in_it_alone(call, run):
    before = sorted(run.path.rglob("*"))
    code, said = call("init", run.path, *GIVEN)
    assert (code, "not an empty folder" in said) == (1, True)
    assert sorted(run.path.rglob("*")) == before


def test_enrol_prints_a_token_and_keeps_only_the_digest_of_its_secret(call, run):
    code, said = call("enrol", run.path, "phone", "--hours", "2")
    assert code == 0
    token = parse_token(said, time.time())
    assert (token.device, token.coordinator) == ("phone", run.settings.network.gateway_address)
    assert token.expires == pytest.approx(time.time() + 7200, abs=60)
    invitation = Devices(run.devices_db).invitation("phone")
    assert invitation is not None
    assert is_secret(token.secret, invitation.secret_digest)
    assert token.secret.encode() not in run.devices_db.read_bytes()


def test_enrol_refuses_a_name_that_cannot_be(call, run):
    code, said = call("enrol", run.path, "my phone")
    assert (code, "device name 'my phone'" in said) == (1, True)


def test_devices_lists_who_was_invited(call, run):
    call("enrol", run.path, "phone")
    code, said = call("devices", run.path)
    assert (code, "phone" in said, "invited" in said) == (0, True, True)
    ((entry),) = json.loads(call("devices", run.path, "--json")[1])
    assert (entry["name"], entry["standing"]) == ("phone", "unknown")


def test_what_devices_can_train_together_is_told_when_there_are_any(call, run, monkeypatch):
    from proxymoe.server import planner

    class Unprepared(planner.Planner):
        def __init__(self, run):
            self.run = run

        def coverage(self):
            assert self.run.settings.run == run.settings.run
            return "of 9 blocks, 2 in no submodel"

    monkeypatch.setattr(planner, "Planner", Unprepared)
    assert "of 9 blocks, 2 in no submodel" in call("devices", run.path, "--together")[1]


def test_revoke_works_without_a_service_and_once(call, run):
    call("enrol", run.path, "phone")
    assert call("revoke", run.path, "phone")[0] == 0
    code, said = call("revoke", run.path, "phone")
    assert (code, "no such device" in said) == (1, True)


def test_status_works_when_the_service_is_down(call, run):
    code, said = call("status", run.path)
    assert (code, "down" in said) == (0, True)
    assert json.loads(call("status", run.path, "--json")[1])["serving"] is False


def test_status_says_when_somebody_serves(call, run):
    with held(serve_lock(run), "taken"):
        assert json.loads(call("status", run.path, "--json")[1])["serving"] is True


def test_runs_works_before_the_first_round(call, run):
    assert call("runs", run.path)[0] == 0
    assert json.loads(call("runs", run.path, "--json")[1])["rounds"] == []


def test_a_second_serve_is_refused(call, run):
    with held(serve_lock(run), "taken"):
        code, said = call("serve", run.path)
    assert (code, "another `serve`" in said) == (1, True)


def test_serve_refuses_keys_that_others_may_read(call, run):
    run.signing_key_file.chmod(0o644)
    code, said = call("serve", run.path)
    assert (code, "chmod 600" in said) == (1, True)


@pytest.mark.parametrize("verb", ["merge", "export"])
def test_there_is_nothing_to_bring_home_before_the_first_round(call, run, tmp_path, verb):
    code, said = call(verb, run.path, tmp_path / "out")
    assert (code, "no round has begun" in said) == (1, True)
    assert not (tmp_path / "out").exists()


def test_rollback_needs_a_version_that_there_is(call, run):
    run.store(6).close()
    code, said = call("rollback", run.path, "3")
    assert (code, "no version 3; there are [0]" in said) == (1, True)


VERBS = (
    ("profile",),
    ("serve",),
    ("enrol", "phone"),
    ("devices",),
    ("revoke", "phone"),
    ("runs",),
    ("status",),
    ("rollback", "1"),
    ("merge", "out"),
    ("export", "out"),
)


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
def test_what_is_no_run_directory_is_refused_and_left_as_it_is(call, tmp_path, verb):
    name, *rest = verb
    code, said = call(name, tmp_path, *rest)
    assert code == 1
    assert re.match(r"error: .*coordinator\.toml.*init", said)
    assert not list(tmp_path.iterdir())


def passphrase_file(tmp_path, words):
    path = tmp_path / f"{words}.txt"
    path.write_text(words + "\n")
    return path


def test_keys_are_sealed_rotated_and_opened_again(call, run, tmp_path, monkeypatch):
    authority, signing = run.authority, run.signing_key
    first, second = (passphrase_file(tmp_path, words) for words in ("one", "two"))
    code, said = call("seal", run.path, "--new", first)
    assert (code, "are sealed" in said) == (0, True)
    for path in (run.ca_key, run.signing_key_file):
        assert b"PRIVATE KEY" not in path.read_bytes()
        assert path.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv(PASSPHRASE_FILE, str(first))
    assert (RunDirectory(run.path).authority, RunDirectory(run.path).signing_key) == (
        authority,
        signing,
    )
    assert call("seal", run.path, "--new", second)[0] == 0
    code, said = call("seal", run.path, "--remove")
    assert (code, "wrong passphrase" in said) == (1, True)
    monkeypatch.setenv(PASSPHRASE_FILE, str(second))
    assert call("seal", run.path, "--remove")[0] == 0
    monkeypatch.delenv(PASSPHRASE_FILE)
    assert RunDirectory(run.path).signing_key == signing


def test_a_sealing_that_was_cut_short_is_done_again(call, run, tmp_path):
    signing, new = run.signing_key, passphrase_file(tmp_path, "one")
    write_key(run.ca_key, run.authority.key, "one")
    assert call("seal", run.path, "--new", new)[0] == 0
    assert read_key(run.signing_key_file, "one") == signing


def test_serve_asks_for_the_passphrase_at_once(call, run, tmp_path, monkeypatch):
    assert call("seal", run.path, "--new", passphrase_file(tmp_path, "one"))[0] == 0
    code, said = call("serve", run.path)
    assert (code, f"in a file that {PASSPHRASE_FILE} names" in said) == (1, True)
    monkeypatch.setenv(PASSPHRASE_FILE, str(tmp_path / "nowhere"))
    code, said = call("serve", run.path)
    assert (code, "cannot be read" in said) == (1, True)
    # Inviting takes the certificate only.
    monkeypatch.delenv(PASSPHRASE_FILE)
    assert call("enrol", run.path, "phone")[0] == 0


def test_init_seals_at_once_where_there_is_a_passphrase(call, tmp_path, monkeypatch):
    monkeypatch.setenv(PASSPHRASE_FILE, str(passphrase_file(tmp_path, "one")))
    assert call("init", tmp_path / "d", *GIVEN)[0] == 0
    made = RunDirectory(tmp_path / "d")
    assert b"PRIVATE KEY" not in made.ca_key.read_bytes() + made.signing_key_file.read_bytes()
    assert made.signing_key.startswith(b"-----BEGIN")


def test_an_empty_passphrase_is_refused(call, run, tmp_path):
    code, said = call("seal", run.path, "--new", passphrase_file(tmp_path, ""))
    assert (code, "an empty passphrase" in said) == (1, True)
    assert run.signing_key.startswith(b"-----BEGIN")
