"""Flower's programs: how they are started, and what their answers mean; one run with the real."""

import os
import subprocess
import time
import tomllib
from pathlib import Path

import pytest

from proxymoe.common import identity
from proxymoe.common.supervise import listening
from proxymoe.server import flower
from proxymoe.server.flower import SuperLink, SuperLinkError
from tests.runs import run_directory
from tests.waiting import until


@pytest.fixture
def run(tmp_path):
    return run_directory(tmp_path / "a coordinator")


def pairs(command):
    """{flag: what follows it} of a command line."""
    return dict(zip(command, [*command[1:], None], strict=True))


def test_the_superlink_listens_on_loopback_with_tls_state_and_authentication(run):
    command = flower.superlink_command(run)
    said = pairs(command)
    assert (said["--host"], said["--port"]) == (
        "127.0.0.1",
        str(run.settings.network.superlink_port),
    )
    assert said["--isolation"] == "process"
    assert said["--database"] == str(run.flower / "superlink.db")
    assert said["--ssl-certfile"] == str(run.server_certificate)
    assert said["--superexec-auth-secret-file"] == str(run.superexec_secret)
    assert {"--enable-supernode-auth", "--disable-runtime-dependency-installation"} < set(command)
    assert "--insecure" not in command


def test_the_superexec_trusts_our_authority_only(run):
    command = flower.superexec_command(run)
    said = pairs(command)
    assert said["--runtime-api-address"] == flower.superlink_address(run)
    assert said["--root-certificates"] == str(run.ca_certificate)
    assert "--allow-runtime-dependency-installation" not in command


def test_nothing_calls_home_or_installs_anything(run):
    added = flower.environment(run, {"NO_PROXY": "intern", "PATH": "/bin"})
    assert added["FLWR_TELEMETRY_ENABLED"] == "0"
    assert added["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert added["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert added["FLWR_HOME"] == str(run.flower)
    assert added["NO_PROXY"] == added["no_proxy"] == "intern,127.0.0.1"


def test_the_programs_that_the_superexec_starts_are_ours(run):
    first, *rest = flower.environment(run, {"PATH": "/bin"})["PATH"].split(os.pathsep)
    assert (flower.SCRIPTS / "flwr-serverapp").exists()
    assert (first, rest) == (str(flower.SCRIPTS), ["/bin"])


def test_the_connection_names_address_and_authority_whatever_the_path_looks_like(tmp_path):
    run = run_directory(tmp_path / 'a "quoted" path')
    flower.write_connection(run)
    said = tomllib.loads((run.flower / "config.toml").read_text())["superlink"]
    assert said["default"] == flower.CONNECTION
    assert said[flower.CONNECTION] == {
        "address": flower.superlink_address(run),
        "root-certificates": str(run.ca_certificate),
    }


def test_the_bundle_carries_no_code():
    (only,) = [path for path in flower.BUNDLE.rglob("*") if path.is_file()]
    assert only.name == "pyproject.toml"
    said = tomllib.loads(only.read_text())
    components = said["tool"]["flwr"]["app"]["components"]
    assert components["serverapp"] == "proxymoe.server.serverapp:app"
    assert "dependencies" not in said["project"]


@pytest.fixture
def says(run, monkeypatch):
    """`says(text)`: from now on, that is what Flower's command answers; returns what was asked."""

    def answer(text, seconds=None):
        asked = []

        def told(command, **_options):
            asked.append(command[3:])
            if seconds is not None:
                raise subprocess.TimeoutExpired(command, seconds)
            return subprocess.CompletedProcess(command, 0, text.encode(), b"")

        monkeypatch.setattr(subprocess, "run", told)
        return asked

    return answer


REFUSAL = '{"success": false, "error-message": "Using SuperLink: here\\n\\n[code: %d] so it is."}'
PUBLIC_KEY = identity.public_key(identity.new_device_key())


def test_a_new_key_gets_a_node_of_64_bits(run, says):
    asked = says('{"success": true, "node-id": 18446744073709551615}')
    assert SuperLink(run).register("phone", PUBLIC_KEY) == 2**64 - 1
    ((_, _, key_file, *rest),) = asked
    assert rest == [flower.CONNECTION, "--name", "phone", "--format", "json"]
    assert not Path(key_file).exists()


def test_a_key_that_is_known_already_is_fine(run, says):
    says(REFUSAL % 23)
    assert SuperLink(run).register("phone", PUBLIC_KEY) is None


def test_a_node_that_is_gone_already_is_fine(run, says):
    says(REFUSAL % 24)
    SuperLink(run).unregister(5)


def test_a_run_that_is_over_already_is_fine(run, says):
    says(REFUSAL % 18)
    SuperLink(run).stop_run(5)


def test_runs_that_are_not_finished_are_told_by_number(run, says):
    states = {3: "running", 4: "finished:stopped", 5: "pending", 6: "finished:completed"}
    runs = [f'{{"run-id": "{n}", "status": "{status}"}}' for n, status in states.items()]
    says(f'{{"success": true, "runs": [{", ".join(runs)}]}}')
    assert SuperLink(run).unfinished_runs() == [3, 5]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (REFUSAL % 99, r"\[code: 99\] so it is"),
        ("Traceback: no route", "no JSON, but 'Traceback: no route'"),
        ("[]", "no JSON"),
        ('{"success": true}', "node-id"),
    ],
)
def test_anything_else_is_told_as_it_is(run, says, said, told):
    says(said)
    with pytest.raises(SuperLinkError, match=told):
        SuperLink(run).register("phone", PUBLIC_KEY)


def test_a_command_that_hangs_is_given_up(run, says):
    says("", seconds=120)
    with pytest.raises(OSError, match="no answer within 120 s"):
        SuperLink(run).unfinished_runs()


@pytest.mark.flower
@pytest.mark.slow
def test_a_real_superlink_takes_keys_and_runs(run):
    environment = {**os.environ, **flower.environment(run, os.environ)}
    flower.write_connection(run)
    port = run.settings.network.superlink_port
    with subprocess.Popen(flower.superlink_command(run), env=environment) as process:
        try:
            until(lambda: _listens(port), seconds=120)
            superlink = SuperLink(run)
            node = superlink.register("phone", PUBLIC_KEY)
            assert node is not None
            assert superlink.register("phone", PUBLIC_KEY) is None
            number = superlink.start_run()
            assert superlink.unfinished_runs() == [number]
            superlink.stop_run(number)
            superlink.stop_run(number)
            assert superlink.unfinished_runs() == []
            superlink.unregister(node)
            superlink.unregister(node)
        finally:
            process.kill()


def _listens(port):
    try:
        return listening("127.0.0.1", port)()
    except OSError:
        time.sleep(0.2)
        return False
