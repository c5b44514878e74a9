"""`proxymoe-coordinator`: the service that federates a base model over enrolled devices."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated

from proxymoe.common.offline import go_offline

go_offline()

import typer  # noqa: E402
from rich.progress import Progress, TaskID  # noqa: E402

from proxymoe.common.errors import ConfigError  # noqa: E402
from proxymoe.common.keys_at_rest import PASSPHRASE_FILE, passphrase  # noqa: E402
from proxymoe.common.tickets import new_token, secret_digest  # noqa: E402
from proxymoe.server import tables  # noqa: E402
from proxymoe.server.begin import settings_of  # noqa: E402
from proxymoe.server.devices import Devices  # noqa: E402
from proxymoe.server.flower import SuperLink  # noqa: E402
from proxymoe.server.lock import is_held  # noqa: E402
from proxymoe.server.plan_verb import plan  # noqa: E402
from proxymoe.server.run_directory import RunDirectory  # noqa: E402
from proxymoe.server.serve import supervised  # noqa: E402
from proxymoe.server.status import rounds, serve_lock, status  # noqa: E402
from proxymoe.server.told import console  # noqa: E402
from proxymoe.server.told import run_at as _run  # noqa: E402
from proxymoe.server.told import told as _told  # noqa: E402
from proxymoe.server.upcycle_cli import upcycle  # noqa: E402

HOUR = 3600.0

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(plan)

Directory = Annotated[Path, typer.Argument(metavar="D", help="The run directory.")]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")]
OfVersion = Annotated[
    int | None, typer.Option("--version", help="A committed version; the current one if not given.")
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command()
def init(
    directory: Directory,
    base_model: Annotated[Path | None, typer.Option(help="Folder of the base model.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Folder of public <domain>.jsonl files.")
    ] = None,
    run_name: Annotated[str | None, typer.Option("--name", help="Name of the run.")] = None,
    host_name: Annotated[
        list[str] | None,
        typer.Option(help="Name or address that devices connect to; may be repeated."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Start from these settings, or from an experiment's.")
    ] = None,
) -> None:
    """Makes a run directory: keys, certificates of a local CA, and settings to be edited."""
    with _told():
        settings = settings_of(config, base_model, calibration, run_name, tuple(host_name or ()))
        run = RunDirectory.create(directory, settings, time.time())
        console.print(f"{run.path}: made. Settings are in {run.settings_file}; then `serve` it.")


@app.command()
def profile(directory: Directory) -> None:
    """Runs public text through the full model, once per base model; `serve` would do it, too."""
    with _told():
        run = _run(directory)
        # Importing torch takes seconds; a typing error should not cost them.
        from proxymoe.server.prepare import prepare  # noqa: PLC0415

        with Progress(console=console) as bar:
            tasks: dict[str, TaskID] = {}

            def stage(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what)
                bar.update(tasks[what], completed=done, total=total)
                if not console.is_terminal:
                    console.print(f"{what}: {done} of {total}")

            prepare(run, stage)
        console.print(f"{run.cache}: everything that follows from the base model is there")


@app.command()
def serve(directory: Directory) -> None:
    """Runs the coordinator until SIGTERM or Ctrl-C. What dies is started again."""
    with _told():
        run = _run(directory)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        _ = run.authority, run.signing_key  # who has no passphrase hears of it here, and once
        with supervised(run) as supervisor:
            console.print(*tables.listens(run), sep="\n")
            supervisor.run()


@app.command()
def seal(
    directory: Directory,
    new: Annotated[
        Path | None, typer.Option("--new", help="File with the new passphrase; else it is asked.")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="No passphrase any more.")] = False,
) -> None:
    """Seals keys with a passphrase; the one so far is in the file $PROXYMOE_PASSPHRASE_FILE."""
    with _told():
        run, words = _run(directory), None
        if new is not None:
            words = passphrase({PASSPHRASE_FILE: str(new)})
        elif not remove:
            words = typer.prompt("New passphrase", hide_input=True, confirmation_prompt=True)
        run.reseal(passphrase(), words)
        told = "are not sealed any more" if words is None else "are sealed with the new passphrase"
        console.print(f"{run.ca_key.name} and {run.signing_key_file.name} {told}")


@app.command()
def enrol(
    directory: Directory,
    device: Annotated[str, typer.Argument(metavar="NAME", help="What the device is called.")],
    hours: Annotated[float, typer.Option(min=0.01, help="How long the token may be used.")] = 24.0,
) -> None:
    """Prints a token by which one device may enrol, once."""
    with _told(), _devices(directory) as (run, devices):
        expires = time.time() + hours * HOUR
        token = new_token(
            run.settings.network.gateway_address, run.authority_certificate, device, expires
        )
        devices.invite(device, secret_digest(token.secret), token.expires)
        typer.echo(token.text)  # as it is: it goes into a file or through a pipe


@app.command(name="devices")
def list_devices(
    directory: Directory,
    as_json: AsJson = False,
    together: Annotated[bool, typer.Option(help="Say what they can train together.")] = False,
) -> None:
    """Lists every device that was ever invited."""
    with _told(), _devices(directory) as (run, devices):
        entries = devices.entries()
        if together:
            from proxymoe.server.planner import Planner  # noqa: PLC0415  imports torch

            typer.echo(str(Planner(run).coverage()), err=as_json)
        if as_json:
            typer.echo(json.dumps([tables.device_fields(entry) for entry in entries], indent=1))
        else:
            console.print(tables.device_table(entries))


@app.command()
def revoke(
    directory: Directory,
    device: Annotated[str, typer.Argument(metavar="NAME")],
) -> None:
    """Shuts a device out, at once and for good; its name may enrol again with another key."""
    with _told(), _devices(directory) as (run, devices):
        nodes = devices.revoke(device)
        console.print(f"{device}: revoked; gateway and blob service refuse it from now on")
        if not is_held(serve_lock(run)):
            return
        for node in nodes:
            try:
                SuperLink(run).unregister(node)
            except OSError as error:
                console.print(f"[yellow]Flower still lists its node[/], without harm: {error}")


@app.command()
def runs(directory: Directory, as_json: AsJson = False) -> None:
    """Lists rounds and versions."""
    with _told():
        found = rounds(_run(directory))
        if as_json:
            typer.echo(json.dumps(found.as_json(), indent=1))
        else:
            console.print(tables.round_table(found))
            console.print(tables.version_table(found))


@app.command(name="status")
def show_status(directory: Directory, as_json: AsJson = False) -> None:
    """Says how things stand, also when the service is down."""
    with _told():
        found = status(_run(directory))
        if as_json:
            typer.echo(json.dumps(found.as_json(), indent=1))
        else:
            console.print(tables.status_table(found))


@app.command()
def privacy(
    directory: Directory,
    epsilon: Annotated[
        list[float] | None,
        typer.Option(help="What to promise, in place of [privacy]; may be repeated."),
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Goes with --epsilon.")] = None,
    cohort: Annotated[
        int | None, typer.Option("--devices", min=1, help="With so many devices in each round.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Says what differential privacy would promise and cost, before a run."""
    with _told():
        from proxymoe.server.planner import Planner  # noqa: PLC0415  imports torch
        from proxymoe.server.promise import promised, smaller, thought_about  # noqa: PLC0415

        run = _run(directory)
        planner = Planner(run)
        others, members = smaller(run.settings, planner.base), planner.members()
        found = [
            promised(run.settings, each, planner.layout, members, others, cohort)
            for each in thought_about(run.settings.privacy, epsilon or [], delta)
        ]
        if as_json:
            typer.echo(json.dumps([tables.price_fields(each) for each in found], indent=1))
            return
        console.print(tables.price_table(found))
        for line in tables.advice(found, planner.layout.size):
            console.print(line)


