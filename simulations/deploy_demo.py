"""`make deploy-demo`: a coordinator and devices on loopback, over TLS; who sent what, who saw what.

With --compare the same experiment also runs in process, and both must end in the same bits.
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

from proxymoe.common.checkpoint import read_tensors
from proxymoe.common.config import Experiment, load_experiment
from proxymoe.common.errors import ProxyMoEError
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

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False, width=120)


@app.command()
def demo(
    devices: Annotated[int, typer.Option(min=1, max=10, help="How many.")] = 4,
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run the same in process, and compare the bits.")
    ] = False,
    folder: Annotated[Path | None, typer.Option(help="Keep everything here; a new folder.")] = None,
) -> None:
    """Enrols devices at a coordinator, runs rounds over TLS, and shows what was sent and seen."""
    place = folder or Path(tempfile.mkdtemp(prefix="proxymoe-demo-")) / "demo"
    try:
        experiment = small(devices, rounds)
        started = time.monotonic()
        digest = run_deployment(experiment, place)
        console.print(f"{time.monotonic() - started:.0f} s in all; final adapter {digest}")
        if compare:
            require_equal(digest, in_process(experiment, place.parent / "cache"))
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


def run_deployment(experiment: Experiment, folder: Path) -> str:
    """Runs all rounds over TLS, shows both sides, and returns the final adapter's digest."""
    with deployed(experiment, folder, {"rules": RULES}) as deployment:
        console.print(f"coordinator and {len(deployment.devices)} devices are up, in {folder}")
        seconds = ROUND_SECONDS * experiment.federation.rounds
        deployment.run_rounds(seconds, lambda phase: console.print(f"  {phase}"))
        console.print(sent_table(deployment), seen_table(deployment.rounds()))
        digest = adapter_digest(deployment)
        if code := deployment.stop("coordinator"):
            raise ProxyMoEError(f"the coordinator ended with code {code}, wanted 0")
        return digest


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


def adapter_digest(deployment: Deployment) -> str:
    """Digest of the current version's vector, as `metrics.json` of a simulation names it."""
    found = deployment.rounds()
    version = found["current"]
    if not version:
        raise ProxyMoEError("no round was committed; see the table of rounds")
    number = next(entry["number"] for entry in found["versions"] if entry["version"] == version)
    path = deployment.run_directory / "versions" / f"{number:06d}.safetensors"
    return digest_of(read_tensors(path)["adapter"].numpy().astype("<f4").tobytes())


def in_process(experiment: Experiment, cache: Path) -> str:
    """Digest of the final adapter of the same experiment on virtual devices."""
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
        summing = Summing(federation, experiment)
        outcome = federate(federation, pool_transports(pool, plans), summing, None, lambda _: None)
    return digest_of(outcome.state.adapter.numpy().astype("<f4").tobytes())


def require_equal(deployed_digest: str, simulated_digest: str) -> None:
    """Says that both are equal; ProxyMoEError if they are not."""
    if deployed_digest != simulated_digest:
        raise ProxyMoEError(
            f"deployment and simulation differ: {deployed_digest} and {simulated_digest}"
        )
    console.print("the simulation in process ends in the same bits")


def main() -> None:
    """Entry point of the command line."""
    logging.basicConfig(level=logging.WARNING)
    app()


if __name__ == "__main__":
    main()
