"""What is checked before anything starts, and which processes make up the service."""

import socket
import sqlite3

import pytest

from proxymoe.common.errors import CheckpointError, ConfigError
from proxymoe.server.flower import COORDINATOR
from proxymoe.server.serve import (
    check_databases,
    check_keys,
    check_ports,
    children,
    supervised,
)
from tests.runs import run_directory


@pytest.fixture
def run(tmp_path):
    return run_directory(tmp_path / "d")


def test_a_new_run_directory_can_be_served(run):
    with supervised(run):
        assert (run.flower / "config.toml").exists()


def test_who_serves_keeps_a_second_one_out(run):
    with supervised(run), pytest.raises(ConfigError, match="another `serve`"), supervised(run):
        raise AssertionError("never here")


def test_the_conductor_starts_last_and_the_superlink_first(run):
    names = [child.name for child in children(run)]
    assert names == ["superlink", "superexec", "gateway", "blobs", "conductor"]


def test_the_round_engine_is_told_its_run_directory(run):
    environments = {child.name: child.environment for child in children(run)}
    assert environments["superexec"][COORDINATOR] == str(run.path)
    assert COORDINATOR not in environments["gateway"]


def test_a_service_that_listens_everywhere_is_looked_for_on_loopback(run):
    network = run.settings.network.model_copy(update={"host": "0.0.0.0"})
    run.__dict__["settings"] = run.settings.model_copy(update={"network": network})
    (gateway,) = (child for child in children(run) if child.name == "gateway")
    with socket.create_server(("127.0.0.1", network.gateway_port)):
        assert gateway.ready()


@pytest.mark.parametrize("name", ["ca.pem", "ca.key", "server.key", "signing.key"])
def test_a_missing_key_is_named(run, name):
    (run.keys / name).unlink()
    with pytest.raises(ConfigError, match=rf"{name}: missing .*backup"):
        check_keys(run)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
@pytest.mark.parametrize("name", ["ca.key", "signing.key", "superexec.secret"])
def test_a_private_key_that_others_may_read_is_refused(run, name, mode):
    (run.keys / name).chmod(mode)
    with pytest.raises(ConfigError, match=rf"{name}: mode {mode:04o}.*chmod 600"):
        check_keys(run)


@pytest.mark.parametrize("key", ["gateway_port", "blob_port", "status_port", "superlink_port"])
def test_a_taken_port_is_named(run, key):
    port = getattr(run.settings.network, key)
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(ConfigError, match=rf"network.{key} = {port}: .*in use.*another port"),
    ):
        check_ports(run)


def test_an_address_of_another_machine_is_refused(run):
    network = run.settings.network.model_copy(update={"host": "192.0.2.1"})
    run.__dict__["settings"] = run.settings.model_copy(update={"network": network})
    with pytest.raises(ConfigError, match=r"cannot listen at 192\.0\.2\.1"):
        check_ports(run)


def test_a_database_that_is_none_is_refused(run):
    (run.path / "state.db").write_bytes(b"nothing of the kind" * 1000)
    with pytest.raises(CheckpointError, match=r"state.db: .*backup"):
        check_databases(run)


def test_a_database_with_a_damaged_page_is_refused(run):
    path = run.path / "state.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE t (x)")
        database.executemany("INSERT INTO t VALUES (?)", [(f"{n}" * 500,) for n in range(500)])
    database.close()
    content = bytearray(path.read_bytes())
    content[8192:12288] = b"\xff" * 4096
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state.db: .*backup"):
        check_databases(run)
