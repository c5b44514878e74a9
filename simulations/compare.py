"""The table that shows whether the idea works: every mode at equal bytes, judged plugged back.

Each cell tunes on a submodel (or the full model), plugs the adapter into the full model, and is
measured there; the tuned submodel alone and the loss on public text stand beside it, because a
good proxy can hide a bad return. Cells are kept as files, so an interrupted comparison goes on.
"""

import dataclasses
import json
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np

from proxymoe.common.adapter import adapter_layout
from proxymoe.common.config import ExtractSettings, PlanMode, TrainSettings
from proxymoe.common.experiment import Calibration, Experiment, Mode
from proxymoe.common.files import write_json
from proxymoe.common.loss import Quality
from proxymoe.common.plan import Plan
from proxymoe.server.journal import Journal
from proxymoe.server.round import RoundReport
from proxymoe.server.schedule import task_seed
from proxymoe.simulations import worker
from proxymoe.simulations.comparison import Cell, comparison
from proxymoe.simulations.federate import PlansOf, federate, federation_of, pool_transports
from proxymoe.simulations.healing import healing
from proxymoe.simulations.pool import WorkerPool, result_of
from proxymoe.simulations.run import environment, forgetting
from proxymoe.simulations.site import Site
from proxymoe.simulations.summing import Summing
from proxymoe.simulations.world import Stage, World

UNCUT: Cell = {
    "router": None,
    "allocation": None,
    "calibration": None,
    "healed": False,
    "rotate": 0.0,
    "plan": None,
}
FULL: Cell = UNCUT | {"mode": "full", "kept_fraction": 1.0}
LOCAL: Cell = UNCUT | {"mode": "local_only"}


def run_comparison(world: World, folder: Path, stage: Stage) -> dict[str, Any]:
    """Runs every cell that is not in `folder` yet and returns the metrics of them all."""
    experiment = world.site.experiment
    cells: list[Cell] = []
    for number, seed in enumerate(experiment.compare.seeds):
        site = _seeded(world, seed)
        with WorkerPool(site, experiment.workers) as pool:
            seeded = dataclasses.replace(world, site=site)
            keep = _Keeper(folder / "cells" / f"seed-{seed}")
            prefix = f"seed {seed}"
            cells += _single_cells(seeded, pool, keep, partial(stage, f"{prefix} single"))
            cells += _federated_cells(
                seeded, pool, keep, folder / "federations" / f"seed-{seed}", prefix, stage
            )
        stage("seeds", number + 1, len(experiment.compare.seeds))
    return {
        "experiment": experiment.name,
        "base_model": {"name": experiment.base_model, "digest": world.base.digest},
        "devices": [],
        "rounds": [],
        "cells": cells,
        "summary": {
            "comparison": comparison(cells),
            "full_model_bytes": world.base.num_bytes,
        },
        "environment": environment(experiment),
    }