@app.command()
def rollback(
    directory: Directory,
    version: Annotated[int, typer.Argument(help="A committed version; 0 is before the first.")],
) -> None:
    """Makes an older version the current one; the next round starts from it."""
    with _told():
        from proxymoe.server.rollback import roll_back  # noqa: PLC0415  imports torch

        roll_back(_run(directory), version, time.time())
        console.print(f"version {version} is current; the next round starts from it")


@app.command()
def merge(directory: Directory, target: Target, version: OfVersion = None) -> None:
    """Writes the base model with the adapter of a version merged into its weights."""
    with _told():
        from proxymoe.server.merge import merge as merge_into  # noqa: PLC0415  imports torch
        from proxymoe.server.planner import Planner  # noqa: PLC0415
        from proxymoe.server.rollback import adapter_of  # noqa: PLC0415

        run = _run(directory)
        number, vector = adapter_of(run, version)
        planner = Planner(run)
        with Progress(console=console) as bar:
            task = bar.add_task(f"merge version {number}", total=None)
            merge_into(
                planner.base,
                planner.layout,
                vector,
                target,
                lambda done, total: bar.update(task, completed=done, total=total),
            )
        console.print(f"{target}: base model with version {number}")


@app.command()
def export(directory: Directory, target: Target, version: OfVersion = None) -> None:
    """Writes the adapter of a version as a PEFT folder for the full base model."""
    with _told():
        from proxymoe.common.peft_format import export_peft  # noqa: PLC0415  imports torch
        from proxymoe.server.planner import Planner  # noqa: PLC0415
        from proxymoe.server.rollback import adapter_of  # noqa: PLC0415

        run = _run(directory)
        if target.exists():
            raise ConfigError(f"{target} exists; export into a new folder")
        number, vector = adapter_of(run, version)
        export_peft(Planner(run).layout, vector, target, str(run.base_model))
        console.print(f"{target}: PEFT adapter of version {number}")


def main() -> None:
    """Entry point of the command line."""
    app()


@contextmanager
def _devices(directory: Path) -> Iterator[tuple[RunDirectory, Devices]]:
    run = _run(directory)
    with closing(Devices(run.devices_db)) as devices:
        yield run, devices


app.command()(_told()(upcycle))

if __name__ == "__main__":
    main()
