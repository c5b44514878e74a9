"""Every way to choose experts at equal bytes: what comes back, and what it costs the device.

`python -m proxymoe.simulations.bench_extraction --json PATH` runs `experiments/extraction.toml`:
every mode and kept fraction on devices that are tuned alone, over seeds, with public text that
matches the device, everybody's, and somebody else's. It keeps what it has measured, so it can be
interrupted and resumed.
"""

from pathlib import Path
from typing import Annotated, Any

from proxymoe.common.offline import go_offline

go_offline(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import json  # noqa: E402

import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from proxymoe.common.errors import ProxyMoEError  # noqa: E402
from proxymoe.common.experiment import Experiment  # noqa: E402
from proxymoe.common.files import write_json  # noqa: E402
from proxymoe.simulations.cli import open_run  # noqa: E402
from proxymoe.simulations.comparison import Cell, mode_label  # noqa: E402
from proxymoe.simulations.extraction import ALL, Key, extraction_rows, how  # noqa: E402
from proxymoe.simulations.forkserver import start_forkserver  # noqa: E402

TASKS = ("question_generation_82", "program_execution_1265")
"""Devices among Natural Instructions: text to write, and counting."""
MEASURED_STEPS = 3
"""Training steps after which memory no longer grows."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False, width=140)


@app.command()
def bench(
    experiment: Annotated[Path, typer.Option(help="Experiment file, or a shipped one.")] = Path(
        "extraction"
    ),
    resume: Annotated[Path | None, typer.Option(help="Go on with this run folder.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting."),
    ] = None,
    instructions: Annotated[
        Path | None, typer.Option(help="Natural Instructions; two of its tasks become devices.")
    ] = None,
    memory: Annotated[bool, typer.Option(help="Measure each mode's peak memory, too.")] = True,
    runs: Annotated[Path, typer.Option(help="Where runs and the cache are kept.")] = Path("runs"),
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Where to write the table as JSON.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to draw it (.svg, .png).")] = None,
) -> None:
    """Tunes every device on every submodel, plugs back, and tabulates."""
    folder = resume or runs
    try:
        settings, folder = open_run(experiment, resume, tuple(overrides or ()), runs)
        settings = settings if instructions is None else with_tasks(settings, instructions)
        start_forkserver()
        rows = measured(settings, folder, runs / "cache", memory=memory)
    except ProxyMoEError as error:
        console.print(f"[red]error:[/] {error}")
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.print(f"[yellow]interrupted[/]; go on with --resume {folder}")
        raise typer.Exit(130) from None
    console.print(table(rows))
    if json_path is not None:
        write_json(json_path, {"table": rows})
    if plot is not None:
        from proxymoe.simulations.plots import write_extraction  # noqa: PLC0415

        write_extraction(plot, rows)


def with_tasks(experiment: Experiment, folder: Path) -> Experiment:
    """The experiment with two devices more, of Natural Instructions."""
    fields = experiment.model_dump(mode="json")
    fields["devices"].append({"data": str(folder.resolve()), "names": TASKS, "answers": False})
    compare = fields["compare"]
    compare["single_devices"] = [*compare["single_devices"], *TASKS]
    return Experiment.model_validate(fields)


def measured(
    experiment: Experiment, folder: Path, cache: Path, *, memory: bool
) -> list[dict[str, Any]]:
    """Runs what is missing in the run folder, and returns the rows of the table."""
    # What a simulation needs takes seconds to import.
    from proxymoe.simulations.session import run  # noqa: PLC0415

    run(experiment, folder, cache, console, over_flower=False)
    cells: list[Cell] = json.loads((folder / "metrics.json").read_bytes())["cells"]
    peaks = peak_memory(experiment, cells, folder, cache) if memory else {}
    default = {"mode": "drop", "router": "full", "allocation": "global", "healed": False}
    return extraction_rows(cells, default, peaks)


def peak_memory(
    experiment: Experiment, cells: list[Cell], folder: Path, cache: Path
) -> dict[Key, float]:
    """Peak memory in MB of a process that tunes the first device, for each way to cut."""
    from proxymoe.simulations import worker  # noqa: PLC0415
    from proxymoe.simulations.pool import WorkerPool, result_of  # noqa: PLC0415
    from proxymoe.simulations.world import open_site  # noqa: PLC0415

    name, seed = experiment.compare.single_devices[0], experiment.compare.seeds[0]
    train = experiment.train.model_copy(update={"steps": MEASURED_STEPS})
    site, _ = open_site(experiment, cache)
    keep, found = folder / "peaks.json", dict[str, float]()
    if keep.exists():
        found = json.loads(keep.read_bytes())
    peaks: dict[Key, float] = {}
    with WorkerPool(site, 1) as pool:
        for cell in cells:
            if (cell["device"], cell["seed"], cell["setting"]) != (name, seed, "single"):
                continue
            key = json.dumps(how(cell))
            if key not in found:
                plan = cell["plan"]
                found[key] = result_of(pool.submit_alone(worker.peak, site, name, plan, train))
                write_json(keep, found)
            peaks[how(cell)] = found[key]
    return peaks


def table(rows: list[dict[str, Any]]) -> Table:
    """The means over devices, for people."""
    found = Table(title="Tuned on a submodel, plugged back into the full model: means over devices")
    columns = ("mode", "kept", "MB", "gap, nats", "gain", "proxy", "forgets", "KL", "peak MB", "s")
    for name in columns:
        found.add_column(name, justify="left" if name == "mode" else "right", no_wrap=True)
    for row in rows:
        if row["device"] != ALL:
            continue
        error = "" if row["stderr"] is None else f" ±{row['stderr']:.3f}"
        found.add_row(
            mode_label(row) + (" (default)" if row["default"] else ""),
            f"{row['kept_fraction']:.3g}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['gap_nats']:.3f}{error}",
            _percent(row["recovered_gain_loss"]),
            "–" if row["proxy_alone"] is None else f"{row['proxy_alone']:.3f}",
            f"{row['forgetting']:.2f}",
            f"{row['kl']:.3f}",
            "" if row["peak_rss_mb"] is None else f"{row['peak_rss_mb']:.0f}",
            f"{row['seconds']:.0f}",
        )
    return found


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


if __name__ == "__main__":
    app()
