"""What a base model far larger than memory costs: index, profile, plan, proxy, merge, tuning.

A 7 B-shaped OLMoE with random weights is written in shards and goes through everything, each step
in a process of its own, whose memory is measured: `python -m proxymoe.simulations.bench_streaming
FOLDER`. It needs 45 GB of disk there, and for the last step as much memory as the model.
"""

import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from rich.console import Console
from rich.table import Table

from proxymoe.common.errors import ProxyMoEError
from proxymoe.common.files import write_json
from proxymoe.common.plan import Precision
from proxymoe.simulations import streaming_steps as steps
from proxymoe.simulations.large import Shape, write_olmoe

MB = 1e6
SPARE_MB = 2000.0
"""Memory that must be left for others while the full model is tuned."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False, width=120)


@app.command()
def bench(
    folder: Annotated[Path, typer.Argument(help="For 45 GB of files; made if it is not there.")],
    layers: Annotated[int, typer.Option(min=1)] = 16,
    experts: Annotated[int, typer.Option(min=8)] = 64,
    hidden: Annotated[int, typer.Option(min=128)] = 2048,
    inner: Annotated[int, typer.Option(min=32)] = 1024,
    tokens: Annotated[int, typer.Option(min=256, help="To profile.")] = 1024,
    threads: Annotated[int, typer.Option(min=1, help="Of profile and tuning.")] = 1,
    rows: Annotated[int, typer.Option(min=1, help="Of 128 tokens, in a tuning step.")] = 4,
    keep: Annotated[bool, typer.Option(help="Leave the files there for another run.")] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Where to write the numbers as JSON.")
    ] = None,
) -> None:
    """Writes the model, runs every step, and prints seconds, memory and the two ratios."""
    shape = Shape(layers, experts, hidden, inner)
    report: dict[str, Any] = {
        "shape": {name: getattr(shape, name) for name in shape.__dataclass_fields__},
        "profiled_tokens": tokens,
        "tuned_rows": rows,
        "threads": threads,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
    }
    try:
        write_olmoe(folder / "base", shape, np.random.default_rng(0))
        run_steps(folder, report, tokens, threads, rows)
    except ProxyMoEError as error:
        console.print(f"[red]error:[/] {error}", soft_wrap=True)
        raise typer.Exit(1) from error
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    console.print(table(report))
    for line in remarks(report):
        console.print(line)
    if json_path is not None:
        write_json(json_path, report)


def run_steps(folder: Path, report: dict[str, Any], tokens: int, threads: int, rows: int) -> None:
    """Every step in turn, each in a fresh process; what it measured goes into the report."""

    def step(name: str, work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        console.print(f"{name}: ", end="")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([steps.__name__])  # torch is imported once
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found = pool.submit(steps.measured, work, folder, threads, *arguments).result()
        report[name] = found
        console.print(f"{found['seconds']:.2f} s, peak {found['peak_mb']:.0f} MB")
        return found

    report["bytes"] = step("index", steps.index_base)["bytes"]
    step("index again", steps.index_base)
    step("profile", steps.profile_base, tokens)
    step("plan", steps.plan_proxy)
    for cache in ("warm", "cold"):
        step(f"materialise, {cache}", steps.materialise_proxy, cache)
    step("merge", steps.merge_base)
    models = {"full": "full", Precision.BF16.value: "proxy"}  # both as the checkpoint has them
    for experts in (Precision.INT8, Precision.INT4):
        models[experts.value] = f"proxy, {experts}"
        step(models[experts], steps.hold_proxy, experts.value)
    needed = report["bytes"] / MB + SPARE_MB
    if (free := psutil.virtual_memory().available / MB) < needed:
        report["skipped"] = f"needs {needed:.0f} MB of memory, {free:.0f} are free"
        del models["full"]
    else:
        step("full", steps.materialise_full)
    for again in (False, True):
        how = ", checkpointed" if again else ""
        found = {
            name: step(f"tune {folder}{how}", steps.tune_folder, folder, rows, again)
            for name, folder in models.items()
        }
        if "full" in found:
            report[f"ratios{how}"] = {
                experts.value: {
                    what: found["full"][what] / found[experts][what]
                    for what in ("peak_mb", "weights_mb")
                }
                for experts in Precision
            }


def table(report: dict[str, Any]) -> Table:
    """The steps for people."""
    title = f"{report['bytes'] / MB:.0f} MB of weights, {report['shape']}"
    shown = Table(
        "step", "seconds", "MB/s", "peak MB", "of it anonymous", "MB at start", title=title
    )
    for name, found in report.items():
        if isinstance(found, dict) and "peak_mb" in found:
            speed = found.get("mb_per_second")
            numbers = (found[key] for key in ("peak_mb", "peak_anonymous_mb", "before_mb"))
            shown.add_row(
                name,
                f"{found['seconds']:.2f}",
                "" if speed is None else f"{speed:.0f}",
                *(f"{number:.0f}" for number in numbers),
            )
    return shown


def remarks(report: dict[str, Any]) -> Iterator[str]:
    """What the issue asks of it, beside what was found."""
    layer = report["profile"]["layer_mb"]
    yield f"a decoder layer weighs {layer:.0f} MB; the aim is a peak below 1000 MB and one layer"
    yield f"plan from the profile: {report['plan']['seconds']:.3f} s, the aim is 1 s"
    for cache in ("warm", "cold"):
        found = report[f"materialise, {cache}"]
        speeds = f"{found['mb_per_second']:.0f} of {found['copy_mb_per_second']:.0f} MB/s"
        yield (
            f"proxy of {found['proxy_bytes'] / MB:.0f} MB, cache {cache}: {speeds}, "
            f"{found['copy_ratio']:.2f} of a plain copy's speed; the aim is 0.8"
        )
    for how in ("", ", checkpointed"):
        for experts, ratio in report.get(f"ratios{how}", {}).items():
            yield (
                f"tuning the full model{how} takes {ratio['peak_mb']:.2f} x the peak of the proxy "
                f"with experts in {experts} (weights {ratio['weights_mb']:.2f} x), the aim is 6.6"
            )
    if "skipped" in report:
        yield f"tuning the full model was not measured: it {report['skipped']}"


if __name__ == "__main__":
    app()
