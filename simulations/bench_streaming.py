"""What a base model far larger than memory costs: index, profile, plan, proxy, merge, tuning.

A 7 B-shaped OLMoE with random weights is written in shards and goes through everything, each step
in a process of its own, whose memory is measured: `python -m proxymoe.simulations.bench_streaming
FOLDER`. It needs 45 GB of disk there, and for the last step as much memory as the model.
"""

import multiprocessing
import os
import re
import shutil
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table

from proxymoe.client.train import tune
from proxymoe.common.adapter import adapter_layout
from proxymoe.common.checkpoint import WEIGHTS
from proxymoe.common.config import Allocation, ExtractSettings, TrainSettings
from proxymoe.common.errors import ProxyMoEError
from proxymoe.common.files import write_json
from proxymoe.common.measure import peak_rss_mb
from proxymoe.common.model import load
from proxymoe.common.plan import Plan
from proxymoe.common.text import Example, read_rows, tokenise
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.extract import extract
from proxymoe.server.merge import merge
from proxymoe.server.profile import load_profile, profile_domain, save_domain
from proxymoe.server.streamed import Streamed
from proxymoe.simulations.large import Shape, write_olmoe
from proxymoe.simulations.site import ASSETS

MB = 1e6
DOMAIN = "code"
KEPT = 0.125
REPETITIONS = 3
ROW_TOKENS, TUNED_STEPS, RANK = 128, 2, 16
SAMPLE_SECONDS = 0.02
SPARE_MB = 2000.0
"""Memory that must be left for others while the full model is tuned."""
CHUNK_BYTES = 1 << 24

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
        "threads": threads,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
    }
    try:
        write_olmoe(folder / "base", shape, np.random.default_rng(0))
        run_steps(folder, report, tokens, threads)
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


