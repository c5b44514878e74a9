"""`proxymoe-simulate`: many devices on one machine, over the same code as a deployment."""

import logging
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

from proxymoe.common.offline import go_offline

# The workers have the cores; threads in a process would only spin.
go_offline(RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import tomli_w  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.logging import RichHandler  # noqa: E402

from proxymoe.common.errors import ConfigError, ProxyMoEError  # noqa: E402
from proxymoe.common.experiment import Experiment, load_experiment  # noqa: E402
from proxymoe.common.files import write_bytes  # noqa: E402
from proxymoe.simulations.forkserver import start_forkserver  # noqa: E402

EXPERIMENTS = Path(__file__).parent / "experiments"
CONFIG = "experiment.toml"
INTERRUPTED = 130

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Backend(StrEnum):
    """What carries messages to the virtual devices."""

    IN_PROCESS = "in-process"
    FLOWER = "flower"


@app.command()
def simulate(
    experiment: Annotated[
        Path, typer.Argument(help="Experiment file, or the name of a shipped one.")
    ] = Path("default"),
    backend: Annotated[
        Backend, typer.Option(help="Transport for the rounds.")
    ] = Backend.IN_PROCESS,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this run folder, such as runs/latest.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting."),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where runs and the cache are kept.")] = Path("runs"),
) -> None:
    """Profiles the base model, cuts a proxy submodel per device, federates, and measures."""
    console = Console()
    try:
        settings, folder = open_run(experiment, resume, tuple(overrides or ()), runs)
    except ProxyMoEError as error:
        _fail(console, error)
    _log_to(folder / "run.log", console)
    try:
        start_forkserver()
        # Importing torch takes seconds; a typing error in a file should not cost them.
        from proxymoe.simulations.session import run  # noqa: PLC0415

        run(settings, folder, runs / "cache", console, over_flower=backend is Backend.FLOWER)
    except ProxyMoEError as error:
        _fail(console, error)
    except OSError as error:
        # A full disk above all: whatever was being written has not replaced anything.
        _fail(
            console,
            ProxyMoEError(f"{error.strerror}: {error.filename or folder}; then --resume {folder}"),
        )
    except KeyboardInterrupt:
        console.print(f"[yellow]interrupted[/]; go on with --resume {folder}")
        raise typer.Exit(INTERRUPTED) from None


def main() -> None:
    """Entry point of the command line."""
    app()


def open_run(
    path: Path, resume: Path | None, overrides: tuple[str, ...], runs: Path
) -> tuple[Experiment, Path]:
    """The experiment and the folder of a new run, or of the one to go on with.

    Raises:
        ConfigError: no such file or run, or settings that make no experiment.
    """
    if resume is not None:
        if overrides:
            raise ConfigError("--set cannot change a run that has begun; start a new one")
        folder = resume.resolve()
        if not (folder / CONFIG).exists():
            raise ConfigError(f"{resume}: no {CONFIG} in it; is it a run folder?")
        return load_experiment(folder / CONFIG), folder
    shipped = EXPERIMENTS / f"{path}.toml"
    settings = load_experiment(
        path if path.exists() or not shipped.exists() else shipped, overrides
    )
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    folder = runs / f"{settings.name}-{stamp}"
    folder.mkdir(parents=True)
    resolved = settings.model_dump(mode="json", exclude_none=True)
    write_bytes(folder / CONFIG, tomli_w.dumps(resolved).encode())
    latest = runs / "latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to(folder.name)
    return settings, folder


def _log_to(path: Path, console: Console) -> None:
    to_file = logging.FileHandler(path)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    to_screen = RichHandler(logging.WARNING, console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.INFO, handlers=[to_file, to_screen])
    for noisy in ("alembic", "httpx", "matplotlib", "ray", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _fail(console: Console, error: ProxyMoEError) -> NoReturn:
    console.print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
    raise typer.Exit(1) from error


if __name__ == "__main__":
    main()
