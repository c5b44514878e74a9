"""`proxymoe-device`: what the owner of a device says to it."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

from proxymoe.common.offline import go_offline

go_offline()

import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from proxymoe.client.advise import advise as advise_owner  # noqa: E402
from proxymoe.client.home import Home  # noqa: E402
from proxymoe.client.policy import MB  # noqa: E402
from proxymoe.client.prepare import Wish, prepare  # noqa: E402
from proxymoe.client.service import HOME, start  # noqa: E402
from proxymoe.client.status import status_of  # noqa: E402
from proxymoe.client.tables import (  # noqa: E402
    advice_fields,
    advice_lines,
    mb,
    months_table,
    print_status,
    record_fields,
    sent_table,
)
from proxymoe.common.errors import ProxyMoEError  # noqa: E402

INTERRUPTED = 130
STDIN = "-"

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(soft_wrap=True, highlight=False)

HomeFolder = Annotated[
    Path,
    typer.Option("--home", envvar=HOME, help="Folder with everything of this device."),
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
DEFAULT = Path("~/.proxymoe")


@app.command()
def enrol(
    token: Annotated[str, typer.Argument(help="From the coordinator; - reads it from stdin.")],
    home: HomeFolder = DEFAULT,
) -> None:
    """Makes this device known to a coordinator, and writes the policy file for its owner."""
    from proxymoe.client.enrol import enrol as enrol_device  # noqa: PLC0415  it takes seconds

    with _errors():
        place = _home(home)
        record = enrol_device(place, sys.stdin.read() if token == STDIN else token, time.time())
        console.print(f"[green]{record.device}[/] is enrolled at {record.coordinator}.")
        console.print(
            f"What it may do stands in {place.policy_file}: name at least your data there, as "
            "data.folder; then `proxymoe-device join`.",
            markup=False,
        )


@app.command()
def join(
    domain: Annotated[
        str | None, typer.Option(help="Public domain that is most like your data.")
    ] = None,
    mixture: Annotated[
        bool, typer.Option("--mixture", help="Describe your data as a noised mixture of domains.")
    ] = False,
    budget_mb: Annotated[
        int | None, typer.Option(min=1, help="Most MB of model weights to hold.")
    ] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Ask for a plan although there is one.")
    ] = False,
    once: Annotated[
        bool, typer.Option("--once", help="Leave after the last round of the assignment.")
    ] = False,
    home: HomeFolder = DEFAULT,
) -> None:
    """Takes part in rounds until it is stopped: applies for a proxy, fetches it, and stands by."""
    with _errors():
        if domain is not None and mixture:
            raise ProxyMoEError("--domain names one domain, --mixture finds several; choose one")
        budget = None if budget_mb is None else budget_mb * MB
        place, wish = _home(home), Wish(domain, mixture, budget, refresh)
        with _progress(DownloadColumn()) as progress:
            bar = progress.add_task("proxy submodel", total=None)

            def fetched(num_bytes: int, total: int) -> None:
                progress.update(bar, completed=num_bytes, total=total)

            assignment = prepare(place, wish, _tell, fetched)
        size = mb(assignment.model_bytes)
        console.print(f"run {assignment.run}: proxy submodel of {size} is in place", markup=False)
        start(place, once=once)


@app.command()
def personalize(
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=1e-9, max=1e6)] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    export: Annotated[
        Path | None, typer.Option(help="Also write it as a PEFT folder for the full model.")
    ] = None,
    base_name: Annotated[
        str | None, typer.Option(help="Where that folder's user finds the full model.")
    ] = None,
    home: HomeFolder = DEFAULT,
) -> None:
    """Tunes an adapter on your data that never leaves this device."""
    with _errors():
        place = _home(home)
        place.enrolled()
        # Importing torch takes seconds; a typing error should not cost them.
        from proxymoe.client import local  # noqa: PLC0415

        local.assigned(place)
        with _progress(MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}")) as progress:
            bar = progress.add_task("training", total=None, loss="…")

            def done(step: int, total: int, loss: float) -> None:
                progress.update(bar, completed=step, total=total, loss=f"{loss:.3f}")

            found = local.personalize(place, steps, learning_rate, seed, done)
        origin = "nothing" if found.round is None else f"the adapter of round {found.round}"
        what = f"on {found.num_held_out} held-out examples" if found.num_held_out else "in training"
        console.print(f"Tuned on {found.num_examples} examples, starting from {origin}.")
        console.print(f"Loss {what}: {found.before:.3f} before, {found.after:.3f} after.")
        console.print(f"Kept in {place.personal_adapter}; it is never sent.", markup=False)
        if export is not None:
            folder = local.export(place, export.expanduser(), base_name)
            console.print(f"Written for PEFT: {folder}", markup=False)


@app.command()
def advise(home: HomeFolder = DEFAULT, as_json: AsJson = False) -> None:
    """Tells how well the proxy here suits your data, and what would suit it better.

    It is found out on this device, and stays here.
    """
    with _errors():
        found = advise_owner(_home(home))
        if as_json:
            typer.echo(json.dumps(advice_fields(found), indent=1))
            return
        console.print(*advice_lines(found), sep="\n", markup=False)


@app.command()
def status(home: HomeFolder = DEFAULT, as_json: AsJson = False) -> None:
    """Shows who this device is, whether it may work now, and what has been used up."""
    with _errors():
        found = status_of(_home(home), time.time())
        if as_json:
            typer.echo(json.dumps(found, indent=1))
            return
        print_status(console, found)


@app.command()
def sent(
    limit: Annotated[int, typer.Option(min=1, help="How many, the newest first.")] = 20,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check that nothing was changed or taken out.")
    ] = False,
    home: HomeFolder = DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Lists what ever left this device, and the totals of each month."""
    with _errors():
        ledger = _home(home).ledger()
        head = ledger.verify() if verify else None
        records, months = ledger.newest(limit), ledger.monthly()
        if as_json:
            everything = {
                "entries": [record_fields(record) for record in records],
                "months": {month: asdict(totals) for month, totals in months.items()},
                "head": asdict(head) if head else None,
            }
            typer.echo(json.dumps(everything, indent=1))
            return
        console.print(sent_table(records), months_table(months), sep="\n")
        if head is not None:
            console.print(f"The chain of {head.number} rows is whole; its head is {head.hash}")


