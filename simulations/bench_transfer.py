"""Speed of the blob service on loopback, beside a plain copy of the same files in the same run.

Both leave every blob in a file of its own, synced with its folder. The service also encrypts, and
verifies every chunk and every blob. `python -m proxymoe.simulations.bench_transfer`.
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from rich.console import Console
from rich.table import Table

from proxymoe.client.fetch import fetch
from proxymoe.client.store import Store
from proxymoe.common.errors import ProxyMoEError
from proxymoe.common.files import sync_folder, write_json
from proxymoe.server.blobs import BlobPlace
from proxymoe.simulations.faults.transfer import SIZES, Server, Site
from proxymoe.simulations.loopback import Loopback, write_blobs

MB = 10**6
TARGET = 0.5
"""Of the copy's speed."""
ROOM = 10**12
INTERRUPTED = 130

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench(
    repetitions: Annotated[int, typer.Option(min=1, help="Of both, in turns.")] = 5,
    streams: Annotated[int, typer.Option(min=1, help="Blobs on their way at a time.")] = 4,
    json: Annotated[Path | None, typer.Option(help="Where to write the numbers as JSON.")] = None,
) -> None:
    """Fetches 204 MB of blobs and copies them, several times, and prints MB/s and the ratio."""
    console = Console()
    try:
        report = measure(repetitions, streams)
        if json is not None:
            write_json(json, report)
    except ProxyMoEError as error:
        console.print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except OSError as error:
        console.print(f"[red]error:[/] {error.strerror}: {error.filename}", highlight=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    console.print(_table(report))


def measure(repetitions: int, streams: int) -> dict[str, Any]:
    """MB/s and CPU seconds of every repetition, their medians, and the ratio of the medians."""
    runs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="proxymoe-bench-") as name:
        root = Path(name)
        (root / "source").mkdir()
        places = write_blobs(root / "source", SIZES, np.random.default_rng(0))
        site = Site(Loopback.new(), places)
        load = os.getloadavg()[0]
        with site.server() as server:
            for _ in range(repetitions):
                copied = _timed(root / "copy", lambda folder: copy(places, folder))
                fetched = _timed(
                    root / "store", lambda folder: bring(site, server, folder, streams)
                )
                runs.append(
                    {
                        "copy_mb_per_second": sum(SIZES) / MB / copied[0],
                        "fetch_mb_per_second": sum(SIZES) / MB / fetched[0],
                        "ratio": copied[0] / fetched[0],
                        "device_cpu_seconds": fetched[1],
                    }
                )
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return {
        "num_bytes": sum(SIZES),
        "streams": streams,
        "cores": psutil.cpu_count(),
        "load_before": load,
        "runs": runs,
        **medians,
        "ratio": medians["fetch_mb_per_second"] / medians["copy_mb_per_second"],
    }


def copy(places: Mapping[str, BlobPlace], folder: Path) -> None:
    """A plain copy of every blob's file, each made durable as the store makes its own."""
    folder.mkdir()
    for place in places.values():
        target = folder / place.path.name
        shutil.copyfile(place.path, target)
        with target.open("r+b") as file:
            os.fsync(file.fileno())
        sync_folder(folder)


def bring(site: Site, server: Server, folder: Path, streams: int) -> None:
    """The same blobs from the service, into a store."""
    store = Store(folder, ROOM)
    store.pin("plan", site.needs)
    connect = site.loopback.connector(server.port)
    fetch(site.needs.items(), store, connect, draw=lambda: 0.5, streams=streams)


def _timed(folder: Path, work: Callable[[Path], None]) -> tuple[float, float]:
    """Seconds, and CPU seconds of this process, that the work takes; its folder is removed."""
    before, started = time.process_time(), time.monotonic()
    work(folder)
    spent = time.monotonic() - started, time.process_time() - before
    shutil.rmtree(folder)
    return spent


def _table(report: dict[str, Any]) -> Table:
    cores, load = report["cores"], report["load_before"]
    size, streams = report["num_bytes"] / MB, report["streams"]
    table = Table(
        title=f"{size:.0f} MB over TLS on loopback, {streams} streams",
        caption=f"{cores} cores, load {load:.1f} before; the aim is a ratio of {TARGET}",
    )
    for heading in ("run", "copy MB/s", "fetch MB/s", "ratio", "device CPU s"):
        table.add_column(heading, justify="right")
    numbered = [(str(n), run) for n, run in enumerate(report["runs"], start=1)]
    for name, run in [*numbered, ("median", report)]:
        table.add_row(
            name,
            f"{run['copy_mb_per_second']:.0f}",
            f"{run['fetch_mb_per_second']:.0f}",
            f"{run['ratio']:.2f}",
            f"{run['device_cpu_seconds']:.2f}",
        )
    return table


if __name__ == "__main__":
    app()
