"""One invocation of the simulator: open the site, run, write the results, show them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn

from proxymoe.common.experiment import Experiment
from proxymoe.server.base import BaseCheckpoint
from proxymoe.simulations.compare import run_comparison
from proxymoe.simulations.federate import federate
from proxymoe.simulations.memory import MemoryWatch
from proxymoe.simulations.plots import write_plots
from proxymoe.simulations.pool import WorkerPool
from proxymoe.simulations.report import show, write_metrics
from proxymoe.simulations.run import Federate, run_experiment
from proxymoe.simulations.site import Site
from proxymoe.simulations.summing import require_summable
from proxymoe.simulations.world import Stage, World, open_site, profile_base


def run(
    experiment: Experiment, folder: Path, cache: Path, console: Console, *, over_flower: bool
) -> None:
    """Runs an experiment, or goes on with one; metrics, plots and adapter end up in `folder`."""
    console.print(f"[bold]{experiment.name}[/] → {folder}", highlight=False)
    require_summable(experiment)
    started = time.monotonic()
    torch.set_num_threads(1)  # The workers have the cores; more threads here would only spin.
    site, base = open_site(experiment, cache)
    watch = MemoryWatch()
    with watch, _progress(console) as stage:
        metrics = _metrics(site, base, folder, cache, stage, over_flower)
    metrics["summary"]["wall_seconds"] = time.monotonic() - started
    metrics["summary"]["peak_rss_mb"] = watch.peak_mb
    path = write_metrics(folder, metrics)
    plots = write_plots(folder / "plots", metrics)
    show(metrics, console)
    for result in (path, *plots):
        console.print(f"  {result}", highlight=False)


def quiet_metrics(experiment: Experiment, folder: Path, cache: Path) -> dict[str, Any]:
    """The metrics of an experiment, but for peak memory; a new `folder` keeps what it made."""
    folder.mkdir()
    require_summable(experiment)
    site, base = open_site(experiment, cache)
    with WorkerPool(site, experiment.workers) as pool:
        world = World(site, base, profile_base(pool, base, cache, lambda *_: None))
        return run_experiment(world, pool, folder, lambda *_: None, weighed=False)


def _metrics(
    site: Site, base: BaseCheckpoint, folder: Path, cache: Path, stage: Stage, over_flower: bool
) -> dict[str, Any]:
    with WorkerPool(site, site.experiment.workers) as pool:
        world = World(site, base, profile_base(pool, base, cache, stage))
        if not site.experiment.compare.seeds:
            return run_experiment(world, pool, folder, stage, _rounds(site, over_flower))
    # The comparison opens a pool per seed: the seed is part of what a worker holds.
    return run_comparison(world, folder, stage)


def _rounds(site: Site, over_flower: bool) -> Federate:
    if not over_flower:
        return federate
    # Flower takes a second to import and is not needed otherwise.
    from proxymoe.simulations.flower import flower_backend  # noqa: PLC0415

    return flower_backend(site)


@contextmanager
def _progress(console: Console) -> Iterator[Stage]:
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def stage(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done)

        yield stage
