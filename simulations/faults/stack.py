"""Level 6: the whole stack, a coordinator and devices over TLS and Flower.

One deployment works through its rounds while each of its coordinator's processes is killed in the
middle of one. Nothing may be lost, and because every device answers in the end, it must end in the
same bits as a simulation in which nothing happened. In another one, processes of devices are
killed, while they train and while their updates are summed under masks; those go on without them.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from proxymoe.common.supervise import STATE
from proxymoe.server import audit
from proxymoe.server.status import readable
from proxymoe.simulations.deploy_demo import RULES, adapter_of, digest_of_adapter, in_process, small
from proxymoe.simulations.deployment import Deployment, DeploymentFailed, deployed
from proxymoe.simulations.faults.law import Story
from proxymoe.simulations.faults.report import Ground, Scenario
from proxymoe.simulations.site import VirtualDevice

LEVEL = "stack"
PARTS = ("superlink", "superexec", "gateway", "blobs", "conductor")
CHILDREN = {"node": "proxymoe.client.node", "runner": "client.service", "job": "client.job"}
"""Processes of a device, by what their command lines have in them."""
ROUND_SECONDS = 300.0
PHASE_SECONDS = 60.0


def parts_killed(ground: Ground) -> Iterator[str]:
    """Kills every process of the coordinator, its round engine, and all of it, a round each."""
    killings: dict[str, Callable[[Deployment], None]] = {
        **{part: partial(_kill_part, part) for part in PARTS},
        "round engine": _kill_engine,
        "coordinator": _kill_coordinator,
    }
    experiment = small(devices=2, rounds=len(killings) + 1)
    expected = digest_of_adapter(in_process(experiment, ground.folder()))
    with deployed(experiment, ground.folder() / "deployment", {"rules": RULES}) as deployment:
        committed: list[str] = []
        for number, (name, killing) in enumerate(killings.items(), start=1):
            here, further = (partial(_reached, deployment, n) for n in (number, number + 1))
            deployment.until(f"round {number} is on", here, ROUND_SECONDS)
            killing(deployment)
            deployment.until(f"a round after the {name} was killed", further, ROUND_SECONDS)
            yield _broken(deployment.run_directory, committed)
        deployment.run_rounds(ROUND_SECONDS)
        found = digest_of_adapter(adapter_of(deployment))
    if found != expected:
        raise AssertionError(f"the deployment ended in {found}, the simulation in {expected}")


def devices_killed(ground: Ground) -> Iterator[str]:
    """Kills every process of a device, and all of it, in training and in the masked sum."""
    killings: list[tuple[str, Callable[[Deployment, VirtualDevice], None]]] = [
        *(("training", partial(_kill_child, part)) for part in CHILDREN),
        ("training", _kill_device),
        *(("collecting", partial(_kill_child, part)) for part in CHILDREN if part != "job"),
        ("collecting", _kill_device),
    ]
    experiment = small(devices=4, rounds=len(killings) + 1)
    settings: dict[str, dict[str, Any]] = {
        "rules": RULES | {"quorum": 0.75, "patience": 2.0},
        "sums": {"masked": True, "smallest_cohort": 3, "smallest_class": 3},
    }
    with deployed(experiment, ground.folder() / "deployment", settings) as deployment:
        committed: list[str] = []
        for number, (phase, killing) in enumerate(killings, start=1):
            here, further = (partial(_reached, deployment, n) for n in (number, number + 1))
            deployment.until(f"round {number} is on", here, ROUND_SECONDS)
            with suppress(DeploymentFailed):  # a short phase may pass unseen, or never come
                now = partial(_is_in, deployment, number, phase)
                deployment.until(f"round {number}: {phase}", now, PHASE_SECONDS)
            # Another one each time: a node that is back is let in when its old session lapses.
            killing(deployment, deployment.devices[number % len(deployment.devices)])
            deployment.until(f"a round after round {number}", further, ROUND_SECONDS)
            yield _broken(deployment.run_directory, committed)
        deployment.run_rounds(ROUND_SECONDS)
        last = deployment.rounds()["rounds"][-1]
    if last["phase"] != "committed":
        raise AssertionError(f"the last round, in which nothing was killed, was {last['phase']}")


def _is_in(deployment: Deployment, number: int, phase: str) -> bool:
    newest = deployment.rounds()["rounds"][-1]
    return bool(newest["number"] > number or newest["phase"] == phase)


def _reached(deployment: Deployment, number: int) -> bool:
    """Whether devices train in round `number`, or it is further than that."""
    newest = (deployment.rounds()["rounds"] or [{"number": 0, "phase": ""}])[-1]
    is_on = newest["phase"] in ("training", "collecting")
    return bool(newest["number"] > number or (newest["number"] == number and is_on))


def _broken(run_directory: Path, committed: list[str]) -> str:
    """What does not hold of the audit log; `committed` remembers the versions before."""
    story, complaints = Story(), list[str]()
    with readable(run_directory / "state.db") as database:
        for entry in audit.entries(database):
            complaints += story.tell(entry)
    versions = [version.digest for version in story.versions.values()]
    if versions[: len(committed)] != committed:
        complaints.append("a version that was committed is lost or another now")
    committed[:] = versions
    return "; ".join(complaints)


def _kill_coordinator(deployment: Deployment) -> None:
    """Kills the supervisor, whose children go with it, and starts it again as systemd would."""
    _kill(deployment.pid("coordinator"))
    deployment.stop("coordinator")
    deployment.start_coordinator()


def _kill_device(deployment: Deployment, device: VirtualDevice) -> None:
    """Kills a device's supervisor, whose children go with it, and starts it again."""
    _kill(deployment.pid(device.name))
    deployment.stop(device.name)
    deployment.start_device(device)


def _kill_child(part: str, deployment: Deployment, device: VirtualDevice) -> None:
    """Kills a process of a device, if it has one; a job is there only while it trains."""
    for child in psutil.Process(deployment.pid(device.name)).children(recursive=True):
        with suppress(psutil.Error):
            if CHILDREN[part] in " ".join(child.cmdline()):
                _kill(child.pid)


def _kill_part(part: str, deployment: Deployment) -> None:
    state = json.loads((deployment.run_directory / "log" / STATE).read_bytes())
    _kill(int(state[part]["pid"]))


def _kill_engine(deployment: Deployment) -> None:
    _kill(int(json.loads((deployment.run_directory / "engine.json").read_bytes())["pid"]))


def _kill(pid: int) -> None:
    process = psutil.Process(pid)
    os.kill(pid, signal.SIGKILL)
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)


SCENARIOS = (
    Scenario(
        LEVEL,
        "coordinator's processes killed, one by one and all at once",
        "no commit lost, nothing counted twice, chain verifies, run ends in the simulation's bits",
        parts_killed,
    ),
    Scenario(
        LEVEL,
        "devices' processes killed while they train, and in masked sums",
        "no commit lost, nothing counted twice, chain verifies, the last round is committed",
        devices_killed,
    ),
)
