"""A real deployment on loopback: one coordinator and several devices, each in its own processes.

Everything is done by the two command lines that a user has, over TLS and Flower; only how the
rounds stand is read where the coordinator's own command reads it. For the demo, for faults, and to
compare with a simulation.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import tomli_w

from proxymoe.client.policy import load_policy, policy_text
from proxymoe.common.errors import ProxyMoEError
from proxymoe.common.experiment import Experiment
from proxymoe.common.files import write_bytes
from proxymoe.common.offline import LOOPBACK, OFFLINE
from proxymoe.server.begin import shared_with
from proxymoe.server.run_directory import RunDirectory
from proxymoe.server.status import rounds, status
from proxymoe.simulations.site import VirtualDevice, asset, virtual_devices

PORTS = ("gateway_port", "blob_port", "status_port", "superlink_port")
CALM_SECONDS = 0.5
STOP_SECONDS = 60.0
TAIL_LINES = 12


class DeploymentFailed(ProxyMoEError):
    """A process of the deployment ended, or nothing happened in time; tells what it said last."""


class Deployment:
    """A coordinator and devices for an experiment, in a folder; a context manager.

    Args:
        experiment: names the devices, and how they are federated.
        folder: for run directory, homes and logs; must not exist.
        settings: sections of `coordinator.toml` that differ from what follows from the experiment.
    """

    def __init__(
        self, experiment: Experiment, folder: Path, settings: dict[str, dict[str, Any]]
    ) -> None:
        self.experiment, self.folder = experiment, folder
        self.devices = virtual_devices(experiment.devices)
        self.run_directory = folder / "coordinator"
        self._settings = settings
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:
            for name in list(self._processes):  # the coordinator was first, and goes last
                stack.callback(self.stop, name)

    def home(self, device: str) -> Path:
        """The home of a device."""
        return self.folder / "homes" / device

    def start_coordinator(self) -> None:
        """Makes the run directory if there is none, and serves it; returns when devices may come.

        Raises:
            DeploymentFailed: it ended, or did not start in time.
        """
        if not self.run_directory.exists():
            config = self.folder / "coordinator.toml"
            write_bytes(config, tomli_w.dumps(self._coordinator_settings()).encode())
            self.coordinator("init", "--config", str(config))
        self._start("coordinator", "proxymoe.server.cli", "serve", str(self.run_directory))
        self.until("the coordinator is ready", self._is_serving)

    def start_device(self, device: VirtualDevice, *, once: bool = True) -> None:
        """Enrols a device if it is not yet, and lets it join, for good or until all is done."""
        home = self.home(device.name)
        if not home.exists():
            token = self.coordinator("enrol", device.name).strip()
            self.device(device.name, "enrol", "-", given=token)
            self._allow(home / "policy.toml", device.folder)
        where = ["--home", str(home)]
        joining = ["join", *["--once"] * once, "--domain", device.domain]
        self._start(device.name, "proxymoe.client.cli", *joining, *where)

    def coordinator(self, verb: str, *arguments: str) -> str:
        """What `proxymoe-coordinator <verb>` prints.

        Raises:
            DeploymentFailed: it refused.
        """
        run = [verb, str(self.run_directory), *arguments]
        return self._command("proxymoe.server.cli", *run)

    def device(self, device: str, verb: str, *arguments: str, given: str = "") -> str:
        """What `proxymoe-device <verb>` prints; see `coordinator`."""
        home = ["--home", str(self.home(device))]
        return self._command("proxymoe.client.cli", verb, *arguments, *home, given=given)

    def rounds(self) -> dict[str, Any]:
        """What `proxymoe-coordinator runs --json` prints, without a process for every look."""
        return rounds(RunDirectory(self.run_directory)).as_json()

    def run_rounds(self, seconds: float, told: Callable[[str], None] = lambda _: None) -> None:
        """Returns when all rounds are over; `told` hears of every phase.

        Raises:
            DeploymentFailed: a process ended with an error, or time was up.
        """
        wanted = self.experiment.federation.rounds
        last = ""

        def over() -> bool:
            nonlocal last
            newest = (self.rounds()["rounds"] or [None])[-1]
            if newest is None:
                return False
            now = f"round {newest['number']} of {wanted}: {newest['phase']}"
            if now != last:
                last = now
                told(now)
            ended = newest["phase"] in ("committed", "abandoned", "rolled back")
            return ended and newest["number"] >= wanted

        self.until("all rounds are over", over, seconds)

    def until(self, what: str, holds: Callable[[], bool], seconds: float = 300.0) -> None:
        """Returns when it holds.

        Raises:
            DeploymentFailed: a process ended with an error before, or time was up.
        """
        deadline = time.monotonic() + seconds
        while not holds():
            for name, process in self._processes.items():
                if process.poll():
                    code = process.returncode
                    raise DeploymentFailed(f"{name} ended with code {code}: {self.said(name)}")
            if time.monotonic() > deadline:
                said = "\n".join(f"{name}: {self.said(name)}" for name in self._processes)
                raise DeploymentFailed(f"{what}: not within {seconds:.0f} s\n{said}")
            time.sleep(CALM_SECONDS)

    def said(self, name: str) -> str:
        """The last lines that a process has printed."""
        text = (self.folder / f"{name}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-TAIL_LINES:])

    def pid(self, name: str) -> int:
        """The process of the coordinator, or of a device."""
        return self._processes[name].pid

    def stop(self, name: str) -> int:
        """Ends a process as `systemctl stop` would, and returns its exit code."""
        process = self._processes.pop(name)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            return process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _coordinator_settings(self) -> dict[str, Any]:
        experiment = self.experiment
        settings: dict[str, Any] = shared_with(experiment) | {
            "base_model": str(asset(experiment.base_model)),
            "calibration": str(asset(experiment.calibration)),
            "network": dict(zip(PORTS, free_ports(len(PORTS)), strict=True)),
        }
        for section, values in self._settings.items():
            settings[section] = settings.get(section, {}) | values
        return settings

    def _allow(self, policy_file: Path, data: Path) -> None:
        """What the owner of a demo device allows: all that this machine has, as things are."""
        wishes: dict[str, dict[str, Any]] = {
            "data": {"folder": data, "pattern": "train.jsonl"},
            "when": {"largest_load": 1000.0, "only_charging": False, "unknown_is_open": True},
            "privacy": {"smallest_cohort": 1},
        }
        if (sums := self._settings.get("sums", {})).get("masked"):
            least = {key: sums[key] for key in ("smallest_cohort", "smallest_class")}
            wishes["privacy"] = {"masks_required": True, **least}
        wishes["when"]["only_unmetered"] = False
        policy = load_policy(policy_file)
        changed = {
            section: getattr(policy, section).model_copy(update=values)
            for section, values in wishes.items()
        }
        write_bytes(policy_file, policy_text(policy.model_copy(update=changed)).encode())

    def _is_serving(self) -> bool:
        children = status(RunDirectory(self.run_directory)).children
        return bool(children) and all(child.ready for child in children)

    def _start(self, name: str, module: str, *arguments: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(  # noqa: S603  our own command lines
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(),
                start_new_session=True,
            )

    def _command(self, module: str, *arguments: str, given: str = "") -> str:
        done = subprocess.run(  # noqa: S603  our own command lines
            [sys.executable, "-m", module, *arguments],
            input=given,
            capture_output=True,
            text=True,
            env=environment(),
            check=False,
        )
        if done.returncode:
            raise DeploymentFailed(f"{module} {arguments[0]}: {done.stdout}{done.stderr}")
        return done.stdout


@contextmanager
def deployed(
    experiment: Experiment, folder: Path, settings: dict[str, dict[str, Any]]
) -> Iterator[Deployment]:
    """A deployment with its coordinator and all its devices started."""
    with Deployment(experiment, folder, settings) as deployment:
        deployment.start_coordinator()
        for device in deployment.devices:
            deployment.start_device(device)
        yield deployment


def environment() -> dict[str, str]:
    """Of all that is started: one thread each, a wide terminal, and nobody phones home."""
    return os.environ | OFFLINE | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def free_ports(count: int) -> list[int]:
    """Ports on loopback at which nobody listens now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((LOOPBACK, 0))) for _ in range(count)]
        return [found.getsockname()[1] for found in sockets]
