"""The coordinator service: all its processes as one supervised group.

In their order: Flower's SuperLink and SuperExec, our gateway, the blob service, and the conductor,
which starts the Flower run whose ServerApp is the round engine. What dies is started again, and
the rounds go on; see `common/supervise.py`.
"""

import logging
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from proxymoe.common.errors import CheckpointError, ConfigError
from proxymoe.common.offline import LOOPBACK
from proxymoe.common.supervise import Backoff, Child, Supervisor, listening
from proxymoe.server import parts
from proxymoe.server.flower import (
    COORDINATOR,
    environment,
    superexec_command,
    superlink_command,
    write_connection,
)
from proxymoe.server.lock import held
from proxymoe.server.run_directory import RunDirectory
from proxymoe.server.status import readable, serve_lock

log = logging.getLogger(__name__)

START_SECONDS = 300.0
"""How long a part may take to listen, on a busy machine."""
PREPARE_SECONDS = 24 * 3600.0
"""How long the blob service may: the first time, it indexes and profiles the base model."""
GRACE_SECONDS = 20.0
"""From SIGTERM to SIGKILL; what is lost by that is done again."""
LEAST_FREE_BYTES = 64 << 20
ANYWHERE = {"": LOOPBACK, "0.0.0.0": LOOPBACK, "::": "::1"}  # noqa: S104  compared, not bound
"""Where something answers that listens everywhere."""


@contextmanager
def supervised(run: RunDirectory) -> Iterator[Supervisor]:
    """The service of a run directory, ready to `run`; nobody else may serve it meanwhile.

    Raises:
        ConfigError: a key is missing or open to others, a port is taken, or it is served already.
        CheckpointError: a database is damaged.
        OSError: the disk is full or not ours to write.
    """
    refusal = f"{run.path}: another `serve` is running on this directory; stop it first"
    check_keys(run)
    with held(serve_lock(run), refusal):
        check_databases(run)
        check_ports(run)
        if (free := shutil.disk_usage(run.path).free) < LEAST_FREE_BYTES:
            raise ConfigError(
                f"{run.path}: {free >> 20} MiB free, at least {LEAST_FREE_BYTES >> 20} are needed; "
                "make room"
            )
        write_connection(run)
        yield Supervisor(children(run), run.log, Backoff(), GRACE_SECONDS)


def children(run: RunDirectory) -> list[Child]:
    """The processes of the service, in the order in which they start."""
    network, flower = run.settings.network, environment(run, os.environ)
    host = ANYWHERE.get(network.host, network.host)
    app = flower | {COORDINATOR: str(run.path)}
    return [
        Child(
            "superlink",
            superlink_command(run),
            listening(LOOPBACK, network.superlink_port),
            START_SECONDS,
            flower,
        ),
        Child("superexec", superexec_command(run), environment=app),
        Child(
            "gateway",
            parts.command("gateway", run),
            listening(host, network.gateway_port),
            START_SECONDS,
        ),
        Child(
            "blobs",
            parts.command("blobs", run),
            listening(host, network.blob_port),
            PREPARE_SECONDS,
        ),
        Child("conductor", parts.command("conductor", run)),
    ]


def check_keys(run: RunDirectory) -> None:
    """Returns if all keys are there, and nobody but the owner can read the private ones.

    Raises:
        ConfigError: otherwise; names the file and the remedy.
    """
    for path in (run.ca_certificate, run.server_certificate):
        _require_readable(run, path.name)
    for path in (run.ca_key, run.server_key, run.signing_key_file, run.superexec_secret):
        _require_readable(run, path.name)
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(
                f"{path}: mode {mode:04o}, so others may use this key; `chmod 600 {path}`, and "
                "make a new run directory if somebody has seen it"
            )


def check_databases(run: RunDirectory) -> None:
    """Returns if SQLite finds nothing wrong with the databases.

    Raises:
        CheckpointError: one is damaged.
    """
    for path in (run.devices_db, run.path / "state.db", run.flower / "superlink.db"):
        if path.exists():
            with readable(path) as database:
                (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise CheckpointError(
                    f"{path}: damaged ({' '.join(found.split())}); restore it from a backup"
                )


def check_ports(run: RunDirectory) -> None:
    """Returns if all ports can be listened at.

    Raises:
        ConfigError: one is taken, or the address is not this machine's.
    """
    network = run.settings.network
    wanted = {
        "gateway_port": (network.host, network.gateway_port),
        "blob_port": (network.host, network.blob_port),
        "status_port": (LOOPBACK, network.status_port),
        "superlink_port": (LOOPBACK, network.superlink_port),
    }
    for key, (host, port) in wanted.items():
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with socket.create_server((host, port), family=family):
                pass
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise ConfigError(
                f"network.{key} = {port}: cannot listen at {host} ({reason}); stop what listens "
                f"there, or set another port in {run.settings_file}"
            ) from error


def _require_readable(run: RunDirectory, name: str) -> None:
    path = run.keys / name
    if not path.is_file() or not os.access(path, os.R_OK):
        raise ConfigError(
            f"{path}: missing or not readable for this user; restore it from a backup, or make a "
            "new run directory with `init`, at which devices enrol again"
        )
