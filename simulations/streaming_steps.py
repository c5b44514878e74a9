"""The steps that a large base model goes through, each to be run and measured in its own process.

Every step takes the bench's folder first, and returns numbers for its report.
"""

import os
import re
import shutil
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from proxymoe.client.train import tune
from proxymoe.common.adapter import adapter_layout
from proxymoe.common.checkpoint import WEIGHTS
from proxymoe.common.config import Allocation, ExtractSettings, TrainSettings
from proxymoe.common.measure import peak_rss_mb
from proxymoe.common.model import load
from proxymoe.common.plan import Plan, Precision
from proxymoe.common.text import Example, read_rows, tokenise
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.extract import extract
from proxymoe.server.merge import merge
from proxymoe.server.profile import load_profile, profile_domain, save_domain
from proxymoe.server.streamed import Streamed
from proxymoe.simulations.site import ASSETS

MB = 1e6
DOMAIN = "code"
KEPT = 0.125
REPETITIONS = 3
ROW_TOKENS, TUNED_STEPS, RANK = 128, 2, 16
SAMPLE_SECONDS = 0.02
CHUNK_BYTES = 1 << 24


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


def hold_proxy(folder: Path, experts: str) -> dict[str, Any]:
    """Writes the proxy with its experts in another precision."""
    plan = Plan.model_validate_json((folder / "plan.json").read_bytes())
    held = plan.model_copy(update={"experts": Precision(experts)})
    _base(folder).materialise(held, folder / f"proxy, {experts}")
    return {}


def tune_folder(folder: Path, name: str, rows: int, again: bool) -> dict[str, Any]:
    """Tunes an attention adapter, the same for all models, for two steps of `rows` x 128 tokens.

    With `again`, activations are computed again in the backward pass.
    """
    loaded = load(folder / name, torch.bfloat16)
    layout = adapter_layout(loaded.model, ("attention",), RANK, 0)
    settings = TrainSettings(steps=TUNED_STEPS, batch_size=rows, gradient_checkpointing=again)
    rng = np.random.default_rng(0)
    examples = [
        Example(tuple(rng.integers(4, 4000, ROW_TOKENS).tolist()), 1)
        for _ in range(TUNED_STEPS * rows)
    ]
    started = time.monotonic()
    tune(loaded, layout, layout.zeros(), examples, settings, rng)
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
