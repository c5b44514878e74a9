"""What masks cost where devices hold different experts, and what templates and cohorts win back.

Ten devices federate an adapter of attention, shared and routed experts: with full models, with
plans of their own, with templates; summed in the clear and under masks that skip blocks with few
holders; in cohorts as a deck has them, and by coverage.
`python -m proxymoe.simulations.bench_templates`.
"""

import itertools
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

TRAINED = (
    'adapter.targets=["attention", "shared", "experts"]',
    "federation.server_learning_rate=0.02",
    "personal.steps=0",
    "evaluate.proxies=false",
)
"""Fewer rounds of more devices than the default's, so that blocks have holders; the server's step
is larger in return."""
FULL = "full models"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False, width=120)


@app.command()
def bench(
    rounds: Annotated[int, typer.Option(min=1)] = 60,
    cohort: Annotated[int, typer.Option(min=1, max=10, help="Devices per round, of ten.")] = 5,
    templates: Annotated[
        list[int] | None, typer.Option(min=0, help="Sizes of catalogues; 0: own plans.")
    ] = None,
    smallest: Annotated[
        list[int] | None, typer.Option(min=1, help="Fewest holders of a block that is summed.")
    ] = None,
    clear: Annotated[
        bool, typer.Option("--clear", help="Sum in the clear where there may be masks, too.")
    ] = False,
    cohorts: Annotated[
        list[str] | None, typer.Option(help="Who is asked together: deck, covering.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1)] = 2,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting of them all."),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Of models; kept for the next time.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Where to write the table as JSON.")
    ] = None,
) -> None:
    """Runs federations that differ in plans, masks and cohorts, and tabulates what they reach."""
    start_forkserver()
    length = (f"federation.rounds={rounds}", f"federation.cohort_size={cohort}")
    shared = (*TRAINED, *length, f"workers={workers}", *(overrides or []))
    chosen = (templates or [0, 4], smallest or [1, 2, 3, 4], cohorts or ["deck"])
    rows: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory(prefix="proxymoe-templates-") as folder:
            for about, experiment in variants(shared, *chosen, clear=clear):
                run = Path(folder) / str(len(rows))
                rows.append(about | measured(experiment, run, cache or Path(folder) / "cache"))
                console.print(f"{' '.join(map(str, about.values()))}: {rows[-1]['accuracy']:.3f}")
    except ProxyMoEError as error:
        console.print(f"[red]error:[/] {error}")
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.print("[yellow]interrupted[/]; these are done:")
    console.print(table(rows))
    if json_path is not None:
        write_json(json_path, {"settings": list(shared), "table": rows})


def variants(
    shared: tuple[str, ...],
    templates: list[int],
    smallest: list[int],
    cohorts: list[str],
    *,
    clear: bool,
) -> Iterator[tuple[dict[str, Any], Experiment]]:
    """Every federation, with what is told about it: full models first."""
    default = EXPERIMENTS / "default.toml"
    about: dict[str, Any] = {"plans": FULL, "masked": False, "smallest_class": 1, "cohorts": "deck"}
    yield about, load_experiment(default, (*shared, "extract.kept_fraction=1.0"))
    for count, least, rule in itertools.product(templates, smallest, cohorts):
        for masked in (False, True):
            if (masked and least == 1) or (not masked and least > 1 and not clear):
                continue
            plans = f"of {count} templates" if count else "their own"
            about = {"plans": plans, "masked": masked, "smallest_class": least, "cohorts": rule}
            masks = ("secure=true", f"smallest_sum={least}")
            sums = masks if masked else (f"federation.fewest_holders={least}",)
            own = (f"extract.templates={count}", f"federation.cohorts={rule}")
            yield about, load_experiment(default, (*shared, *sums, *own))


def measured(experiment: Experiment, folder: Path, cache: Path) -> dict[str, Any]:
    """One row: what the adapter reaches in the full model, and what was not summed for it."""
    # What a simulation needs takes seconds to import.
    from proxymoe.simulations.session import quiet_metrics  # noqa: PLC0415

    found = quiet_metrics(experiment, folder, cache)
    summary, skipped = found["summary"], [each["skipped_blocks"] for each in found["rounds"]]
    return {
        **summary["mean"]["plugged"],
        "base": summary["mean"]["base"]["accuracy"],
        "skipped_blocks": sum(skipped) / len(skipped),
        "coverage": summary["coverage"],
        "trained_parameters": summary["trained_parameters"],
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for people; the gain is that of full models."""
    found = Table(
        "plans", "sum", "holders", "cohorts", "accuracy", "loss", "gain", "skipped", "never"
    )
    for title in ("rarely", "energy", "in vain"):
        found.add_column(title)
    for row in rows:
        coverage, least = row["coverage"], row["smallest_class"]
        never = coverage["unheld"], coverage["never"]
        found.add_row(
            row["plans"],
            "masked" if row["masked"] else "clear",
            str(least),
            row["cohorts"],
            f"{row['accuracy']:.3f}",
            f"{row['loss']:.3f}",
            f"{gain(row, rows[0]):.0%}",
            f"{row['skipped_blocks']:.0f}",
            " + ".join(str(part["blocks"]) for part in never),
            str(coverage["rarely"]["blocks"]),
            f"{sum(part['energy'] for part in never):.1%}",
            f"{coverage['wasted']:.1%}",
        )
    if rows:
        found.caption = (
            f"Of {rows[0]['coverage']['total']['blocks']} blocks: skipped in a round; never summed "
            "(nobody's + with too few holders), and the experts' energy in those; rarely summed. "
            "In vain: share of what devices train that is in no sum. Base model: "
            f"{rows[0]['base']:.3f}."
        )
    return found


def gain(row: dict[str, Any], full: dict[str, Any]) -> float:
    """The share of the accuracy that full models gain."""
    won = full["accuracy"] - full["base"]
    return float((row["accuracy"] - row["base"]) / won) if won else 0.0


if __name__ == "__main__":
    app()
