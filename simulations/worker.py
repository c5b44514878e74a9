"""What a worker process of the simulation does; the same client code as a real device.

A worker keeps one full model, mapped from disk. A virtual device is *mounted* on it: the kept
experts' weights are selected, trunk and router are shared. Mounted and materialised submodels
compute the same bits (a test holds them to it), and memory does not grow with devices.
"""

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import nn

from proxymoe.client.personalize import Device, personalize
from proxymoe.client.train import tune
from proxymoe.common.attach import AttachedAdapter
from proxymoe.common.checkpoint import read_tensors
from proxymoe.common.config import TrainSettings
from proxymoe.common.errors import PlanError
from proxymoe.common.experts import Redirect, expert_state
from proxymoe.common.loss import Quality, completion_logits, divergence, token_quality
from proxymoe.common.measure import peak_rss_mb
from proxymoe.common.model import (
    NEURONS,
    TABLES_FILE,
    LoadedModel,
    compute_dtype,
    load,
    merged_experts,
    redirects,
)
from proxymoe.common.moe import moe_layers
from proxymoe.common.plan import Plan, Precision, RouterMode
from proxymoe.common.text import Example, Examples, collate, packed_batches
from proxymoe.server import canary
from proxymoe.server.merging import merges_adapters, returned_home
from proxymoe.simulations.ranking import ranked_quality
from proxymoe.simulations.site import (
    Site,
    answers,
    asset,
    device_examples,
    public_examples,
)

DIVERGENCE_TOKENS = 1024
"""Completion tokens that a divergence is the mean of, at most."""


@dataclass(frozen=True, slots=True)
class LocalRun:
    """A local tuning run that sends nothing."""

    vector: np.ndarray
    seconds: float
    peak_rss_mb: float


class Worker:
    """One process's models and data."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.full = load(site.full, compute_dtype(site.experiment.train.dtype))
        self._weights = {
            layer.position: dict(layer.experts.named_parameters(recurse=False))
            for layer in moe_layers(self.full.model)
        }
        self._apart: tuple[str, LoadedModel] | None = None
        self.tokenised = lru_cache(maxsize=None)(self._tokenised)
        self.candidates = lru_cache(maxsize=None)(self._candidates)
        self.public = lru_cache(maxsize=None)(self._public)

    def mounted(self, plan: Plan | None) -> LoadedModel:
        """The submodel of a plan, valid until the next call; None is the full model."""
        if plan is not None and _is_apart(plan):
            if self._apart is None or self._apart[0] != plan.digest:
                self._apart = None  # before the next one is there
                dtype = compute_dtype(self.site.experiment.train.dtype)
                self._apart = (plan.digest, load(self.site.submodels / plan.digest, dtype))
            return self._apart[1]
        found: dict[int, Redirect] = {}
        merged: dict[int, dict[str, torch.Tensor]] = {}
        if plan is not None:
            folder = self.site.submodels / plan.digest
            found, merged = redirects(plan, folder), merged_experts(plan, folder)
        for layer in moe_layers(self.full.model):
            weights = self._weights[layer.position]
            if plan is not None and layer.position in found:
                kept = torch.tensor(plan.layers[layer.position].kept)
                slots = merged.get(layer.position, {})
                weights = {
                    name: nn.Parameter(slots.get(name, w[kept]).to(w.dtype), requires_grad=False)
                    for name, w in weights.items()
                }
            expert_state(layer.experts).redirect = found.get(layer.position)
            for name, weight in weights.items():
                layer.experts.register_parameter(name, weight)
        return LoadedModel(self.full.model, self.full.tokenizer, plan or self.full.plan)

    def brought_home(self, plan: Plan, update: torch.Tensor) -> torch.Tensor:
        """The update (P,) with what slots of merged experts learned given to their members."""
        tables = read_tensors(self.site.submodels / plan.digest / TABLES_FILE)
        neurons = {at: tables[f"{at}.{NEURONS}"] for at in plan.layers}
        layers = {layer.position: layer for layer in moe_layers(self.full.model)}
        return returned_home(plan, self.site.layout, update, neurons, layers)

    def examples(self, name: str, split: str) -> tuple[Example, ...]:
        """The device's examples of one split."""
        return self.tokenised(name, split).examples

    def _tokenised(self, name: str, split: str) -> Examples:
        device = self.site.device(name)
        return device_examples(device, split, self.full.tokenizer, self.site.experiment)

    def _candidates(self, names: tuple[str, ...]) -> list[tuple[int, ...]]:
        return answers(tuple(self.site.device(name) for name in names), self.full.tokenizer)

    def _public(self, domain: str, max_rows: int, max_tokens: int) -> tuple[Example, ...]:
        path = asset(self.site.experiment.calibration) / f"{domain}.jsonl"
        # From the end: profiling reads from the start.
        return public_examples(path, self.full.tokenizer, max_tokens)[-max_rows:]


_worker: Worker | None = None


def start(site: Site) -> None:
    """Makes this process a worker; interrupts are the business of the run that started it."""
    global _worker  # noqa: PLW0603  a worker process has exactly one worker
    obey()
    _worker = Worker(site)


def here() -> Worker:
    """This process's worker."""
    assert _worker is not None, "start() has not run in this process"
    return _worker


def row_counts(name: str) -> dict[str, int]:
    """How many training rows a device has, and what became of those that are too long."""
    found = here().tokenised(name, "train")
    return {
        "used": len(found.examples),
        "truncated": found.num_truncated,
        "dropped": found.num_dropped,
    }


def answer(name: str, plan: Plan, task: bytes) -> bytes:
    """A virtual device's answer to a training task."""
    worker = here()
    return personalize(_device(worker, name, plan, worker.mounted(plan)), task)


