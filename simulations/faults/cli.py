"""`python -m proxymoe.simulations.faults`: injects every fault and prints what became of it."""

import logging
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

from proxymoe.common.offline import go_offline

# Children are forked and do tiny sums, and cut connections are no news.
go_offline(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", GRPC_VERBOSITY="NONE")

import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.status import Status  # noqa: E402

from proxymoe.common.errors import ConfigError, ProxyMoEError  # noqa: E402
from proxymoe.common.files import write_json  # noqa: E402
from proxymoe.simulations.faults.children import start_forkserver  # noqa: E402

INTERRUPTED = 130

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def faults(
    only: Annotated[
        str | None, typer.Option(help="Part of a level's or a fault's name; the others rest.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Where to write the report as JSON.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is left to chance.")] = 0,
) -> None:
    """Kills, cuts, fills up and lies, checks what must hold after each fault, prints a table."""
    console = Console()
    try:
        sound = _run(only, json, seed, console)
    except ProxyMoEError as error:
        _fail(console, str(error))
    except OSError as error:
        _fail(console, f"{error.strerror}: {error.filename}")
    except KeyboardInterrupt:
        console.print("[yellow]interrupted[/]")
        raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(0 if sound else 1)


def _run(only: str | None, json: Path | None, seed: int, console: Console) -> bool:
    logging.disable(logging.WARNING)  # every refusal is one, and thousands are asked for
    start_forkserver()
    with console.status("importing"):
        # Importing torch takes seconds; a typing error on the line should not cost them.
        from proxymoe.simulations.faults.matrix import SCENARIOS  # noqa: PLC0415
        from proxymoe.simulations.faults.report import (  # noqa: PLC0415
            report_of,
            selected,
            suffer,
            table_of,
        )
    if not (chosen := selected(SCENARIOS, only)):
        known = sorted({scenario.level for scenario in SCENARIOS})
        raise ConfigError(f"--only {only!r} matches no fault; the levels are {known}")
    outcomes = []
    for scenario in chosen:
        title = f"{scenario.level}: {scenario.fault}"
        with console.status(title) as status:
            outcome = suffer(scenario, seed, partial(_show, status, title))
        outcomes.append(outcome)
        mark = "[green]ok[/]" if outcome.is_sound else "[red]broken[/]"
        console.print(f"{mark} {title}: {outcome.survived} of {outcome.injected}", highlight=False)
        for complaint in outcome.complaints:
            console.print(f"   {complaint}", style="red", highlight=False, markup=False)
    console.print(table_of(outcomes))
    if json is not None:
        write_json(json, report_of(outcomes, seed))
    return all(outcome.is_sound for outcome in outcomes)


def _show(status: Status, title: str, injected: int) -> None:
    status.update(f"{title}, {injected}")


def _fail(console: Console, message: str) -> NoReturn:
    console.print(f"[red]error:[/] {message}", highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def main() -> None:
    """Entry point of the command line."""
    app()
