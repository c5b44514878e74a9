"""Turns applications into assignments: which plan, which manifest, and where every blob lies.

A plan is a function of settings, profile and application: asked again, a device gets the same,
and a simulation with the same settings cuts the same. Pieces are byte ranges of the base
checkpoint; there is no second copy of them. Only a manifest, and a `mean` plan's table of vectors,
are files of their own.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor

from proxymoe.common.adapter import adapter_layout
from proxymoe.common.assignment import Application, Assignment, Blob
from proxymoe.common.checkpoint import write_tensors
from proxymoe.common.domains import changed_enough
from proxymoe.common.errors import CheckpointError, ConfigError
from proxymoe.common.files import canonical_json, digest_of, write_bytes
from proxymoe.common.manifest import Manifest
from proxymoe.common.model import TABLES_FILE, compute_dtype
from proxymoe.common.plan import Plan
from proxymoe.server.blobs import BlobPlace
from proxymoe.server.canary import Canary
from proxymoe.server.cohorts import drawing
from proxymoe.server.coverage import Coverage, coverage, mean_mixture
from proxymoe.server.devices import Devices
from proxymoe.server.extract import Extraction, budget_bytes
from proxymoe.server.fit import predicted_peak
from proxymoe.server.members import Members
from proxymoe.server.merging import require_identity
from proxymoe.server.places import Places
from proxymoe.server.prepare import Stage, prepare
from proxymoe.server.promise import noise_of
from proxymoe.server.round import Federation, Member
from proxymoe.server.run_directory import RunDirectory
from proxymoe.server.templates import Extractor


class Planner:
    """Answers applications, and says which blob lies where and who may have it.

    Base model and profile are prepared first, if they are not; see `prepare` for errors. Threads
    may use it at once, and so may processes, each with its own.

    Args:
        run: the coordinator's run directory.
        stage: told how the preparation goes.

    Raises:
        ConfigError: the run directory belongs to another base model or adapter than its settings.
    """

    def __init__(self, run: RunDirectory, stage: Stage = lambda *_: None) -> None:
        self._run, self._settings = run, run.settings
        prepared = prepare(run, stage)
        self.base, self.full, self.profile = prepared.base, prepared.full, prepared.profile
        self._extractor = Extractor(self.base, self.profile)
        adapter = self._settings.adapter
        self.layout = adapter_layout(
            self.base.skeleton, adapter.targets, adapter.rank, self._settings.seed
        )
        self._noise = noise_of(self._settings)
        self.devices = Devices(run.devices_db)
        self._require_same_run()
        tables = [path for path in (prepared.table, prepared.experts) if path is not None]
        self.table, self.experts = _blob(prepared.table), _blob(prepared.experts)
        self._blobs, self._lock = run.cache / "blobs", threading.Lock()
        self.places: Mapping[str, BlobPlace] = Places(self.base, self._blobs, tables)

    def assign(self, device: str, application: Application) -> Assignment:
        """What this device gets, remembered; the same for the same application.

        A new plan waits while a round asks the device: until that is over, it keeps the old one.

        Raises:
            BudgetError: no submodel fits the budget.
            ConfigError: the mixture names a domain that the profile does not know.
        """
        with self._lock:
            held = self.devices.planned(device)
            if held is not None and not self._moved(held.application, application):
                application = held.application
            extraction = self._cut(device, application)
            plan, manifest = extraction.plan, self._publish(extraction)
            if held is None or (held.application, held.manifest) != (application, manifest):
                with self._between_rounds(device) as free:
                    if held is not None and not free:
                        plan, manifest = held.plan, held.manifest
                        application = held.application
                    else:
                        named = self._digests(manifest)
                        self.devices.keep_plan(device, application, plan, manifest, named)
            return self._assignment(device, plan, manifest, self._mixture(application))

    def allowed(self, device: str, digest: str) -> bool:
        """Whether an enrolled device may have the blob with this digest: its plan's, or a table.

        Cheap enough to be asked for every transfer.
        """
        if digest in (blob.digest for blob in (self.table, self.experts) if blob is not None):
            return self.devices.is_enrolled(device)
        return self.devices.may_have(device, digest)

    def members(self, devices: Devices | None = None) -> Mapping[str, Member]:
        """A live view of the devices that can take part; see `Members`."""
        return Members(devices or self.devices, self.layout)

    def canary(self) -> Canary:
        """The canary of this base model; it loads the full model when it is first asked."""
        settings, folder = self._settings, self._run.calibration
        return Canary(
            self.full,
            self.layout,
            [folder / f"{domain}.jsonl" for domain in settings.public_domains],
            settings.canary_rows,
            settings.canary_tokens,
            compute_dtype(settings.train.dtype),
            settings.threads,
        )

    def federation(self, canary: Callable[[Tensor | None], float]) -> Federation:
        """What stays the same over the rounds; asks the canary for the base model's loss."""
        settings, members = self._settings, self.members()
        return Federation(
            run=settings.run,
            base=self.base.digest,
            seed=settings.seed,
            layout=self.layout,
            members=members,
            train=settings.train,
            settings=settings.federation,
            canary=canary,
            canary_limit=canary(None) + settings.federation.canary_tolerance,
            masked=settings.masked,
            noise=self._noise,
            draw=drawing(
                settings.federation.cohorts,
                self.layout,
                lambda name: members[name].layout,
                settings.smallest_class,
            ),
        )

    def coverage(self) -> Coverage:
        """How much of the adapter the members, as they are now, can train together.

        Raises:
            ConfigError: there are none yet.
        """
        settings, members = self._settings, self.members()
        found = [self.devices.planned(name) for name in members]
        mixtures = [self._mixture(each.application) for each in found if each is not None]
        if not mixtures:
            raise ConfigError("no device has a plan yet; enrol some, and let them join")
        return coverage(
            self.layout,
            [members[name].layout for name in members],
            settings.federation.cohort_size,
            settings.smallest_class,
            self.profile.relative_energy(mean_mixture(mixtures)),
        )

    def _moved(self, old: Application, new: Application) -> bool:
        """Whether an application is another one; a domain mixture may drift a little."""
        if old.mixture is None or new.mixture is None:
            return old != new
        drifted = changed_enough(old.mixture, new.mixture, self._settings.replan_threshold)
        return drifted or old.budget_bytes != new.budget_bytes

    def _mixture(self, application: Application) -> dict[str, float]:
        if application.mixture is not None:
            return application.mixture
        named, known = application.domain, self.profile.domains
        return {named: 1.0} if named in known else self.profile.uniform()

    def _cut(self, device: str, application: Application) -> Extraction:
        settings = self._settings
        own = budget_bytes(self.base, settings.extract)
        budget = own
        if application.budget_bytes is not None:
            budget = min(application.budget_bytes, max(own, settings.largest_budget_bytes or 0))
        how = settings.extract.model_copy(update={"budget_bytes": budget})
        extraction = self._extractor.cut(device, self._mixture(application), how, settings.seed)
        require_identity(extraction.plan, self.layout)
        return extraction

    def _publish(self, extraction: Extraction) -> str:
        """Writes the manifest, and the tables if there are any; returns its digest."""
        manifest, table = self.base.manifest(extraction.plan), {}
        if extraction.tables:
            partial = self._blobs / f".{extraction.plan.digest}.{os.getpid()}"
            write_tensors(partial, extraction.tables)
            table[TABLES_FILE] = digest_of(partial.read_bytes())
            partial.replace(self._blobs / table[TABLES_FILE])
        # Where our files lie is nobody's business.
        config = {key: value for key, value in manifest.config.items() if key != "_name_or_path"}
        companions = manifest.companions | table
        manifest = manifest.model_copy(update={"config": config, "companions": companions})
        content = canonical_json(manifest.model_dump(mode="json"))
        digest = digest_of(content)
        if not (self._blobs / digest).exists():
            write_bytes(self._blobs / digest, content)
        return digest

    def _digests(self, manifest: str) -> set[str]:
        """Of all blobs that the holder of this manifest may have."""
        listed = self._listed(manifest)
        pieces = {piece.digest for piece in listed.pieces}
        return {manifest, *listed.companions.values(), *pieces}

    def _listed(self, digest: str) -> Manifest:
        path = self._blobs / digest
        try:
            return Manifest.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise CheckpointError(f"{path}: no readable manifest; apply again") from error

    @contextmanager
    def _between_rounds(self, device: str) -> Iterator[bool]:
        """Whether no round asks the device; while the block runs, none begins to."""
        with closing(self._run.store(self.layout.size)) as store:
            store.database.execute("BEGIN IMMEDIATE")
            try:
                now = store.latest()
                yield now is None or now.phase.over or device not in now.cohort
            finally:
                store.database.execute("ROLLBACK")

    def _assignment(
        self, device: str, plan: Plan, digest: str, mixture: dict[str, float]
    ) -> Assignment:
        settings, manifest = self._settings, self._listed(digest)
        held, train = self.layout.held_under(plan), settings.train
        peak = predicted_peak(self.base, self.profile, plan, self.layout, mixture, train)
        cohort = settings.federation.cohort_size or self.devices.num_enrolled()
        return Assignment(
            run=settings.run,
            device=device,
            base=self.base.digest,
            plan=plan.digest,
            layout=held.digest,
            adapter=settings.adapter,
            adapter_seed=settings.seed,
            manifest=Blob(digest=digest, num_bytes=self.places[digest].num_bytes),
            companions={each: self.places[each].num_bytes for each in manifest.companions.values()},
            table=self.table,
            experts=self.experts,
            model_bytes=sum(piece.num_bytes for piece in manifest.pieces),
            memory_bytes=peak.peak,
            train=settings.train,
            clip_norm=settings.federation.clip_norm,
            cohort_size=settings.round_rules.needed(cohort),
            masked=settings.masked,
            noise=self._noise,
            rounds=settings.federation.rounds,
        )

    def _require_same_run(self) -> None:
        """Raises ConfigError unless rounds and plans so far were made for these settings."""
        self._run.store(self.layout.size).close()
        for device in self.devices.assigned()[:1]:  # all have the same base model
            plan = self.devices.plan_of(device)
            if plan is not None and plan.base != self.base.digest:
                raise ConfigError(
                    f"{self._run.path} belongs to base model {plan.base[:12]}, and base_model is "
                    f"{self.base.digest[:12]}; make another run directory for that"
                )


def _blob(path: Path | None) -> Blob | None:
    if path is None:
        return None
    content = path.read_bytes()
    return Blob(digest=digest_of(content), num_bytes=len(content))