@app.command()
def wipe(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: HomeFolder = DEFAULT,
) -> None:
    """Removes everything of this device: keys, models, adapters, the policy and the ledger."""
    with _errors():
        place = _home(home)
        if not yes:
            typer.confirm(f"Remove all of {place.path}, its ledger and its keys?", abort=True)
        totals = place.ledger().totals() if place.ledger_file.exists() else None
        place.wipe()
        console.print(f"Removed {place.path}. Your own data was not touched.", markup=False)
        if totals and totals.num_entries:
            console.print(
                f"What was sent stays sent: {totals.num_entries} messages, "
                f"{mb(totals.sent_bytes)}. Updates are part of the adapters of their rounds; ask "
                "the coordinator to revoke this device."
            )


def main() -> None:
    """Entry point of the command line."""
    app()


def _home(folder: Path) -> Home:
    return Home(folder.expanduser().absolute())


def _progress(*columns: Any) -> Progress:
    parts = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
    return Progress(*parts, console=console, disable=not console.is_terminal)


def _tell(text: str) -> None:
    console.print(f"[yellow]waiting:[/] {text}")


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Turns what a user can cause or cure into one line and an exit code."""
    try:
        yield
    except ProxyMoEError as error:
        _fail(str(error), error)
    except OSError as error:
        _fail(f"{error.strerror}: {error.filename or 'this device'}", error)
    except KeyboardInterrupt:
        console.print("[yellow]interrupted[/]; the same command goes on")
        raise typer.Exit(INTERRUPTED) from None


def _fail(reason: str, error: Exception) -> NoReturn:
    console.print("[red]error:[/] ", end="")
    console.print(reason, markup=False)
    raise typer.Exit(1) from error


if __name__ == "__main__":
    main()
