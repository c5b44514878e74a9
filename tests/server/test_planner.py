"""Plans are the simulation's; a device may have what its own plan names, whole and nothing else."""

import json
import shutil
import sqlite3

import numpy as np
import pytest
import torch

from proxymoe.client.advise import advice
from proxymoe.common.adapter import adapter_layout
from proxymoe.common.allocation import covered_energy
from proxymoe.common.assignment import Application
from proxymoe.common.certificates import DeviceCertificate
from proxymoe.common.domains import load_table
from proxymoe.common.errors import BudgetError, ConfigError
from proxymoe.common.experiment import load_experiment
from proxymoe.common.expert_table import load_expert_table
from proxymoe.common.files import digest_of
from proxymoe.common.manifest import Manifest, materialise
from proxymoe.common.model import TABLES_FILE, load
from proxymoe.common.plan import Precision
from proxymoe.server import prepare
from proxymoe.server.blobs import read_chunks
from proxymoe.server.extract import budget_bytes
from proxymoe.server.fit import predicted_peak
from proxymoe.server.planner import Planner
from proxymoe.server.profile import load_profile
from proxymoe.server.run_directory import RunDirectory
from proxymoe.server.settings import CoordinatorSettings
from proxymoe.server.store import Phase
from proxymoe.simulations import public, worker
from proxymoe.simulations.cli import EXPERIMENTS
from proxymoe.simulations.site import asset
from proxymoe.simulations.worker import Worker
from proxymoe.simulations.world import World, open_site
from tests.doors import NOW
from tests.reference import same_statistics
from tests.worlds import tiny_site, write_rows

DOMAINS = ("code", "kitchen", "math")
FEDERATION = {"rounds": 2, "cohort_size": 5}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny simulation, profiled by its own code in this process."""
    root = tmp_path_factory.mktemp("world")
    for name in ("code", "kitchen"):
        rows = [{"prompt": f"{name} {i} is", "completion": name[::-1] * i} for i in range(1, 9)]
        write_rows(root / "public" / f"{name}.jsonl", rows)
    site, base = tiny_site(root, evaluate={"public_domains": ["math", "code"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "_worker", Worker(site))
        for domain in DOMAINS:
            public.profile(domain, root / "profile")
        yield World(site, base, load_profile(root / "profile", base.digest))


@pytest.fixture(scope="module")
def prepared(world, tmp_path_factory):
    """A cache that need not be made again."""
    run = directory(world, tmp_path_factory.mktemp("prepared") / "run")
    Planner(run)
    return run.cache


@pytest.fixture
def run(world, prepared, tmp_path):
    return prepared_directory(world, prepared, tmp_path / "run")


@pytest.fixture
def planner(run):
    return populated(run)


def settings_like(experiment, **changes):
    fields = {
        "run": "town",
        "base_model": str(asset(experiment.base_model)),
        "calibration": str(asset(experiment.calibration)),
        "calibration_tokens": experiment.calibration_tokens,
        "seed": experiment.seed,
        "extract": experiment.extract,
        "adapter": experiment.adapter,
        "train": experiment.train,
        "federation": FEDERATION,
        "public_domains": experiment.evaluate.public_domains,
    }
    return CoordinatorSettings.model_validate(fields | changes)


def directory(world, path, **changes):
    return RunDirectory.create(path, settings_like(world.site.experiment, **changes), NOW)


def prepared_directory(world, prepared, path, **changes):
    run = directory(world, path, **changes)
    shutil.copytree(prepared, run.cache, dirs_exist_ok=True)
    return run


def populated(run, names=("kitchen", "garden")):
    planner = Planner(run)
    for name in names:
        admit(planner.devices, name)
    return planner


def admit(devices, name):
    key = digest_of(name.encode())
    devices.invite(name, "00" * 32, NOW + 60)
    assert devices.claim(name, key)
    devices.admit(DeviceCertificate(b"", name, "1", b"", key, NOW + 10**6))


def content(planner, digest):
    return b"".join(data for _, data in read_chunks(planner.places[digest], 0, 1 << 20))


def manifest_of(planner, assignment):
    return Manifest.model_validate_json(content(planner, assignment.manifest.digest))


def files_of(folder):
    """Everything in a submodel's folder; JSON by what it says."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = json.loads(found["config.json"])
    config.pop("_name_or_path", None)
    return {**found, "config.json": config}


