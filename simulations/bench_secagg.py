"""Masked sums beside plain sums and beside Flower's SecAgg+ primitives, on the same vectors.

Everybody is in this process, one after another, with real P-384 identities, on one core. A round's
time is put together from the processor seconds that each side took (other work on the machine does
not count) and the time to send what was sent. A tenth of the devices drop out after sharing their
keys, which is the worst moment. `python -m proxymoe.simulations.bench_secagg`.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from proxymoe.client.train import tune
from proxymoe.common.config import TrainSettings
from proxymoe.common.contribution import Contribution, Limits
from proxymoe.common.directory import PinnedKeys, signer
from proxymoe.common.experiment import load_experiment
from proxymoe.common.files import write_json
from proxymoe.common.fixed_point import Floats, range_for, word_bits_for
from proxymoe.common.identity import new_device_key, public_key
from proxymoe.common.masking import Device
from proxymoe.common.secagg import MaskClass, Phase, Terms, Threshold
from proxymoe.common.unmasking import Coordinator
from proxymoe.server.secure_sum import RESOLUTION
from proxymoe.simulations.cli import EXPERIMENTS
from proxymoe.simulations.secaggplus import (
    DROPPED,
    SOME_EXAMPLES,
    Clock,
    Measured,
    drops_out,
    relative_error,
    secaggplus,
    small_weight_error,
)
from proxymoe.simulations.worker import Worker
from proxymoe.simulations.world import open_site

SIGMA = 1e-4
"""Standard deviation of an update's numbers."""
PARTS = 16
"""Blocks of the vector, all of them held by everybody: the most expensive case."""


def plain(vectors: list[Floats]) -> Measured:
    """fp32 on the wire, added in fp64."""
    count, device, server = len(vectors), Clock(), Clock()
    total, sent = np.zeros(vectors[0].size), 0
    for i, vector in enumerate(vectors):
        if drops_out(i, count):
            continue
        with device:
            content = vector.tobytes()
        with server:
            total += np.frombuffer(content, dtype=np.float32)
        sent = len(content)
    return Measured(total, device.seconds / count, server.seconds, sent)