def run_steps(folder: Path, report: dict[str, Any], tokens: int, threads: int) -> None:
    """Every step in turn, each in a fresh process; what it measured goes into the report."""

    def step(name: str, work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        console.print(f"{name} ...")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found = pool.submit(measured, work, folder, threads, *arguments).result()
        report[name] = found
        return found

    report["bytes"] = step("index", index_base)["bytes"]
    step("index again", index_base)
    step("profile", profile_base, tokens)
    step("plan", plan_proxy)
    for cache in ("warm", "cold"):
        step(f"materialise, {cache}", materialise_proxy, cache)
    step("merge", merge_base)
    proxy = step("tune proxy", tune_folder, "proxy")
    needed = report["bytes"] / MB + SPARE_MB
    if (free := psutil.virtual_memory().available / MB) < needed:
        report["tune full"] = {"skipped": f"needs {needed:.0f} MB of memory, {free:.0f} are free"}
        return
    step("full model", materialise_full)
    full = step("tune full", tune_folder, "full")
    report["memory_ratio"] = full["peak_mb"] / proxy["peak_mb"]
    report["weights_ratio"] = full["weights_mb"] / proxy["weights_mb"]


def measured(
    work: Callable[..., dict[str, Any]], folder: Path, threads: int, *arguments: Any
) -> dict[str, Any]:
    """What a step says, with its seconds and its peak memory, whole and without file pages."""
    torch.set_num_threads(threads)
    before, started = peak_rss_mb(), time.monotonic()
    with anonymous_peak() as anonymous:
        found = work(folder, *arguments)
        seconds = time.monotonic() - started
    return {
        "seconds": seconds,
        "before_mb": before,
        "peak_mb": peak_rss_mb(),
        "peak_anonymous_mb": anonymous[0],
    } | found


def index_base(folder: Path) -> dict[str, Any]:
    """Reads and digests every byte, or finds the index in the cache."""
    return {"bytes": BaseCheckpoint(folder / "base", folder / "cache").num_bytes}


def profile_base(folder: Path, tokens: int) -> dict[str, Any]:
    """Profiles one domain a layer at a time."""
    base = _base(folder)
    streamed = Streamed(base, torch.bfloat16)
    rows = read_rows(ASSETS / "calibration" / f"{DOMAIN}.jsonl")
    examples = tokenise(rows, streamed.loaded.tokenizer, 256).examples
    started = time.monotonic()
    found, seen = profile_domain(streamed.loaded, examples, tokens, read=streamed.read)
    seconds = time.monotonic() - started
    save_domain(folder / "profile" / f"{DOMAIN}.safetensors", base.digest, found, seen)
    return {"seconds": seconds, "tokens": seen, "layer_mb": _layer_bytes(base) / MB}


def plan_proxy(folder: Path) -> dict[str, Any]:
    """Plans the proxy from the profile on disk; only that is timed."""
    base = _base(folder)
    settings = ExtractSettings(kept_fraction=KEPT, allocation=Allocation.UNIFORM)
    started = time.monotonic()
    profile = load_profile(folder / "profile", base.digest)
    plan = extract(base, profile, profile.uniform(), settings, np.random.default_rng(0)).plan
    seconds = time.monotonic() - started
    (folder / "plan.json").write_text(plan.model_dump_json())
    return {"seconds": seconds, "kept_fraction": plan.kept_fraction}


def materialise_proxy(folder: Path, cache: str) -> dict[str, Any]:
    """Writes the proxy, and copies its file, in turns; both from the same state of the cache."""
    base = _base(folder)
    plan = Plan.model_validate_json((folder / "plan.json").read_bytes())
    proxy, copied = folder / "proxy", folder / "copied"
    base.materialise(plan, proxy)
    ranges = base.checkpoint.ranges
    sources = {base.folder / ranges[piece.source].file for piece in base.manifest(plan).pieces}
    again, runs = folder / "again", []
    for _ in range(REPETITIONS):
        _settle(cache, [proxy / WEIGHTS])
        copying = _timed(lambda: copy_file(proxy / WEIGHTS, copied))
        copied.unlink()
        _settle(cache, sources)
        making = _timed(lambda: base.materialise(plan, again))
        shutil.rmtree(again)
        runs.append((copying, making))
    size = (proxy / WEIGHTS).stat().st_size
    copying, making = (statistics.median(column) for column in zip(*runs, strict=True))
    return {
        "seconds": making,
        "mb_per_second": size / MB / making,
        "copy_mb_per_second": size / MB / copying,
        "copy_ratio": copying / making,
        "runs": runs,
        "proxy_bytes": size,
    }


def merge_base(folder: Path) -> dict[str, Any]:
    """Merges an adapter on attention and all experts into the full model; removes the result."""
    base = _base(folder)
    layout = adapter_layout(base.skeleton, ("attention", "experts"), RANK, 0)
    vector = 1e-3 * torch.randn(layout.size, generator=torch.Generator().manual_seed(0))
    started = time.monotonic()
    merge(base, layout, vector, folder / "merged")
    seconds = time.monotonic() - started
    shutil.rmtree(folder / "merged")
    return {"seconds": seconds, "mb_per_second": base.num_bytes / MB / seconds}


def materialise_full(folder: Path) -> dict[str, Any]:
    """Writes the full model in its fused form, to be mapped."""
    base = _base(folder)
    base.materialise(base.keep_all(), folder / "full")
    return {}


def tune_folder(folder: Path, name: str) -> dict[str, Any]:
    """Tunes an attention adapter, the same for both models, for two steps of 1 x 128 tokens."""
    loaded = load(folder / name)
    layout = adapter_layout(loaded.model, ("attention",), RANK, 0)
    settings = TrainSettings(steps=TUNED_STEPS, batch_size=1)
    rng = np.random.default_rng(0)
    row = rng.integers(4, 4000, ROW_TOKENS).tolist()
    started = time.monotonic()
    tune(loaded, layout, layout.zeros(), [Example(tuple(row), 1)], settings, rng)
    return {
        "seconds": time.monotonic() - started,
        "weights_mb": (folder / name / WEIGHTS).stat().st_size / MB,
        "adapter_numbers": layout.size,
    }


def copy_file(source: Path, target: Path) -> None:
    """A plain copy, made durable as everything that we write."""
    shutil.copyfile(source, target)
    with target.open("r+b") as file:
        os.fsync(file.fileno())


@contextmanager
def anonymous_peak() -> Iterator[list[float]]:
    """Yields [peak MB of memory that is no file's] of this process; it grows within the block."""
    peak, stop = [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    peak[0] = max(peak[0], int(line.split()[1]) * 1024 / MB)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _settle(cache: str, files: Iterable[Path]) -> None:
    """Brings these files into the system's cache, or drops them from it."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            if cache == "cold":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                continue
            while file.read(CHUNK_BYTES):
                pass


def _timed(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def _base(folder: Path) -> BaseCheckpoint:
    """The base model; its index comes from the cache."""
    return BaseCheckpoint(folder / "base", folder / "cache")


def _layer_bytes(base: BaseCheckpoint) -> int:
    """Bytes of the largest decoder layer."""
    sizes: Counter[str] = Counter()
    for piece in base.pieces:
        if found := re.match(r"model\.layers\.(\d+)\.", piece.target):
            sizes[found.group(1)] += piece.num_bytes
    return max(sizes.values())


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
    if "memory_ratio" in report:
        yield (
            f"tuning the full model takes {report['memory_ratio']:.2f} x the proxy's peak (weights "
            f"{report['weights_ratio']:.2f} x), the aim is 6.6"
        )
    else:
        yield f"tuning the full model was not measured: it {report['tune full']['skipped']}"


if __name__ == "__main__":
    app()