class _Keeper:
    """Cells on disk, one file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> Cell | None:
        path = self._folder / f"{key}.json"
        return json.loads(path.read_bytes()) if path.exists() else None

    def put(self, key: str, cell: Cell) -> Cell:
        write_json(self._folder / f"{key}.json", cell)
        return cell


def _seeded(world: World, seed: int) -> Site:
    experiment = world.site.experiment.model_copy(update={"seed": seed})
    adapter = experiment.adapter
    layout = adapter_layout(world.base.skeleton, adapter.targets, adapter.rank, seed)
    return dataclasses.replace(world.site, experiment=experiment, layout=layout)


def _settings(mode: Mode, fraction: float, extract: ExtractSettings) -> ExtractSettings:
    fields = mode.model_dump(exclude={"healed"})
    return extract.model_copy(update={**fields, "kept_fraction": fraction})


def _labels(mode: Mode, fraction: float, calibration: Calibration = Calibration.MATCHED) -> Cell:
    return {
        "mode": mode.mode.value,
        "router": mode.router.value,
        "allocation": mode.allocation.value,
        "calibration": calibration.value,
        "healed": mode.healed,
        "rotate": mode.rotate,
        "kept_fraction": fraction,
    }


def _single_cells(
    world: World, pool: WorkerPool, keep: _Keeper, stage: Callable[[int, int], None]
) -> list[Cell]:
    experiment = world.site.experiment
    jobs: dict[str, tuple[Cell, str, Plan | None]] = {}
    wanted = experiment.compare
    for name in wanted.single_devices:
        jobs[f"{name}-full"] = (FULL | {"bytes": world.base.num_bytes}, name, None)
    for precision, name in product(wanted.quantised, wanted.single_devices):
        whole = {"kept_fraction": 1.0, "mode": PlanMode.DROP, "experts": precision}
        settings = experiment.extract.model_copy(update=whole)
        cut = world.cut(world.site.device(name), settings, experiment.seed)
        labels = FULL | {"mode": f"full {precision}", "bytes": cut.num_bytes}
        jobs[f"{name}-full-{precision}"] = (labels | {"plan": cut.plan.digest}, name, cut.plan)
    grid = product(wanted.calibrations, wanted.single_fractions, wanted.modes)
    for (calibration, fraction, mode), name in product(grid, wanted.single_devices):
        settings = _settings(mode, fraction, experiment.extract)
        cut = world.cut(world.site.device(name), settings, experiment.seed, calibration)
        key = "-".join([name, *_unless_matched(calibration), str(fraction), mode.name])
        labels = _labels(mode, fraction, calibration) | {
            "bytes": cut.num_bytes,
            "plan": cut.plan.digest,
        }
        jobs[key] = (labels, name, cut.plan)
    pending = {}
    cells: list[Cell] = []
    for key, (labels, name, plan) in jobs.items():
        if (done := keep.get(key)) is not None:
            cells.append(done)
            continue
        train = experiment.compare.single_train.get(name, experiment.train)
        seed = task_seed(experiment.seed, 0, name)
        call = (name, plan, train, seed, bool(labels["healed"]))
        pending[key] = (labels, name, pool.submit(single_cell, *call))
    stage(len(cells), len(jobs))
    for key, (labels, name, future) in pending.items():
        cell = labels | {"setting": "single", "seed": experiment.seed, "device": name}
        cells.append(keep.put(key, cell | result_of(future)))
        stage(len(cells), len(jobs))
    return cells


def _unless_matched(calibration: Calibration) -> list[str]:
    return [] if calibration is Calibration.MATCHED else [calibration.value]


def single_cell(
    name: str, plan: Plan | None, train: TrainSettings, seed: int, healed: bool = False
) -> Cell:
    """A worker's job: tune one device alone, then measure proxy alone, plugged, and forgetting."""
    repair = healing(plan) if plan is not None and healed else None
    tuned = worker.tune_locally(name, plan, repair, train, seed)
    alone = None if plan is None else worker.evaluate(name, plan, tuned.vector)
    if repair is not None:  # stays where something is missing
        tuned = dataclasses.replace(tuned, vector=tuned.vector - repair)
    return _qualities(
        base=base_quality(name, "own"),
        alone=alone,
        plugged=worker.evaluate(name, None, tuned.vector),
    ) | {
        "forgetting": public_forgetting(tuned.vector),
        "kl": 0.0 if plan is None else worker.divergence_of(name, plan),
        "seconds": tuned.seconds,
        "peak_rss_mb": tuned.peak_rss_mb,
        "plugged_all": None,
        "base_all": None,
    }


@cache
def base_quality(name: str, among: Literal["own", "all"]) -> Quality:
    """The full model's quality without an adapter; measured once per worker."""
    return worker.evaluate(name, None, None, among)


@cache
def base_public_loss() -> dict[str, float]:
    """The full model's loss per public domain without an adapter; measured once per worker."""
    experiment = worker.here().site.experiment
    return worker.public_loss(None, experiment.evaluate.public_rows, experiment.train.max_tokens)


def public_forgetting(vector: np.ndarray) -> float:
    """A worker's job: what the full model with this adapter has lost on public text, in nats."""
    experiment = worker.here().site.experiment
    rows, length = experiment.evaluate.public_rows, experiment.train.max_tokens
    after = worker.public_loss(vector, rows, length)
    return float(forgetting(base_public_loss(), after)["mean"])