def answer_alone(site: Site, name: str, plan: Plan, task: bytes) -> bytes:
    """The same in a process of its own, from the materialised submodel: memory as on a device."""
    obey()
    return personalize(open_device(site, name, plan.digest), task)


def open_device(site: Site, name: str, plan: str) -> Device:
    """A device opened as it would open itself: from the materialised submodel with this digest."""
    loaded = load(site.submodels / plan, compute_dtype(site.experiment.train.dtype))
    device, tokenizer = site.device(name), loaded.tokenizer
    examples = device_examples(device, "train", tokenizer, site.experiment).examples
    return Device(name, loaded, site.layout.held_under(loaded.plan), examples)


def peak(site: Site, name: str, plan: str | None, settings: TrainSettings) -> float:
    """Peak memory in MB of a process of its own that tunes a plan's submodel, or the full model."""
    obey()
    folder = site.full if plan is None else site.submodels / plan
    loaded = load(folder, compute_dtype(settings.dtype))
    layout = site.layout.held_under(loaded.plan)
    rows = device_examples(site.device(name), "train", loaded.tokenizer, site.experiment).examples
    tune(loaded, layout, layout.zeros(), rows, settings, np.random.default_rng(0))
    return peak_rss_mb()


def tune_locally(
    name: str, plan: Plan | None, begin: np.ndarray | None, settings: TrainSettings, seed: int
) -> LocalRun:
    """Tunes on the device's data from `begin` (full layout; None: zeros); nothing is sent.

    The result is in the full layout too, with zeros where the device holds no block.
    """
    worker, started = here(), time.monotonic()
    full = worker.site.layout
    loaded = worker.mounted(plan)
    layout = full.held_under(loaded.plan)
    origin = full.zeros() if begin is None else torch.from_numpy(begin)
    held = layout.take_from(full, origin)
    rng = np.random.default_rng(seed)
    tuned = tune(loaded, layout, held, worker.examples(name, "train"), settings, rng)
    result = layout.put_into(full, origin, tuned.vector)
    if plan is not None and merges_adapters(plan, full):
        result = origin + worker.brought_home(plan, result - origin)
    return LocalRun(result.numpy(), time.monotonic() - started, peak_rss_mb())


def evaluate(
    name: str,
    plan: Plan | None,
    vector: np.ndarray | None,
    among: Literal["own", "all"] = "own",
) -> Quality:
    """Quality on the device's test rows, with an adapter of the full layout or none.

    Answers are ranked among the device's own or among those of all answering devices.
    """
    worker = here()
    loaded = worker.mounted(plan)
    layout = worker.site.layout.held_under(loaded.plan)
    examples = worker.examples(name, "test")
    with AttachedAdapter(loaded.model, layout) as adapter:
        if vector is not None:
            adapter.bind(layout.take_from(worker.site.layout, torch.from_numpy(vector)))
        if not worker.site.device(name).answers:
            return token_quality(loaded.model, packed_batches(examples))
        everyone = tuple(d.name for d in worker.site.devices if d.answers)
        return ranked_quality(
            loaded, examples, worker.candidates((name,) if among == "own" else everyone)
        )


def divergence_of(name: str, plan: Plan) -> float:
    """KL(full model ‖ untuned submodel) in nats per token, on completions of the device's tests."""
    loaded = here().mounted(plan)
    batches = packed_batches(here().examples(name, "test"))
    found = completion_logits(loaded.model, batches, DIVERGENCE_TOKENS)
    return divergence(_reference_logits(name), found)


@lru_cache(maxsize=2)
def _reference_logits(name: str) -> torch.Tensor:
    batches = packed_batches(here().examples(name, "test"))
    return completion_logits(here().mounted(None).model, batches, DIVERGENCE_TOKENS)


def public_loss(vector: np.ndarray | None, max_rows: int, max_tokens: int) -> dict[str, float]:
    """{public domain: loss} of the full model with an adapter; for canary and forgetting."""
    worker = here()
    loaded, losses = worker.mounted(None), dict[str, float]()
    with AttachedAdapter(loaded.model, worker.site.layout) as adapter:
        if vector is not None:
            adapter.bind(torch.from_numpy(vector))
        for domain in worker.site.experiment.evaluate.public_domains:
            examples = worker.public(domain, max_rows, max_tokens)
            losses[domain] = token_quality(loaded.model, packed_batches(examples)).loss
    return losses


def canary_loss(vector: np.ndarray | None, max_rows: int, max_tokens: int) -> float:
    """Loss of the full model with an adapter on a few public rows of all domains, in one batch."""
    worker = here()
    domains = worker.site.experiment.evaluate.public_domains
    rows = [row for domain in domains for row in worker.public(domain, max_rows, max_tokens)]
    adapter = None if vector is None else torch.from_numpy(vector)
    return canary.public_loss(worker.mounted(None), worker.site.layout, adapter, collate(rows))


def obey() -> None:
    """One thread, no interrupts of its own, and no life beyond the run that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # Not the process above this one: that is the fork server, which lives as long as its children.
    run = multiprocessing.parent_process()

    def leave_with_run() -> None:
        if run is not None:
            run.join()
            os._exit(1)

    threading.Thread(target=leave_with_run, name="orphan-watch", daemon=True).start()


def _is_apart(plan: Plan) -> bool:
    """Whether a submodel has tensors that the full model lacks, and so is a model of its own."""
    return plan.router is not RouterMode.FULL or plan.experts is not Precision.BF16


def _device(worker: Worker, name: str, plan: Plan, loaded: LoadedModel) -> Device:
    if plan.base != worker.site.base:
        raise PlanError(
            f"plan for base model {plan.base[:12]}, the site has {worker.site.base[:12]}"
        )
    layout = worker.site.layout.held_under(plan)
    return Device(name, loaded, layout, worker.examples(name, "train"))
