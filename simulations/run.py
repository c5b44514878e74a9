"""One experiment, from base model to metrics: profile, cut, federate, personalise, measure."""

import logging
import platform
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from proxymoe.common.experiment import Experiment
from proxymoe.common.files import digest_of
from proxymoe.common.loss import Quality
from proxymoe.common.model import compute_dtype
from proxymoe.common.peft_format import export_peft
from proxymoe.common.plan import Plan
from proxymoe.common.privacy import Mode
from proxymoe.server.aggregate import Summation
from proxymoe.server.extract import Extraction
from proxymoe.server.journal import Journal
from proxymoe.server.round import Federation, Transport
from proxymoe.server.schedule import task_seed
from proxymoe.simulations import worker
from proxymoe.simulations.federate import (
    Outcome,
    PlansOf,
    RoundDone,
    federate,
    federation_of,
    first_deck,
    pool_transports,
)
from proxymoe.simulations.pool import WorkerPool, result_of
from proxymoe.simulations.site import VirtualDevice
from proxymoe.simulations.summing import Summing
from proxymoe.simulations.world import Stage, World

log = logging.getLogger(__name__)

QUALITIES = (
    "base",
    "proxy_untuned",
    "proxy_tuned",
    "plugged",
    "plugged_personal",
    "local_only",
    "full_tuned",
)
"""What is measured per device; on the full model unless the name says proxy."""

Federate = Callable[
    [
        Federation,
        Callable[[int], Transport],
        Callable[[int], Summation],
        Journal | None,
        RoundDone,
        PlansOf | None,
    ],
    Outcome,
]


@dataclass(frozen=True, slots=True)
class Cut:
    """A virtual device with its proxy submodel."""

    device: VirtualDevice
    extraction: Extraction

    @property
    def plan(self) -> Plan:
        """The device's plan."""
        return self.extraction.plan


def run_experiment(
    world: World,
    pool: WorkerPool,
    folder: Path,
    stage: Stage,
    run_rounds: Federate = federate,
    *,
    weighed: bool = True,
) -> dict[str, Any]:
    """Runs the experiment and returns its metrics; `folder` keeps rounds and the adapter.

    If devices are `weighed`, each works in a process of its own once, to tell its peak memory.
    """
    experiment = world.site.experiment
    cuts = cut_all(world, stage)
    plans = {cut.device.name: cut.plan for cut in cuts}

    rows = count_rows(pool, cuts)
    total = experiment.federation.rounds
    federation = federation_of(pool, plans, experiment, run=experiment.digest[:32])
    summing = Summing(federation, experiment, folder)
    for warning in summing.price.warnings if experiment.privacy.mode is not Mode.CLIP_ONLY else ():
        log.warning("privacy: %s", warning)
    alone = first_deck(len(plans), experiment.federation.cohort_size) if weighed else 0
    plans_of = world.rotation(plans, experiment.extract.rotate, experiment.seed, alone)
    outcome = run_rounds(
        federation,
        pool_transports(pool, plans_of, alone),
        summing,
        Journal(folder),
        lambda report: stage("federate", report.round, total),
        plans_of,
    )
    adapter = outcome.state.adapter
    export_peft(world.site.layout, adapter, folder / "adapter", experiment.base_model)

    personal = personal_adapters(pool, cuts, adapter.numpy(), stage)
    measured = measure(pool, cuts, adapter.numpy(), personal, stage)
    devices = [
        device_metrics(cut, measured[cut.device.name], outcome.reports, world) | {"rows": counts}
        for cut, counts in zip(cuts, rows, strict=True)
    ]
    return {
        "experiment": experiment.name,
        "base_model": {"name": experiment.base_model, "digest": world.base.digest},
        "devices": devices,
        "rounds": outcome.reports,
        "summary": {
            **summary(devices, adapter.numpy(), pool, experiment),
            **summing.summary(),
            "coverage": covered(world, federation),
            "trained_parameters": world.site.layout.size,
            "full_model_bytes": world.base.num_bytes,
        },
        "environment": environment(experiment),
    }


def covered(world: World, federation: Federation) -> dict[str, Any]:
    """How much of the adapter these devices can train together, in numbers and in words."""
    found = world.coverage(member.layout for member in federation.members.values())
    return {**asdict(found), "told": str(found)}


def cut_all(world: World, stage: Stage) -> list[Cut]:
    """Every device's proxy submodel under the experiment's settings."""
    experiment, cuts = world.site.experiment, []
    for device in world.site.devices:
        cuts.append(Cut(device, world.cut(device, experiment.extract, experiment.seed)))
        stage("extract", len(cuts), len(world.site.devices))
    return cuts


def count_rows(pool: WorkerPool, cuts: list[Cut]) -> list[dict[str, int]]:
    """Every device's training rows; says which devices have rows that are too long."""
    found = pool.map(worker.row_counts, [(cut.device.name,) for cut in cuts])
    for cut, counts in zip(cuts, found, strict=True):
        if counts["truncated"] or counts["dropped"]:
            log.warning(
                "%s: %d training rows used, %d of them truncated; %d dropped "
                "(see train.max_tokens and train.too_long)",
                cut.device.name,
                *counts.values(),
            )
    return found