def named_in(planner, assignment):
    manifest = manifest_of(planner, assignment)
    pieces = {piece.digest for piece in manifest.pieces}
    return {assignment.manifest.digest, *assignment.companions, *pieces}


def test_the_profile_is_the_simulations_to_the_bit(world, planner):
    assert planner.base.digest == world.base.digest
    assert planner.profile.num_tokens == world.profile.num_tokens
    for domain, layers in world.profile.domains.items():
        for at, expected in layers.items():
            found = planner.profile.domains[domain][at]
            assert torch.equal(found.energy, expected.energy)
            assert torch.equal(found.output, expected.output)


def test_a_base_model_that_does_not_fit_is_profiled_a_layer_at_a_time(world, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "WHOLE", 0.0)
    monkeypatch.setattr(prepare, "load", None)  # nothing loads it whole
    told = set()
    run = directory(world, tmp_path / "run")
    profile = prepare.prepare(run, lambda what, *_: told.add(what)).profile
    assert told == {"index", "profile", *(f"profile of {domain}" for domain in DOMAINS)}
    for domain, layers in world.profile.domains.items():
        assert same_statistics(profile.domains[domain], layers)


@pytest.mark.parametrize("extract", [{}, {"mode": "random"}, {"templates": 2}])
def test_plans_are_the_simulations(world, prepared, tmp_path, extract):
    run = prepared_directory(world, prepared, tmp_path / "run", extract=extract, seed=3)
    planner = populated(run)
    for device in world.site.devices:
        expected = world.cut(device, run.settings.extract, seed=3)
        found = planner.assign(device.name, Application(domain=device.domain))
        assert found.plan == expected.plan.digest
        assert found.model_bytes == expected.num_bytes
        layout = adapter_layout(world.base.skeleton, ("attention", "shared"), 4, 3)
        assert found.layout == layout.held_under(expected.plan).digest


def test_coverage_is_of_those_who_have_a_plan(planner):
    with pytest.raises(ConfigError, match="no device has a plan yet"):
        planner.coverage()
    for name in ("kitchen", "garden"):
        planner.assign(name, Application(domain="kitchen"))
    found = planner.coverage()
    assert (found.members, found.cohort_size, found.smallest_class) == (2, 2, 1)
    assert found.unheld.blocks == 0, "attention and shared experts are everybody's"
    assert found.wasted == 0


@pytest.mark.slow
def test_the_default_experiments_plans_are_the_simulations(tmp_path, monkeypatch):
    experiment = load_experiment(EXPERIMENTS / "default.toml", ("calibration_tokens=256",))
    site, base = open_site(experiment, tmp_path / "cache")
    monkeypatch.setattr(worker, "_worker", Worker(site))
    for path in asset(experiment.calibration).glob("*.jsonl"):
        public.profile(path.stem, tmp_path / "profile")
    world = World(site, base, load_profile(tmp_path / "profile", base.digest))
    planner = populated(directory(world, tmp_path / "run"), [d.name for d in site.devices])
    for device in site.devices:
        expected = world.cut(device, experiment.extract, experiment.seed).plan
        assert planner.assign(device.name, Application(domain=device.domain)).plan == (
            expected.digest
        )
    assert planner.canary()(None) == worker.canary_loss(None, 3, 40)


def test_the_canary_is_the_simulations(world, planner):
    canary = planner.canary()
    assert canary(None) == worker.canary_loss(None, 3, 40)
    vector = np.random.default_rng(0).normal(0, 0.05, planner.layout.size).astype(np.float32)
    assert canary(torch.from_numpy(vector)) == worker.canary_loss(vector, 3, 40)


