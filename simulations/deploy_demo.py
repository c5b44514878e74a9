"""`make deploy-demo`: a coordinator and devices on loopback, over TLS; who sent what, who saw what.

Updates are summed under masks, unless --plain says otherwise. With --compare the same experiment
also runs in process, in the clear: a plain sum must end in the same bits, a masked one close by.
"""

import json
import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from proxymoe.common.checkpoint import read_tensors
from proxymoe.common.errors import ProxyMoEError
from proxymoe.common.experiment import Experiment, load_experiment
from proxymoe.common.files import digest_of
from proxymoe.simulations.cli import EXPERIMENTS
from proxymoe.simulations.deployment import Deployment, deployed

ROUND_SECONDS = 600.0
"""Longest wait for a round, on a busy machine."""
RULES = {
    "quorum": 1.0,
    "selecting_seconds": 1.0,
    "asking_seconds": 2.0,
    "deadline_seconds": 300.0,
}

SMALLEST = 3
"""Fewest devices of a masked sum; only a demo may have so few."""
CLOSE = 1e-2
"""Largest relative difference of two adapters, one of them from masked sums: what rounding does in
a round, training goes on from in the next."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False, width=120)


@app.command()
def demo(
    devices: Annotated[int, typer.Option(min=2, max=10, help="How many.")] = 4,
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    plain: Annotated[
        bool, typer.Option("--plain", help="Let the coordinator see every update.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run the same in process, and compare.")
    ] = False,
    folder: Annotated[Path | None, typer.Option(help="Keep everything here; a new folder.")] = None,
) -> None:
    """Enrols devices at a coordinator, runs rounds over TLS, and shows what was sent and seen."""
    place = folder or Path(tempfile.mkdtemp(prefix="proxymoe-demo-")) / "demo"
    try:
        experiment = small(devices, rounds)
        started = time.monotonic()
        sums = {"smallest_cohort": min(SMALLEST, devices), "smallest_class": min(SMALLEST, devices)}
        adapter = run_deployment(experiment, place, {"masked": not plain, **sums})
        seconds = time.monotonic() - started
        console.print(f"{seconds:.0f} s in all; final adapter {digest_of_adapter(adapter)}")
        if compare:
            require_alike(adapter, in_process(experiment, place.parent / "cache"), exactly=plain)
    except ProxyMoEError as error:
        console.print(f"[red]error:[/] {error}", markup=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        if folder is None:
            shutil.rmtree(place.parent, ignore_errors=True)


def small(devices: int, rounds: int) -> Experiment:
    """The default experiment with fewer devices, all of which are asked in every round."""
    default = load_experiment(EXPERIMENTS / "default.toml")
    (group,) = default.devices
    train = default.train.model_copy(update={"steps": 4, "learning_rate": 0.5})
    federation = default.federation.model_copy(
        update={"rounds": rounds, "cohort_size": devices, "canary_every": 1}
    )
    return default.model_copy(
        update={
            "name": "deploy-demo",
            "devices": (group.model_copy(update={"names": group.names[:devices]}),),
            "train": train,
            "federation": federation,
        }
    )


def run_deployment(experiment: Experiment, folder: Path, sums: dict[str, Any]) -> Tensor:
    """Runs all rounds over TLS, shows both sides, and returns the final adapter."""
    with deployed(experiment, folder, {"rules": RULES, "sums": sums}) as deployment:
        console.print(f"coordinator and {len(deployment.devices)} devices are up, in {folder}")
        seconds = ROUND_SECONDS * experiment.federation.rounds
        deployment.run_rounds(seconds, lambda phase: console.print(f"  {phase}"))
        console.print(sent_table(deployment), seen_table(deployment.rounds()))
        adapter = adapter_of(deployment)
        if code := deployment.stop("coordinator"):
            raise ProxyMoEError(f"the coordinator ended with code {code}, wanted 0")
        return adapter


def sent_table(deployment: Deployment) -> Table:
    """Everything that left each device, by its own ledger."""
    table = Table("device", "what", "messages", "sent", "fetched", title="What the devices sent")
    for device in deployment.devices:
        found = json.loads(deployment.device(device.name, "sent", "--json", "--limit", "1000"))
        kinds: dict[str, list[dict[str, Any]]] = {}
        for entry in found["entries"]:
            kinds.setdefault(entry["kind"], []).append(entry)
        for kind, entries in sorted(kinds.items()):
            sent = sum(entry["num_bytes"] for entry in entries)
            fetched = sum(entry.get("fetched_bytes", 0) for entry in entries)
            table.add_row(device.name, kind, str(len(entries)), f"{sent:,} B", f"{fetched:,} B")
    return table


def seen_table(found: dict[str, Any]) -> Table:
    """The rounds as the coordinator has them on record."""
    table = Table("round", "end", "asked", "updates", "canary", title="What the coordinator saw")
    for entry in found["rounds"]:
        canary = "" if entry["canary"] is None else f"{entry['canary']:.3f}"
        cohort = ", ".join(entry["cohort"])
        table.add_row(str(entry["number"]), entry["phase"], cohort, str(entry["updates"]), canary)
    return table


def adapter_of(deployment: Deployment) -> Tensor:
    """The current version's vector."""
    found = deployment.rounds()
    version = found["current"]
    if not version:
        raise ProxyMoEError("no round was committed; see the table of rounds")
    number = next(entry["number"] for entry in found["versions"] if entry["version"] == version)
    path = deployment.run_directory / "versions" / f"{number:06d}.safetensors"
    return read_tensors(path)["adapter"]


