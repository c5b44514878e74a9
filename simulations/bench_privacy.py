"""What masks and noise cost in accuracy, on real devices' data: the price list beside the result.

The default experiment summed in the clear and under masks; then rounds of all ten devices with
central noise, for several epsilons and two adapters.
`python -m proxymoe.simulations.bench_privacy`.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from proxymoe.common.offline import go_offline

go_offline(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from proxymoe.common.errors import ProxyMoEError  # noqa: E402
from proxymoe.common.experiment import Experiment, load_experiment  # noqa: E402
from proxymoe.common.files import write_json  # noqa: E402
from proxymoe.simulations.cli import EXPERIMENTS  # noqa: E402
from proxymoe.simulations.forkserver import start_forkserver  # noqa: E402

MEASURED = ("personal.steps=0", "evaluate.proxies=false")
"""Only the shared adapter in the full model is of interest here."""
EVERYBODY = ("federation.cohort_size=10", "federation.server_learning_rate=0.02")
ADAPTERS = {
    "rank 8": ("adapter.rank=8",),
    "smallest": ("adapter.rank=1", 'adapter.targets=["attention"]'),
}
EPSILONS = (None, 8.0, 4.0, 2.0)
"""None: without noise."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False, width=120)


@app.command()
def bench(
    rounds: Annotated[int, typer.Option(min=1, help="Of the private federations.")] = 60,
    masks: Annotated[bool, typer.Option(help="Run the default experiment twice, too.")] = True,
    noise: Annotated[bool, typer.Option(help="Run the private federations.")] = True,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Where to write the table as JSON.")
    ] = None,
) -> None:
    """Runs federations that differ in how they are summed, and tabulates their accuracy."""
    start_forkserver()
    rows: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory(prefix="proxymoe-privacy-") as folder:
            for name, experiment in variants(rounds, masks=masks, noise=noise):
                rows.append({"name": name, **measured(experiment, Path(folder), len(rows))})
                console.print(f"{name}: {rows[-1]['accuracy']:.3f}")
    except ProxyMoEError as error:
        console.print(f"[red]error:[/] {error}")
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.print("[yellow]interrupted[/]; these are done:")
    console.print(table(rows))
    if json_path is not None:
        write_json(json_path, {"table": rows})


def variants(rounds: int, *, masks: bool, noise: bool) -> Iterator[tuple[str, Experiment]]:
    """Every federation with its name."""
    default = EXPERIMENTS / "default.toml"
    if masks:
        yield "plain sum", load_experiment(default, MEASURED)
        yield "masked sum", load_experiment(default, (*MEASURED, "secure=true"))
    for adapter, changes in ADAPTERS.items() if noise else ():
        for epsilon in EPSILONS:
            promise = (
                () if epsilon is None else ("privacy.mode=central", f"privacy.epsilon={epsilon}")
            )
            overrides = (*MEASURED, *EVERYBODY, *changes, *promise, f"federation.rounds={rounds}")
            told = "no noise" if epsilon is None else f"epsilon {epsilon:.0f}"
            yield f"{adapter}, {told}", load_experiment(default, overrides)


def measured(experiment: Experiment, folder: Path, number: int) -> dict[str, Any]:
    """One row: what the adapter reaches in the full model, and what it promises."""
    # What a simulation needs takes seconds to import.
    from proxymoe.simulations.session import quiet_metrics  # noqa: PLC0415

    summary = quiet_metrics(experiment, folder / str(number), folder / "cache")["summary"]
    return {
        **summary["mean"]["plugged"],
        "base": summary["mean"]["base"]["accuracy"],
        "trained_parameters": summary["trained_parameters"],
        "secure": summary["secure"],
        **summary["privacy"],
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for people."""
    found = Table("", "numbers", "accuracy", "loss", "epsilon", "noise z", "noise : signal")
    for row in rows:
        found.add_row(
            row["name"],
            f"{row['trained_parameters']:,}",
            f"{row['accuracy']:.3f}",
            f"{row['loss']:.3f}",
            "" if row["epsilon_spent"] is None else f"{row['epsilon_spent']:.2f}",
            f"{row['noise_multiplier']:.3g}",
            f"{row['noise_to_signal']:.3g}",
        )
    if rows:
        found.caption = f"Base model: {rows[0]['base']:.3f}. Noise : signal is at best; see docs."
    return found


if __name__ == "__main__":
    app()