@pytest.mark.parametrize("mode", ["drop", "mean"])
def test_everything_assigned_is_allowed_and_there_and_whole(world, prepared, tmp_path, mode):
    planner = populated(
        prepared_directory(world, prepared, tmp_path / "run", extract={"mode": mode})
    )
    assignment = planner.assign("kitchen", Application(domain="kitchen"))
    sizes = {assignment.manifest.digest: assignment.manifest.num_bytes, **assignment.companions}
    tables = {blob.digest: blob.num_bytes for blob in (assignment.table, assignment.experts)}
    sizes |= tables
    for digest in named_in(planner, assignment) | tables.keys():
        assert planner.allowed("kitchen", digest)
        found = content(planner, digest)
        assert digest_of(found) == digest
        assert len(found) == sizes.get(digest, len(found))
        assert digest in set(planner.places)
    manifest = manifest_of(planner, assignment)
    assert manifest.plan.digest == assignment.plan
    assert (TABLES_FILE in manifest.companions) == (mode != "drop")

    # What a device does with it: the simulation's submodel.
    folder = materialise(
        manifest,
        tmp_path / "device",
        lambda piece: content(planner, piece.digest),
        lambda name: content(planner, manifest.companions[name]),
    )
    expected = world.cut(world.site.device("kitchen"), planner._settings.extract, seed=0)
    assert files_of(folder) == files_of(world.site.submodels / expected.plan.digest)
    assert str(planner.base.folder) not in (folder / "config.json").read_text()
    loaded = load(folder)
    assert planner.layout.held_under(loaded.plan).digest == assignment.layout


def test_what_only_another_devices_plan_names_is_refused(planner):
    mine, other = (
        named_in(planner, planner.assign(name, Application(domain=domain)))
        for name, domain in (("kitchen", "kitchen"), ("garden", "math"))
    )
    foreign = other - mine
    pieces = {piece.digest for piece in planner.base.pieces if piece.expert is not None}
    assert foreign & pieces
    for digest in foreign | {digest_of(b"no such blob"), "", "../keys/ca.key"}:
        assert not planner.allowed("kitchen", digest)
    assert not any(planner.allowed("stranger", digest) for digest in mine)
    planner.devices.revoke("kitchen")
    assert not any(planner.allowed("kitchen", digest) for digest in mine)
    for table in (planner.table, planner.experts):
        assert planner.allowed("garden", table.digest)
        assert not planner.allowed("kitchen", table.digest)


def test_places_have_no_paths_for_what_is_no_digest(planner):
    assert "../prepare.lock" not in planner.places
    assert planner.places.get("ab" * 32) is None
    assert len(planner.places) == len(set(planner.places))


def test_the_same_application_gets_the_same_also_from_another_process(planner, run):
    asked = Application(mixture={"code": 0.5, "math": 0.5})
    first = planner.assign("kitchen", asked)
    records = len(planner.devices.history())
    assert planner.assign("kitchen", asked) == first
    assert Planner(run).assign("kitchen", asked) == first
    assert len(planner.devices.history()) == records


def test_a_mixture_makes_a_new_plan_when_enough_of_it_has_moved(planner):
    def assigned(code):
        planner.assign("kitchen", Application(mixture={"code": code, "math": 1 - code}))
        return planner.devices.planned("kitchen").application.mixture["code"]

    assert assigned(0.5) == 0.5
    assert assigned(0.6) == 0.5
    assert assigned(0.69) == 0.5
    assert assigned(0.71) == 0.71
    assert assigned(0.6) == 0.71


