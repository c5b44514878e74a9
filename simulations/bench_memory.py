"""Memory of a deployment: a coordinator over many tiny rounds, and a device that waits.

The resident memory of every process, after each round; a coordinator must not grow with rounds.
`python -m proxymoe.simulations.bench_memory`.
"""

import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from rich.console import Console
from rich.table import Table

from proxymoe.common.errors import ProxyMoEError
from proxymoe.common.files import write_json
from proxymoe.simulations.deploy_demo import RULES, small
from proxymoe.simulations.deployment import Deployment

WARM_UP = 0.25
"""Share of the rounds after which growth counts: caches fill at first."""
IDLE_SECONDS = 60.0
"""A device is back to its idle size within this time after a round."""
MB = 1e6

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False, width=120)


@app.command()
def bench(
    rounds: Annotated[int, typer.Option(min=4)] = 200,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Where to write the numbers as JSON.")
    ] = None,
) -> None:
    """Runs rounds of one step on two devices, and follows what every process holds."""
    experiment = small(devices=2, rounds=rounds)
    train = experiment.train.model_copy(update={"steps": 1, "batch_size": 1})
    experiment = experiment.model_copy(update={"train": train})
    samples: dict[str, list[float]] = {}
    last = ""

    def note(phase: str) -> None:
        nonlocal last
        number = phase.partition(":")[0]
        if number != last:
            last = number
            for name, size in coordinator_sizes(deployment).items():
                samples.setdefault(name, []).append(size)

    try:
        with (
            tempfile.TemporaryDirectory(prefix="proxymoe-memory-") as folder,
            Deployment(experiment, Path(folder) / "d", {"rules": RULES}) as deployment,
        ):
            deployment.start_coordinator()
            for device in deployment.devices:
                deployment.start_device(device, once=False)
            deployment.run_rounds(60.0 * rounds, note)
            time.sleep(IDLE_SECONDS)
            devices = {
                device.name: sum(sizes(deployment.pid(device.name)).values())
                for device in deployment.devices
            }
    except ProxyMoEError as error:
        console.print(f"[red]error:[/] {error}")
        raise typer.Exit(1) from error
    found = [growth(name, taken) for name, taken in sorted(samples.items())]
    console.print(table(found))
    for name, size in devices.items():
        console.print(f"device {name}, {IDLE_SECONDS:.0f} s after the last round: {size:.1f} MB")
    if json_path is not None:
        write_json(json_path, {"coordinator": found, "idle_device_mb": devices})


def coordinator_sizes(deployment: Deployment) -> dict[str, float]:
    """{process: resident MB} of the coordinator's processes, and of all together."""
    found = sizes(deployment.pid("coordinator"))
    return found | {"all": sum(found.values())}


def sizes(pid: int) -> dict[str, float]:
    """{what runs: resident MB} of a process and all below it; equals are added up."""
    found: dict[str, float] = {}
    root = psutil.Process(pid)
    for process in (root, *root.children(recursive=True)):
        try:
            name, size = _name(process.cmdline()), process.memory_info().rss / MB
        except psutil.Error:  # it has just ended
            continue
        found[name] = found.get(name, 0.0) + size
    return found


def growth(name: str, taken: list[float]) -> dict[str, Any]:
    """What a process held, and by how much it grew per round after the warm-up."""
    steady = taken[int(WARM_UP * len(taken)) :]
    slope = float(np.polyfit(range(len(steady)), steady, 1)[0]) if len(steady) > 1 else 0.0
    return {
        "process": name,
        "rounds": len(taken),
        "first_mb": steady[0],
        "last_mb": steady[-1],
        "largest_mb": max(taken),
        "kb_per_round": 1e3 * slope,
        "all_mb": taken,
    }


def table(found: Iterable[dict[str, Any]]) -> Table:
    """The coordinator's processes for people."""
    shown = Table("process", "rounds", "MB, warm", "MB, last", "MB, largest", "kB per round")
    for row in found:
        first, last, largest = (f"{row[key]:.1f}" for key in ("first_mb", "last_mb", "largest_mb"))
        slope = f"{row['kb_per_round']:+.1f}"
        shown.add_row(row["process"], str(row["rounds"]), first, last, largest, slope)
    return shown


def _name(command: list[str]) -> str:
    """What a command line runs, without paths and options."""
    words = [Path(word).name for word in command if not word.startswith("-")]
    known = ("flower-superlink", "flower-superexec", "flwr-serverapp")
    for word in words:
        if word in known:
            return word
    if "proxymoe.server.parts" in words:
        return words[words.index("proxymoe.server.parts") + 1]
    return "supervisor" if "proxymoe.server.cli" in words else words[0] if words else "?"


if __name__ == "__main__":
    app()