def _federated_cells(
    world: World, pool: WorkerPool, keep: _Keeper, folder: Path, prefix: str, stage: Stage
) -> list[Cell]:
    experiment = world.site.experiment
    if not experiment.compare.federated_devices:
        return []
    names = experiment.compare.federated_devices
    fraction = experiment.extract.kept_fraction
    cells: list[Cell] = []
    variants: list[tuple[str, Cell, Mode | None]] = [("full", FULL, None)]
    modes = experiment.compare.federated_modes
    variants += [(mode.name, _labels(mode, fraction), mode) for mode in modes]
    for key, labels, how in variants:
        plans, plans_of, num_bytes = _plans(world, names, how, fraction)
        federation = federation_of(pool, plans, experiment, run=f"{key}-{experiment.digest[:16]}")
        todo = [n for n in names if keep.get(f"federated-{key}-{n}") is None]
        if todo:
            total = experiment.federation.rounds
            title = f"{prefix} {key}"
            outcome = federate(
                federation,
                pool_transports(pool, plans_of),
                Summing(federation, experiment),
                Journal(folder / key),
                partial(_round_done, stage, title, total),
                plans_of,
            )
            vector = outcome.state.adapter.numpy()
            forgotten = pool.submit(public_forgetting, vector)
            calls = [(n, plans[n], vector) for n in todo]
            for name, result in zip(todo, pool.map(plugged_cell, calls), strict=True):
                cell = labels | {"setting": "federated", "seed": experiment.seed, "device": name}
                cell |= {"bytes": num_bytes, "forgetting": result_of(forgotten)}
                keep.put(f"federated-{key}-{name}", cell | result)
        cells += [found for n in names if (found := keep.get(f"federated-{key}-{n}"))]
    return cells + _local_cells(world, pool, keep, names, experiment)


def _round_done(stage: Stage, title: str, total: int, report: RoundReport) -> None:
    stage(title, report.round, total)


def _plans(
    world: World, names: tuple[str, ...], mode: Mode | None, fraction: float
) -> tuple[dict[str, Plan], PlansOf, float]:
    """Every device's plan, what becomes of it from round to round, and the mean bytes."""
    experiment = world.site.experiment
    if mode is None:
        plans = dict.fromkeys(names, world.base.keep_all())
        return plans, lambda _: plans, world.base.num_bytes
    settings = _settings(mode, fraction, experiment.extract)
    cuts = {n: world.cut(world.site.device(n), settings, experiment.seed) for n in names}
    plans = {name: cut.plan for name, cut in cuts.items()}
    plans_of = world.rotation(plans, settings.rotate, experiment.seed)
    return plans, plans_of, float(np.mean([cut.num_bytes for cut in cuts.values()]))


def plugged_cell(name: str, plan: Plan, vector: np.ndarray) -> Cell:
    """A worker's job: measures a federated adapter on one device's test rows."""
    whole = plan.is_base
    return _qualities(
        base=base_quality(name, "own"),
        base_all=base_quality(name, "all"),
        alone=None if whole else worker.evaluate(name, plan, vector),
        plugged=worker.evaluate(name, None, vector),
        plugged_all=worker.evaluate(name, None, vector, "all"),
    )


def _local_cells(
    world: World, pool: WorkerPool, keep: _Keeper, names: tuple[str, ...], experiment: Experiment
) -> list[Cell]:
    """Every device alone on its proxy, with the local steps that it made in the federation."""
    settings = experiment.federation
    asked = settings.rounds * min(settings.cohort_size or len(names), len(names)) / len(names)
    shape: dict[str, Any] = {"steps": round(asked * experiment.train.steps)}
    shape |= {"optimizer": "adamw", "decay": True, "warmup_steps": 10}
    shape |= {"learning_rate": experiment.personal.local_learning_rate}
    train = experiment.train.model_copy(update=shape)
    cells, pending = [], {}
    for name in names:
        cut = world.cut(world.site.device(name), experiment.extract, experiment.seed)
        labels = LOCAL | {"kept_fraction": experiment.extract.kept_fraction, "bytes": cut.num_bytes}
        labels |= {"setting": "federated", "seed": experiment.seed, "device": name}
        if (done := keep.get(f"local-{name}")) is not None:
            cells.append(done)
            continue
        seed = task_seed(experiment.seed, 0, name)
        pending[name] = (labels, pool.submit(single_cell, name, cut.plan, train, seed))
    for name, (labels, future) in pending.items():
        cells.append(keep.put(f"local-{name}", labels | result_of(future)))
    return cells


def _qualities(**found: Quality | None) -> Cell:
    return {name: None if q is None else dataclasses.asdict(q) for name, q in found.items()}