def test_another_domain_or_budget_is_another_application(planner):
    plain = planner.assign("kitchen", Application())
    named = planner.assign("kitchen", Application(domain="code"))
    smaller = Application(domain="code", budget_bytes=named.model_bytes * 9 // 10)
    small = planner.assign("kitchen", smaller)
    assert len({plain.plan, named.plan, small.plan}) == 3
    assert small.model_bytes <= smaller.budget_bytes
    assert planner.assign("kitchen", Application(domain="nobody knows it".replace(" ", "_"))).plan
    assert planner.assign("kitchen", Application()) == plain


def test_a_device_gets_no_more_than_the_coordinator_gives(world, prepared, tmp_path, planner):
    own = budget_bytes(planner.base, planner._settings.extract)
    greedy = Application(domain="math", budget_bytes=10**12)
    assert planner.assign("kitchen", greedy).model_bytes <= own
    generous = prepared_directory(
        world, prepared, tmp_path / "generous", largest_budget_bytes=10**12
    )
    full = populated(generous).assign("kitchen", greedy)
    assert full.model_bytes == planner.base.num_bytes


def test_impossible_applications_are_refused_and_leave_no_trace(planner):
    with pytest.raises(BudgetError, match="smallest that fits"):
        planner.assign("kitchen", Application(budget_bytes=1000))
    with pytest.raises(ConfigError, match="not in the profile"):
        planner.assign("kitchen", Application(mixture={"poetry": 1.0}))
    assert planner.devices.planned("kitchen") is None


def test_while_a_round_asks_a_device_it_keeps_its_plan(planner, run):
    before = planner.assign("kitchen", Application(domain="math"))
    store = run.store(planner.layout.size)
    store.begin(1, NOW)
    store.enter(1, Phase.DISTRIBUTING, NOW, cohort=["kitchen"])
    moved = Application(domain="code")
    assert planner.assign("kitchen", moved) == before
    assert planner.members()["kitchen"].plan.digest == before.plan
    assert planner.assign("garden", moved).plan  # it is not asked
    store.enter(1, Phase.ABANDONED, NOW)
    after = planner.assign("kitchen", moved)
    assert after.plan != before.plan
    assert planner.members()["kitchen"].plan.digest == after.plan
    store.close()


def test_no_round_begins_while_a_plan_changes(planner, run, monkeypatch):
    keep, refused = planner.devices.keep_plan, []

    def meanwhile(*arguments):
        database = sqlite3.connect(run.path / "state.db", timeout=0)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            database.execute("BEGIN IMMEDIATE")
        database.close()
        refused.append(True)
        keep(*arguments)

    monkeypatch.setattr(planner.devices, "keep_plan", meanwhile)
    planner.assign("kitchen", Application())
    assert refused


def test_members_are_those_enrolled_with_a_plan_at_any_moment(planner):
    members = planner.members(planner.devices)
    assert list(members) == []
    planner.assign("kitchen", Application(domain="math"))
    assert list(members) == ["kitchen"]
    assert "garden" not in members
    admit(planner.devices, "attic")
    planner.assign("attic", Application())
    assert list(members) == ["attic", "kitchen"]
    assert len(members) == 2
    plan = planner.devices.plan_of("attic")
    assert members["attic"].plan == plan
    assert members["attic"].layout.digest == planner.layout.held_under(plan).digest
    planner.devices.revoke("attic")
    assert list(members) == ["kitchen"]
    assert "attic" not in members
    assert members["attic"].plan == plan  # a round may be on
    with pytest.raises(KeyError):
        members["stranger"]


def test_the_federation_is_what_the_settings_say(planner, run):
    federation = planner.federation(lambda vector: 1.5 if vector is None else 9.0)
    assert federation.canary_limit == 1.5 + run.settings.federation.canary_tolerance
    assert (federation.run, federation.seed) == ("town", 0)
    assert federation.base == planner.base.digest
    assert federation.settings == run.settings.federation


@pytest.mark.parametrize(
    ("asked", "rules", "promised"),
    [(5, {"quorum": 0.5}, 3), (None, {}, 2), (None, {"min_devices": 7}, 7), (9, {}, 8)],
)
def test_the_cohort_promised_is_what_a_round_must_have(
    world, prepared, tmp_path, asked, rules, promised
):
    changes = {"federation": {"cohort_size": asked}, "rules": rules}
    planner = populated(prepared_directory(world, prepared, tmp_path / "run", **changes))
    assert planner.assign("kitchen", Application()).cohort_size == promised


def test_the_table_is_of_the_public_domains(planner):
    table = load_table(planner.places[planner.table.digest].path)
    assert table.domains == DOMAINS
    assert table.vocab_size == planner.base.config.vocab_size


def test_what_a_device_expects_of_another_plan_is_what_it_gets(planner):
    table = load_expert_table(planner.places[planner.experts.digest].path)
    here = planner.assign("kitchen", Application(domain="kitchen"))
    mixture = {"code": 0.25, "kitchen": 0.0, "math": 0.75}
    found = advice(table, mixture, manifest_of(planner, here).plan, mixture)
    wishes = Application(domain=found.domain), Application(mixture=mixture)
    for wish, promised in zip(wishes, (found.by_domain, found.by_mixture), strict=True):
        plan = manifest_of(planner, planner.assign("kitchen", wish)).plan
        assert covered_energy(table.mix(mixture), plan.kept) == promised
    assert found.covered < found.best


def test_an_expert_table_is_of_the_settings_and_a_single_domain_has_no_tables(
    world, prepared, tmp_path, planner
):
    experts = {"floor": 1.0, "experts": "int8"}
    other = Planner(prepared_directory(world, prepared, tmp_path / "other", extract=experts))
    assert other.table == planner.table
    assert other.experts is not None
    table = load_expert_table(other.places[other.experts.digest].path)
    assert (table.floor, table.domains) == (1.0, DOMAINS)
    assert table.expert_bytes == other.base.held_expert_bytes(Precision.INT8)

    text = tmp_path / "public"
    write_rows(text / "math.jsonl", [{"text": f"{i} + {i} = {2 * i}"} for i in range(9)])
    changes = {"calibration": str(text), "public_domains": ("math",)}
    single = populated(directory(world, tmp_path / "single", **changes))
    assert (single.table, single.experts) == (None, None)
    assert single.assign("kitchen", Application()).experts is None


def test_a_device_is_told_the_peak_that_its_budget_would_have(planner):
    application = Application(domain="math")
    assignment = planner.assign("kitchen", application)
    plan, train = planner.devices.plan_of("kitchen"), planner._settings.train
    found = predicted_peak(
        planner.base, planner.profile, plan, planner.layout, {"math": 1.0}, train
    )
    assert assignment.memory_bytes == found.peak > assignment.model_bytes


def test_preparing_is_told_of_goes_on_where_it_was_and_is_done_once(world, tmp_path):
    run, told = directory(world, tmp_path / "run"), []

    def interrupt(name, done, total):
        if (name, done) == ("profile", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Planner(run, interrupt)
    Planner(run, lambda *stage: told.append(stage))
    assert [stage for stage in told if stage[0] == "profile"] == [
        ("profile", 2, 3),
        ("profile", 3, 3),
    ]
    told.clear()
    Planner(run, lambda *stage: told.append(stage))
    assert told[-1] == ("profile", 3, 3)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"public_domains": ["poetry"]}, r"\['poetry'\]: no such <domain>.jsonl in .*there are"),
        ({"base_model": "gone"}, "base_model gone: no such folder"),
        ({"calibration": "gone"}, "calibration gone: no such folder"),
    ],
)
def test_settings_that_lead_nowhere_are_refused(world, tmp_path, changes, refused):
    run = directory(world, tmp_path / "run", **changes)
    with pytest.raises(ConfigError, match=refused):
        Planner(run)


def test_a_run_directory_is_one_adapters_and_one_base_models(planner, run, monkeypatch):
    planner.assign("kitchen", Application())
    wider = run.settings.adapter.model_copy(update={"rank": 8})
    other = RunDirectory(run.path)
    other.settings = run.settings.model_copy(update={"adapter": wider})
    with pytest.raises(ConfigError, match="belongs to a federation with"):
        Planner(other)
    plan = planner.devices.plan_of("kitchen").model_copy(update={"base": "ab" * 32})
    planner.devices.keep_plan("kitchen", Application(), plan, "cd" * 32, [])
    with pytest.raises(ConfigError, match="belongs to base model abababababab"):
        Planner(run)
