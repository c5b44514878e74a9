"""Prepares a simulation: base model, profile, one plan and submodel per device.

What does not depend on the run (the fused full model, profiles, submodels) is kept in a cache by
content, so the next run starts at once.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from torch import Tensor

from proxymoe.common.adapter import AdapterLayout, adapter_layout
from proxymoe.common.checkpoint import WEIGHTS, write_tensors
from proxymoe.common.config import ExtractSettings, PlanMode
from proxymoe.common.experiment import Calibration, Experiment
from proxymoe.common.files import canonical_json, digest_of
from proxymoe.common.model import TABLES_FILE
from proxymoe.common.plan import Plan
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.coverage import Coverage, coverage, mean_mixture
from proxymoe.server.extract import Extraction
from proxymoe.server.modes import MODES
from proxymoe.server.profile import COLUMNS, Profile, load_profile
from proxymoe.server.rotation import rotated
from proxymoe.server.templates import Extractor
from proxymoe.simulations import public
from proxymoe.simulations.federate import PlansOf
from proxymoe.simulations.pool import WorkerPool, result_of
from proxymoe.simulations.site import Site, VirtualDevice, asset, virtual_devices

Stage = Callable[[str, int, int], None]
"""Progress: told what is going on, how much is done, and of how much."""


@dataclass(frozen=True)
class World:
    """The server's side of a simulation before the first round."""

    site: Site
    base: BaseCheckpoint
    profile: Profile

    def mixture(
        self, device: VirtualDevice, calibration: Calibration = Calibration.MATCHED
    ) -> dict[str, float]:
        """The public text that a device's experts are chosen by.

        A device whose domain has no public text goes by all of it.
        """
        known = device.domain in self.profile.domains
        if calibration is Calibration.UNIFORM or not known:
            return self.profile.uniform()
        if calibration is Calibration.MATCHED:
            return {device.domain: 1.0}
        return {self.profile.farthest(device.domain): 1.0}

    def coverage(self, layouts: Iterable[AdapterLayout]) -> Coverage:
        """How much of the adapter these devices, with these layouts, can train together."""
        experiment = self.site.experiment
        mixture = mean_mixture(self.mixture(device) for device in self.site.devices)
        return coverage(
            self.site.layout,
            layouts,
            experiment.federation.cohort_size,
            experiment.smallest_class,
            self.profile.relative_energy(mixture),
        )

    def cut(
        self,
        device: VirtualDevice,
        settings: ExtractSettings,
        seed: int,
        calibration: Calibration = Calibration.MATCHED,
    ) -> Extraction:
        """The device's proxy submodel under these settings, materialised in the cache."""
        mixture = self.mixture(device, calibration)
        extraction = self._extractor.cut(device.name, mixture, settings, seed)
        self._materialise(extraction.plan, extraction.tables)
        return extraction

    def rotation(
        self, plans: Mapping[str, Plan], share: float, seed: int, materialised_rounds: int = 0
    ) -> PlansOf:
        """Every device's plan by round, of which `share` of the kept experts are drawn anew.

        The submodels of the first rounds are materialised, for processes that load them.
        """
        if not share:
            return lambda _number: plans
        mixtures = {name: self.mixture(self.site.device(name)) for name in plans}
        scores = {name: self.profile.relative_energy(mixture) for name, mixture in mixtures.items()}

        def plans_of(number: int) -> dict[str, Plan]:
            drawn = {}
            for name, plan in plans.items():
                rng = np.random.default_rng([seed, number, *name.encode()])
                drawn[name] = rotated(plan, scores[name], share, rng)
                if number <= materialised_rounds:
                    self._materialise(drawn[name], {})
            return drawn

        return plans_of

    def _materialise(self, plan: Plan, tables: dict[str, Tensor]) -> None:
        folder = self.site.submodels / plan.digest
        if (folder / WEIGHTS).exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        if tables:
            write_tensors(folder / TABLES_FILE, tables)
        self.base.materialise(plan, folder)

    @cached_property
    def _extractor(self) -> Extractor:
        return Extractor(self.base, self.profile)


def open_site(experiment: Experiment, cache: Path) -> tuple[Site, BaseCheckpoint]:
    """The base model indexed and fused, the adapter layout, the devices; ready for workers."""
    devices = virtual_devices(experiment.devices)
    base = BaseCheckpoint(asset(experiment.base_model), cache)
    full = base.materialised_full(cache)
    layout = adapter_layout(
        base.skeleton, experiment.adapter.targets, experiment.adapter.rank, experiment.seed
    )
    return Site(experiment, base.digest, full, cache / "submodels", layout, devices), base


def profile_base(pool: WorkerPool, base: BaseCheckpoint, cache: Path, stage: Stage) -> Profile:
    """The base model's profile on all public domains; domains already in the cache are kept."""
    experiment = pool.site.experiment
    files = sorted(asset(experiment.calibration).glob("*.jsonl"))
    text = digest_of(*(path.read_bytes() for path in files))
    key = digest_of(canonical_json([base.digest, text, experiment.calibration_tokens, COLUMNS]))
    domains, folder = [path.stem for path in files], cache / f"profile-{key[:24]}"
    _make(pool, public.profile, domains, folder, partial(stage, "profile"))
    relations = None
    if any(MODES[mode].relations for mode in _modes(experiment)):
        relations = cache / f"relations-{key[:24]}"
        _make(pool, public.relate, domains, relations, partial(stage, "relations of experts"))
    return load_profile(folder, base.digest, relations)


def _modes(experiment: Experiment) -> set[PlanMode]:
    compare = experiment.compare
    listed = (*compare.modes, *compare.federated_modes)
    return {experiment.extract.mode, *(each.mode for each in listed)}


def _make(
    pool: WorkerPool,
    job: Callable[[str, Path], int],
    domains: list[str],
    folder: Path,
    stage: Callable[[int, int], None],
) -> None:
    """Has the workers make what is not in the folder yet, one file per domain."""
    todo = [name for name in domains if not (folder / f"{name}.safetensors").exists()]
    stage(len(domains) - len(todo), len(domains))
    futures = [pool.submit(job, domain, folder) for domain in todo]
    for done, future in enumerate(as_completed(futures), start=len(domains) - len(todo) + 1):
        result_of(future)
        stage(done, len(domains))