def masked(vectors: list[Floats]) -> Measured:
    """Ours, every letter of it."""
    count, size = len(vectors), vectors[0].size
    names = tuple(f"device-{i:03}" for i in range(count))
    keys = {name: new_device_key() for name in names}
    directory = PinnedKeys({name: public_key(key) for name, key in keys.items()})
    sizes = dict(enumerate([size // PARTS] * (PARTS - 1) + [size - size // PARTS * (PARTS - 1)]))
    terms = _terms(names, sizes, max(float(np.linalg.norm(vector)) for vector in vectors))
    rng, limits = np.random.default_rng(1), Limits(terms.smallest_cohort, terms.smallest_class)
    ones = np.ones(PARTS, dtype=np.float32)
    coordinator, device, server = Coordinator(terms, directory), Clock(), Clock()
    devices, answers = {}, {}
    for name, vector in zip(names, vectors, strict=True):
        given = Contribution(sizes, vector, ones)
        with device:
            devices[name] = Device(
                name, signer(keys[name]), directory, terms, limits, given, [], rng
            )
            answers[name] = devices[name].announce()
    sent = 0
    while coordinator.phase is not Phase.OVER:
        for name, step in answers.items():
            if coordinator.phase is Phase.UPLOAD and drops_out(names.index(name), count):
                continue
            with server:
                coordinator.receive(step.reply)
            sent += len(step.reply)
        with server:
            questions = coordinator.close()
        answers = {}
        for name, asked in questions.items():
            with device:
                answers[name] = devices[name].answer(asked)
    found = coordinator.result
    assert not found.masked, found.masked
    total = np.concatenate(found.sums[0].values)
    left = len(found.survivors)
    return Measured(total, device.seconds / count, server.seconds, sent / left)


def _terms(names: tuple[str, ...], sizes: dict[int, int], clip_norm: float) -> Terms:
    size, everybody = sum(sizes.values()), tuple(range(len(names)))
    wide = range_for(clip_norm, size)
    return Terms(
        run="bench",
        round=1,
        attempt=0,
        base="0" * 64,
        layout="0" * 64,
        devices=names,
        classes=(MaskClass(holders=everybody, blocks=tuple(sizes), sizes=tuple(sizes.values())),),
        threshold=Threshold.TWO_THIRDS,
        smallest_cohort=8,
        smallest_class=5,
        clip_norm=clip_norm,
        value_range=wide,
        word_bits=word_bits_for(len(names), wide, RESOLUTION * clip_norm / size**0.5),
    )


def tuning_seconds(cache: Path) -> float:
    """Processor seconds of tuning the shipped model once, with default `TrainSettings`."""
    torch.set_num_threads(1)
    experiment = load_experiment(EXPERIMENTS / "default.toml")
    experiment = experiment.model_copy(update={"train": TrainSettings()})
    site, _ = open_site(experiment, cache)
    worker, name = Worker(site), experiment.devices[0].names[0]
    started = time.process_time()
    rng = np.random.default_rng(0)
    start = site.layout.zeros()
    tune(worker.full, site.layout, start, worker.examples(name, "train"), experiment.train, rng)
    return time.process_time() - started


@dataclass(frozen=True, slots=True)
class Link:
    """What stands between device and coordinator, as assumed."""

    uplink_mbit: float
    latency_seconds: float

    def seconds(self, num_bytes: float, exchanges: int) -> float:
        """Time in which a device's bytes arrive, with a wait per exchange."""
        return num_bytes * 8 / (self.uplink_mbit * 1e6) + exchanges * self.latency_seconds


def measure(count: int, size: int, compute: float, link: Link) -> dict[str, Any]:
    """The numbers of one cohort; `compute` is a device's tuning time, seconds."""
    rng = np.random.default_rng(count)
    vectors = [rng.normal(0, SIGMA, size).astype(np.float32) for _ in range(count)]
    clear, ours, flower = plain(vectors), masked(vectors), secaggplus(vectors)

    def wall(found: Measured, exchanges: int) -> float:
        sending = link.seconds(found.device_bytes, exchanges)
        return compute + found.device_seconds + sending + found.server_seconds

    def row(found: Measured, exchanges: int) -> dict[str, float]:
        return {
            "relative_error": relative_error(found.total, clear.total),
            "bytes_per_coordinate": found.device_bytes / size,
            "device_seconds": found.device_seconds,
            "server_seconds": found.server_seconds,
            "time_ratio_to_plain": wall(found, exchanges) / wall(clear, 1),
        }

    return {
        "devices": count,
        "coordinates": size,
        "plain": row(clear, 1),
        "ours": row(ours, 5),
        "secaggplus": row(flower, 4)
        | {f"relative_error_{SOME_EXAMPLES}_examples": small_weight_error(vectors)},
    }


def show(console: Console, found: dict[str, Any]) -> None:
    """Prints the table of one cohort."""
    title = f"{found['devices']} devices, {found['coordinates']:,} coordinates, {DROPPED:.0%} drop"
    table = Table("", "error", "bytes/coordinate", "device s", "server s", "round", title=title)
    for name in ("plain", "ours", "secaggplus"):
        row = found[name]
        table.add_row(
            name,
            f"{row['relative_error']:.1e}",
            f"{row['bytes_per_coordinate']:.2f}",
            f"{row['device_seconds']:.2f}",
            f"{row['server_seconds']:.2f}",
            f"{row['time_ratio_to_plain']:.2f}×",
        )
    console.print(table)
    small = found["secaggplus"][f"relative_error_{SOME_EXAMPLES}_examples"]
    console.print(f"secaggplus, devices with {SOME_EXAMPLES} examples: error {small:.1e}")


def main(
    devices: Annotated[list[int] | None, typer.Option(help="Cohort sizes.")] = None,
    coordinates: Annotated[int, typer.Option(help="Of the first cohort.")] = 1_000_000,
    large_coordinates: Annotated[int, typer.Option(help="Of the others.")] = 100_000,
    uplink_mbit: Annotated[float, typer.Option(help="Of every device.")] = 20.0,
    latency_ms: Annotated[float, typer.Option(help="Of every exchange.")] = 50.0,
    cache: Annotated[Path, typer.Option(help="Where the base model is.")] = Path("runs/cache"),
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write.")] = None,
) -> None:
    """Measures and prints; the first cohort's numbers are the headline."""
    console = Console()
    link = Link(uplink_mbit, latency_ms / 1e3)
    compute = tuning_seconds(cache)
    console.print(
        f"a round is: tuning {compute:.1f} s (measured), what the device adds, sending at "
        f"{uplink_mbit:g} Mbit/s with {latency_ms:g} ms per exchange (assumed), the server's part"
    )
    table = []
    for place, count in enumerate(devices or [32, 128]):
        size = large_coordinates if place else coordinates
        table.append(measure(count, size, compute, link))
        show(console, table[-1])
    headline = ("relative_error", "bytes_per_coordinate", "time_ratio_to_plain")
    result = {name: table[0]["ours"][name] for name in headline} | {
        "tuning_seconds": compute,
        "uplink_mbit": uplink_mbit,
        "latency_ms": latency_ms,
        "table": table,
    }
    if json_path is not None:
        write_json(json_path, result)


if __name__ == "__main__":
    typer.run(main)