def digest_of_adapter(adapter: Tensor) -> str:
    """As `metrics.json` of a simulation names it."""
    return digest_of(adapter.numpy().astype("<f4").tobytes())


def in_process(experiment: Experiment, cache: Path) -> Tensor:
    """The final adapter of the same experiment on virtual devices, summed in the clear."""
    # What a simulation needs takes seconds to import.
    from proxymoe.simulations.federate import (  # noqa: PLC0415
        federate,
        federation_of,
        pool_transports,
    )
    from proxymoe.simulations.pool import WorkerPool  # noqa: PLC0415
    from proxymoe.simulations.run import cut_all  # noqa: PLC0415
    from proxymoe.simulations.summing import Summing  # noqa: PLC0415
    from proxymoe.simulations.world import World, open_site, profile_base  # noqa: PLC0415

    site, base = open_site(experiment, cache)
    with WorkerPool(site, experiment.workers) as pool:
        world = World(site, base, profile_base(pool, base, cache, lambda *_: None))
        plans = {cut.device.name: cut.plan for cut in cut_all(world, lambda *_: None)}
        federation = federation_of(pool, plans, experiment, run=experiment.name)
        transports = pool_transports(pool, lambda _: plans)
        outcome = federate(
            federation, transports, Summing(federation, experiment), None, lambda _: None
        )
    return outcome.state.adapter


def require_alike(deployed: Tensor, simulated: Tensor, *, exactly: bool) -> None:
    """Says how alike both are; ProxyMoEError if not as they should be."""
    difference = float((deployed - simulated).norm() / simulated.norm())
    if exactly and digest_of_adapter(deployed) != digest_of_adapter(simulated):
        raise ProxyMoEError(f"deployment and simulation differ, by {difference:.1e}")
    if difference > CLOSE:
        raise ProxyMoEError(f"deployment and simulation differ by {difference:.1e}, over {CLOSE}")
    told = "ends in the same bits" if exactly else f"ends {difference:.1e} of its norm away"
    console.print(f"the simulation in process {told}")


def main() -> None:
    """Entry point of the command line."""
    logging.basicConfig(level=logging.WARNING)
    app()


if __name__ == "__main__":
    main()
