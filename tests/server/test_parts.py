"""The coordinator's own processes: registration, the status API, and how a part ends."""

import signal
import ssl
import subprocess
import time

import httpx
import pytest

from proxymoe.common import identity
from proxymoe.common.identity import key_digest
from proxymoe.common.supervise import listening
from proxymoe.common.tickets import new_token, secret_digest
from proxymoe.server.devices import Devices
from proxymoe.server.flower import SuperLinkError
from proxymoe.server.parts import MISCONFIGURED, command, main, registration, status_listener
from tests.doors import serving
from tests.runs import run_directory
from tests.waiting import until

NODE = 2**64 - 5


@pytest.fixture
def run(tmp_path):
    return run_directory(tmp_path / "d")


@pytest.fixture
def devices(run):
    devices = Devices(run.devices_db)
    yield devices
    devices.close()


def says(node):
    """A SuperLink that answers a registration like this."""

    def register(device, public_key):
        if isinstance(node, Exception):
            raise node
        return node

    return register


PUBLIC_KEY = identity.public_key(identity.new_device_key())


def claimed(run, devices):
    token = new_token("localhost:1", run.authority.certificate, "phone", time.time() + 60)
    devices.invite("phone", secret_digest(token.secret), token.expires)
    assert devices.claim("phone", key_digest(PUBLIC_KEY))


def test_a_new_node_is_remembered_with_its_key(run, devices):
    claimed(run, devices)
    registration(devices, says(NODE))("phone", PUBLIC_KEY)
    (entry,) = devices.entries()
    assert entry.node == NODE


def test_a_key_that_flower_knows_is_fine(run, devices):
    claimed(run, devices)
    registration(devices, says(None))("phone", PUBLIC_KEY)
    (entry,) = devices.entries()
    assert entry.node is None


def test_a_device_that_asks_again_is_not_registered_again(run, devices):
    claimed(run, devices)
    registration(devices, says(NODE))("phone", PUBLIC_KEY)
    registration(devices, says(SuperLinkError("away")))("phone", PUBLIC_KEY)
    (entry,) = devices.entries()
    assert entry.node == NODE


def test_a_superlink_that_is_away_means_not_now(run, devices):
    claimed(run, devices)
    with pytest.raises(OSError, match="away"):
        registration(devices, says(SuperLinkError("away")))("phone", PUBLIC_KEY)


def test_the_status_api_tells_what_the_command_tells(run):
    with (
        serving(status_listener(run)) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        assert client.get("/status").json()["rounds_wanted"] == 3
        assert client.get("/rounds").json()["rounds"] == []
        assert client.post("/status").status_code == 405
        assert client.get("/devices").status_code == 404


def test_the_status_api_says_what_is_damaged(run):
    (run.path / "state.db").write_bytes(b"nothing of the kind" * 1000)
    with serving(status_listener(run)) as port:
        answer = httpx.get(f"http://127.0.0.1:{port}/status")
    assert answer.status_code == 500
    assert "state.db" in answer.json()["error"]


@pytest.mark.slow
def test_a_part_that_cannot_start_says_why_in_its_last_line(tmp_path):
    done = subprocess.run(
        [*command("conductor", run_directory(tmp_path / "d"))[:-1], str(tmp_path / "nowhere")],
        capture_output=True,
        check=False,
    )
    assert done.returncode == MISCONFIGURED
    assert b"init" in done.stdout.splitlines()[-1]
    assert b"Traceback" not in done.stdout + done.stderr


def test_a_part_that_is_none_is_our_own_mistake(run):
    with pytest.raises(AssertionError):
        command("teapot", run)
    with pytest.raises(KeyError):
        main(["teapot", str(run.path)])


@pytest.mark.slow
def test_the_gateway_serves_over_tls_and_ends_when_told(run):
    port = run.settings.network.gateway_port
    with subprocess.Popen(command("gateway", run), stdout=subprocess.DEVNULL) as process:
        try:
            until(lambda: _ready(port))
            trust = ssl.create_default_context(cafile=str(run.ca_certificate))
            answer = httpx.get(f"https://127.0.0.1:{port}/health", verify=trust, trust_env=False)
            assert answer.json() == {"status": "ok"}
            status_port = run.settings.network.status_port
            assert httpx.get(f"http://127.0.0.1:{status_port}/status").json()["run"] == "a-run"
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) in (0, -signal.SIGTERM)
        finally:
            process.kill()


def _ready(port):
    try:
        return listening("127.0.0.1", port)()
    except OSError:
        time.sleep(0.1)
        return False