def personal_adapters(
    pool: WorkerPool, cuts: list[Cut], adapter: np.ndarray, stage: Stage
) -> dict[str, dict[str, worker.LocalRun]]:
    """{device: {plugged_personal, local_only[, full_tuned]}}: adapters that never leave the device.

    The personal adapter starts from the federated one; local-only tuning starts from nothing and
    gets the same number of steps at its own best learning rate.
    """
    experiment = pool.site.experiment
    settings = experiment.personal
    if settings.steps == 0:
        return {}
    shape = {"steps": settings.steps, "decay": True, "optimizer": "adamw"}
    shape |= {"warmup_steps": 2, "batch_size": settings.batch_size}
    base = experiment.train.model_copy(update=shape)
    gentle = base.model_copy(update={"learning_rate": settings.learning_rate})
    alone = base.model_copy(update={"learning_rate": settings.local_learning_rate})
    jobs: dict[tuple[str, str], Future[worker.LocalRun]] = {}
    for cut in cuts:
        name, seed = cut.device.name, task_seed(experiment.seed, 0, cut.device.name)
        calls: dict[str, tuple[Any, ...]] = {
            "plugged_personal": (name, cut.plan, adapter, gentle, seed),
            "local_only": (name, cut.plan, None, alone, seed),
        }
        if experiment.evaluate.full_reference:
            calls["full_tuned"] = (name, None, None, alone, seed)
        for kind, call in calls.items():
            jobs[name, kind] = pool.submit(worker.tune_locally, *call)
    runs: dict[str, dict[str, worker.LocalRun]] = {}
    for done, ((name, kind), future) in enumerate(jobs.items(), start=1):
        runs.setdefault(name, {})[kind] = result_of(future)
        stage("personalize", done, len(jobs))
    return runs


def measure(
    pool: WorkerPool,
    cuts: list[Cut],
    adapter: np.ndarray,
    personal: dict[str, dict[str, worker.LocalRun]],
    stage: Stage,
) -> dict[str, dict[str, Quality]]:
    """Quality of everything, per device: on the full model unless the name says proxy."""
    jobs: dict[tuple[str, str], Future[Quality]] = {}
    for cut in cuts:
        name, mine = cut.device.name, personal.get(cut.device.name, {})
        calls: dict[str, tuple[Plan | None, np.ndarray | None]] = {
            "base": (None, None),
            "plugged": (None, adapter),
        }
        if pool.site.experiment.evaluate.proxies:
            calls["proxy_untuned"] = (cut.plan, None)
            calls["proxy_tuned"] = (cut.plan, adapter)
        calls |= {kind: (None, run.vector) for kind, run in mine.items()}
        for what, (plan, vector) in calls.items():
            jobs[name, what] = pool.submit(worker.evaluate, name, plan, vector)
    results: dict[str, dict[str, Quality]] = {}
    for done, ((name, what), future) in enumerate(jobs.items(), start=1):
        results.setdefault(name, {})[what] = result_of(future)
        stage("measure", done, len(jobs))
    return results


def device_metrics(
    cut: Cut, qualities: dict[str, Quality], reports: list[dict[str, Any]], world: World
) -> dict[str, Any]:
    """One device's entry in metrics.json; what was not measured is null."""
    name = cut.device.name
    table = {n: qualities.get(n) for n in QUALITIES}
    full, base, plugged = table["full_tuned"], qualities["base"], qualities["plugged"]
    peaks = (report["peak_rss_mb"][name] for report in reports if name in report["peak_rss_mb"])
    return {
        "name": name,
        "domain": cut.device.domain,
        "kept_fraction": cut.plan.kept_fraction,
        "kept": {str(at): list(layer.kept) for at, layer in cut.plan.layers.items()},
        "experts_per_layer": {str(at): n for at, n in world.base.num_experts.items()},
        "bytes": cut.extraction.num_bytes,
        **{n: None if q is None else asdict(q) for n, q in table.items()},
        "recovered_gain": None if full is None else recovered(base, plugged, full),
        "gap_nats": None if full is None else plugged.loss - full.loss,
        "peak_rss_mb": next(peaks, None),
        "seconds": sum(report["seconds"].get(name, 0.0) for report in reports),
    }


def recovered(base: Quality, plugged: Quality, full: Quality) -> float | None:
    """(plugged − base) / (full − base) in accuracy; None where full tuning gained nothing."""
    gain = full.accuracy - base.accuracy
    return None if gain <= 0 else (plugged.accuracy - base.accuracy) / gain


def summary(
    devices: list[dict[str, Any]], adapter: np.ndarray, pool: WorkerPool, experiment: Experiment
) -> dict[str, Any]:
    """Means over devices, forgetting on public text, and the digest that names the adapter."""
    means = {}
    for what in QUALITIES:
        found = [device[what] for device in devices if device[what] is not None]
        if found:
            means[what] = {k: float(np.mean([q[k] for q in found])) for k in ("accuracy", "loss")}
    rows, length = experiment.evaluate.public_rows, experiment.train.max_tokens
    before = pool.submit(worker.public_loss, None, rows, length)
    after = pool.submit(worker.public_loss, adapter, rows, length)
    return {
        "mean": means,
        "forgetting": forgetting(before.result(), after.result()),
        "adapter_digest": digest_of(np.ascontiguousarray(adapter, dtype="<f4").tobytes()),
    }


def forgetting(before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """Public domains' loss with the adapter plugged back, minus the base model's, in nats."""
    each = {domain: after[domain] - before[domain] for domain in before}
    return {"by_domain": each, "mean": float(np.mean(list(each.values())))}


def environment(experiment: Experiment) -> dict[str, Any]:
    """What the numbers were measured on."""
    packages = ("proxymoe", "torch", "transformers", "peft", "flwr")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": torch.cpu.get_capabilities().get("cpu_name"),
        "workers": experiment.workers,
        "dtype": str(compute_dtype(experiment.train.dtype)).removeprefix("torch."),
        "packages": {name: version(name) for name in packages},
    }
