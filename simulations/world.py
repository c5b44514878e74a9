"""Prepares a simulation: base model, profile, one plan and submodel per device.

What does not depend on the run (the fused full model, profiles, submodels) is kept in a cache by
content, so the next run starts at once.
"""

from collections.abc import Callable
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from proxymoe.common.adapter import adapter_layout
from proxymoe.common.checkpoint import WEIGHTS, write_tensors
from proxymoe.common.config import Experiment, ExtractSettings
from proxymoe.common.files import canonical_json, digest_of
from proxymoe.common.model import OFFSETS_FILE
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.extract import Extraction, extract
from proxymoe.server.profile import Profile, load_profile
from proxymoe.simulations import worker
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

    def cut(self, device: VirtualDevice, settings: ExtractSettings, seed: int) -> Extraction:
        """The device's proxy submodel under these settings, materialised in the cache."""
        known = device.domain in self.profile.domains
        mixture = {device.domain: 1.0} if known else self.profile.uniform()
        rng = np.random.default_rng([seed, *device.name.encode()])
        extraction = extract(self.base, self.profile, mixture, settings, rng)
        folder = self.site.submodels / extraction.plan.digest
        if not (folder / WEIGHTS).exists():
            folder.mkdir(parents=True, exist_ok=True)
            if extraction.offsets:
                write_tensors(folder / OFFSETS_FILE, extraction.offsets)
            self.base.materialise(extraction.plan, folder)
        return extraction


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
    key = digest_of(canonical_json([base.digest, text, experiment.calibration_tokens]))
    folder = cache / f"profile-{key[:24]}"
    todo = [path.stem for path in files if not (folder / f"{path.stem}.safetensors").exists()]
    stage("profile", len(files) - len(todo), len(files))
    futures = [pool.submit(worker.profile, domain, folder) for domain in todo]
    for done, future in enumerate(as_completed(futures), start=len(files) - len(todo) + 1):
        result_of(future)
        stage("profile", done, len(files))
    return load_profile(folder, base.digest)
