"""How the command line speaks: one console, and a mistake as one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console

from proxymoe.common.errors import ProxyMoEError
from proxymoe.server.run_directory import RunDirectory

INTERRUPTED = 130

console = Console(soft_wrap=True, highlight=False)


def run_at(directory: Path) -> RunDirectory:
    """A run directory that exists; ConfigError otherwise, before anything is written in it."""
    run = RunDirectory(directory.absolute())
    _ = run.settings
    return run


@contextmanager
def told() -> Iterator[None]:
    """A user's mistake ends in one line and exit code 1, an interrupt in INTERRUPTED."""
    try:
        yield
    except ProxyMoEError as error:
        console.print(f"[red]error:[/] {error}", markup=True)
        raise typer.Exit(1) from None
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        console.print(f"[red]error:[/] {error.strerror or error}{where}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("[yellow]interrupted[/]")
        raise typer.Exit(INTERRUPTED) from None
