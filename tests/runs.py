"""Coordinator run directories for tests, with real keys and free ports."""

import time

from proxymoe.common.config import FederationSettings
from proxymoe.server.run_directory import RunDirectory
from proxymoe.server.settings import CoordinatorSettings, NetworkSettings
from tests.doors import free_port


def settings(**fields):
    """Settings of a coordinator; base model and calibration are anywhere, ports are free."""
    ports = set[int]()
    while len(ports) < 4:
        ports.add(free_port())
    kinds = ("gateway_port", "blob_port", "status_port", "superlink_port")
    proper = {
        "run": "a-run",
        "base_model": "model",
        "calibration": "calibration",
        "federation": FederationSettings(rounds=3),
        "network": NetworkSettings(**dict(zip(kinds, ports, strict=True))),
    }
    return CoordinatorSettings.model_validate({**proper, **fields})


def run_directory(path, **fields):
    """A new run directory at `path`, with these settings."""
    return RunDirectory.create(path, settings(**fields), time.time())
