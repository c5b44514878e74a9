import functools
import json
import time
from pathlib import Path

import grpc
import pytest
import torch

from proxymoe.client import submodel
from proxymoe.client.attempts import Patience
from proxymoe.client.entries import Kind
from proxymoe.client.home import Home
from proxymoe.client.personalize import personalize
from proxymoe.client.policy import Coordinator, Privacy, Resources, Training
from proxymoe.client.proxy import (
    GatesClosed,
    PolicyRefused,
    apply,
    describe_data,
    fetch_proxy,
    fetch_table,
    open_device,
    request_of,
)
from proxymoe.client.retry import Backoff, TransferError, TransferRefused
from proxymoe.client.store import QuotaError
from proxymoe.common.assignment import Application, Blob
from proxymoe.common.domains import domain_table, table_bytes
from proxymoe.common.errors import ConfigError, DataError, LayoutMismatch, ProtocolError
from proxymoe.common.files import digest_of
from proxymoe.common.messages import TrainTask, encode
from proxymoe.common.plan import read_plan
from proxymoe.server.base import BaseCheckpoint
from proxymoe.simulations import worker
from proxymoe.simulations.site import device_examples
from tests.assigner import PUBLIC_KEY, SEED, Assigner, easy_policy, enrolled_home, set_policy
from tests.blob_site import Authority
from tests.doors import free_port
from tests.tiny import VOCABULARY
from tests.worlds import tiny_site, write_rows

HERE = submodel.answer
"""Does jobs in this process, which has model code anyway."""
fetched_proxy = functools.partial(fetch_proxy, work=HERE)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    site, base = tiny_site(root, seed=SEED)
    return root, site, base


@pytest.fixture
def assigner(world, tmp_path):
    folder = tmp_path / "blobs"
    folder.mkdir()
    with Assigner(world[2], folder).serving() as assigner:
        yield assigner


@pytest.fixture
def home(world, assigner, tmp_path):
    policy = easy_policy(world[0] / "devices" / "kitchen")
    return enrolled_home(tmp_path / "home", policy, assigner.port)


def quick(pauses):
    return Patience(Backoff(retries=2, first_seconds=1.0), lambda: 0.0, pauses.append)


def joined(home, assigner, *kept, **changes):
    assigner.assign(*kept, **changes)
    assignment = apply(home, Application())
    return assignment, fetched_proxy(home, assignment)


def kinds(home):
    return [record.entry.kind for record in reversed(home.ledger().newest())]


# Applying


def test_an_application_is_answered_kept_and_on_record(assigner, home):
    wanted = assigner.assign(0, 1)
    assert apply(home, Application(domain="kitchen", budget_bytes=10**6)) == wanted
    assert assigner.applications == [Application(domain="kitchen", budget_bytes=10**6)]
    assert home.assignment() == wanted
    (record,) = home.ledger().newest()
    assert record.is_confirmed
    assert (record.entry.kind, record.entry.epsilon) == (Kind.REQUEST, None)


def test_a_coordinator_that_is_away_is_asked_again(assigner, home):
    assigner.assign(0)
    pauses: list[float] = []
    assigner.failing = [(grpc.StatusCode.UNAVAILABLE, "busy")] * 2
    apply(home, Application(), patience=quick(pauses))
    assert pauses == [0.5, 1.0]
    assigner.failing = [(grpc.StatusCode.UNAVAILABLE, "busy")] * 3
    with pytest.raises(TransferError, match="UNAVAILABLE, 'busy', at 3 attempts"):
        apply(home, Application(), patience=quick(pauses))


def test_an_unreachable_coordinator_is_an_error_to_try_again_after(home):
    home.keep_enrolment(home.enrolled().model_copy(update={"blobs": f"127.0.0.1:{free_port()}"}))
    with pytest.raises(TransferError, match="is the coordinator running") as found:
        apply(home, Application(), patience=quick([]))
    assert not isinstance(found.value, TransferRefused)
    assert not home.ledger().newest()[0].is_confirmed


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (grpc.StatusCode.PERMISSION_DENIED, "enrol this device again"),
        (grpc.StatusCode.INVALID_ARGUMENT, "apply for something else"),
    ],
)
def test_what_is_refused_for_good_is_asked_once(assigner, home, code, remedy):
    assigner.failing = [(code, "no such domain\x1b" + "x" * 1000)]
    with pytest.raises(TransferRefused, match=remedy) as found:
        apply(home, Application(domain="mars"))
    assert len(assigner.applications) == 1
    assert len(str(found.value)) < 500
    assert "\x1b" not in str(found.value)


def test_an_answer_by_anybody_else_is_not_kept(assigner, home):
    assigner.assign(0, device="tablet")
    with pytest.raises(ProtocolError, match="for device tablet"):
        apply(home, Application())
    home.keep_enrolment(home.enrolled().model_copy(update={"public_key": "0" * 64}))
    set_policy(home, easy_policy(coordinator=Coordinator(public_key="0" * 64)))
    with pytest.raises(ProtocolError, match="not signed by the pinned"):
        apply(home, Application())
    assert not home.assignment_file.exists()


def test_a_coordinator_that_the_owner_does_not_trust_hears_nothing(assigner, home):
    set_policy(home, easy_policy(coordinator=Coordinator(public_key="0" * 64)))
    with pytest.raises(PolicyRefused, match=r"coordinator\.public_key") as found:
        apply(home, Application())
    assert [objection.key for objection in found.value.objections] == ["coordinator.public_key"]
    assert assigner.applications == home.ledger().newest() == []


def test_a_certificate_that_ran_out_says_so(assigner, home):
    home.write_private(home.certificate, Authority().issue("kitchen")[0])
    with pytest.raises(ProtocolError, match="signed by a foreign CA; enrol again"):
        apply(home, Application())
    assert home.ledger().newest() == []


def test_who_is_not_enrolled_cannot_apply(tmp_path):
    with pytest.raises(ConfigError, match="enrol first"):
        apply(Home.create(tmp_path), Application())


# Fetching


def test_a_fetched_submodel_is_the_very_one_of_the_simulation(world, assigner, home):
    told: list[tuple[int, int]] = []
    assignment = assigner.assign(1, 2, 5)
    apply(home, Application())
    folder = fetched_proxy(home, assignment, lambda *counts: told.append(counts))
    base: BaseCheckpoint = world[2]
    expected = base.materialise(assigner.plan(1, 2, 5), world[0] / "expected")
    for path in expected.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    assert [path.name for path in home.submodels.iterdir()] == [assignment.plan]
    assert told[-1][0] == told[-1][1] == sum(home.store().pins()[assignment.plan].values())
    fetches = [record.entry for record in home.ledger().newest()[:-1]]
    assert {entry.kind for entry in fetches} == {Kind.REQUEST}
    assert sum(entry.fetched_bytes for entry in fetches) == told[-1][1]


def test_a_transfer_is_on_record_piece_by_piece(assigner, home, monkeypatch):
    monkeypatch.setattr("proxymoe.client.bring.BATCH_BYTES", 50_000)
    assignment, _ = joined(home, assigner, 0)
    needs = home.store().pins()[assignment.plan]
    fetched = [r.entry.fetched_bytes for r in home.ledger().newest() if r.entry.fetched_bytes]
    assert len(fetched) > 2
    assert max(fetched) <= max(50_000, *needs.values())
    assert sum(fetched) == sum(needs.values())


def test_a_second_time_nothing_is_done(assigner, home):
    assignment, folder = joined(home, assigner, 0, 3)
    before, number = list(assigner.fetched), len(home.ledger().newest())
    stat = (folder / "model.safetensors").stat()
    assert fetched_proxy(home, assignment) == folder
    assert (folder / "model.safetensors").stat() == stat
    assert (assigner.fetched, len(home.ledger().newest())) == (before, number)


def test_a_changed_plan_transfers_what_is_new_and_drops_what_is_old(assigner, home):
    joined(home, assigner, 0, 1)
    fetched = set(assigner.fetched)
    assigner.fetched.clear()
    assignment, folder = joined(home, assigner, 1, 2)
    new = {
        piece.digest
        for piece in assigner.base.manifest(assigner.plan(1, 2)).pieces
        if piece.expert == 2
    }
    assert set(assigner.fetched) == new | {assignment.manifest.digest}
    assert not set(assigner.fetched) & fetched
    assert [path.name for path in home.submodels.iterdir()] == [folder.name]
    assert set(home.store().pins()) == {assignment.plan}
    assert home.ledger().newest()[0].entry.fetched_bytes == sum(
        home.store().path(digest).stat().st_size for digest in new
    )


def test_a_damaged_submodel_is_built_again_without_a_transfer(assigner, home):
    assignment, folder = joined(home, assigner, 0)
    weights, fetched = folder / "model.safetensors", len(assigner.fetched)
    whole = weights.read_bytes()
    for damage in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        weights.write_bytes(damage)
        fetched_proxy(home, assignment)
        assert weights.read_bytes() == whole
    weights.unlink()
    fetched_proxy(home, assignment)
    assert weights.read_bytes() == whole
    assert len(assigner.fetched) == fetched


def test_a_damaged_blob_is_fetched_again(assigner, home):
    assignment, folder = joined(home, assigner, 0)
    digest = assigner.base.manifest(assigner.plan(0)).pieces[3].digest
    blob = home.store().path(digest)
    blob.write_bytes(bytes(blob.stat().st_size))
    (folder / "contents.json").unlink()
    assigner.fetched.clear()
    fetched_proxy(home, assignment)
    assert assigner.fetched == [digest]
    assert read_plan(folder).digest == assignment.plan


def test_an_interrupted_build_leaves_no_submodel_and_is_done_next_time(assigner, home):
    assignment = assigner.assign(0)
    apply(home, Application())

    def interrupted(job):
        folder = Path(json.loads(job[1])["folder"])
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_proxy(home, assignment, work=interrupted)
    assert not home.submodel(assignment.plan).exists()
    fetched = len(assigner.fetched)
    assert fetched_proxy(home, assignment).name == assignment.plan
    assert len(assigner.fetched) == fetched
    assert len(list(home.submodels.iterdir())) == 1


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"coordinator": Coordinator(public_key="0" * 64)}, "coordinator.public_key"),
        ({}, "data.folder"),
        ({"resources": Resources(network_mb_per_month=0)}, "resources.network_mb_per_month"),
        ({"resources": Resources(memory_mb=49)}, "resources.memory_mb"),
        ({"resources": Resources(disk_mb=0)}, "resources.disk_mb"),
        ({"privacy": Privacy(smallest_cohort=3)}, "privacy.smallest_cohort"),
        (
            {"privacy": Privacy(smallest_cohort=2, largest_clip_norm=9.0)},
            "privacy.largest_clip_norm",
        ),
        ({"privacy": Privacy(smallest_cohort=2, noise_required=True)}, "privacy.noise_required"),
        ({"training": Training(largest_rank=3)}, "training.largest_rank"),
        ({"training": Training(largest_steps=2)}, "training.largest_steps"),
    ],
)
def test_what_the_policy_forbids_is_not_fetched(world, assigner, home, sections, key):
    assignment = assigner.assign(0)
    apply(home, Application())
    data = None if key == "data.folder" else world[0] / "devices" / "kitchen"
    set_policy(home, easy_policy(data, **sections))
    with pytest.raises(PolicyRefused) as found:
        fetched_proxy(home, assignment)
    assert [objection.key for objection in found.value.objections] == [key]
    assert assigner.fetched == []


def test_what_was_fetched_this_month_counts(assigner, home):
    assignment = assigner.assign(0)
    asked = request_of(home, assignment)
    assert asked.network_bytes == assignment.model_bytes + assignment.manifest.num_bytes + sum(
        assignment.companions.values()
    )
    assert asked.disk_bytes > 2 * assignment.model_bytes
    joined(home, assigner, 0)
    assert request_of(home, assignment).network_bytes == 0
    used = home.usage(time.time()).network_bytes
    assert used > assignment.model_bytes


def test_closed_gates_keep_everything_where_it_is(world, assigner, home):
    assignment = assigner.assign(0)
    apply(home, Application())
    resources = Resources(spare_disk_mb=10**9, spare_memory_mb=0)
    set_policy(home, easy_policy(world[0] / "devices" / "kitchen", resources=resources))
    with pytest.raises(GatesClosed, match="disk: closed") as found:
        fetched_proxy(home, assignment)
    assert [gate.name for gate in found.value.gates] == ["disk"]
    assert assigner.fetched == []


def test_a_gate_that_closes_meanwhile_stops_the_transfer(world, assigner, home, monkeypatch):
    assignment = assigner.assign(0, 1, 2)
    apply(home, Application())
    monkeypatch.setattr("proxymoe.client.bring.GATE_SECONDS", 0.0)
    data = world[0] / "devices" / "kitchen"

    def close(done, total):
        resources = Resources(spare_memory_mb=10**9, spare_disk_mb=0)
        set_policy(home, easy_policy(data, resources=resources))

    with pytest.raises(GatesClosed, match="memory: closed"):
        fetched_proxy(home, assignment, close)
    set_policy(home, easy_policy(data))
    assert fetched_proxy(home, assignment).is_dir()


def test_without_room_beside_it_the_old_submodel_goes_first(world, assigner, home, monkeypatch):
    joined(home, assigner, 0, 1)
    monkeypatch.setattr("proxymoe.client.home.MB", 1)  # the limit can be exact then
    assignment = assigner.assign(2, 3)
    limit = request_of(home, assignment).disk_bytes
    monkeypatch.setattr("proxymoe.client.policy.MB", 1)
    resources = Resources(
        disk_mb=limit,
        memory_mb=10**9,
        network_mb_per_month=10**9,
        spare_memory_mb=0,
        spare_disk_mb=0,
    )
    set_policy(home, easy_policy(world[0] / "devices" / "kitchen", resources=resources))
    apply(home, Application())
    assert fetched_proxy(home, assignment).is_dir()
    blobs = sum(path.stat().st_size for path in (home.store_folder / "blobs").iterdir())
    built = sum(path.stat().st_size for path in home.submodels.rglob("*") if path.is_file())
    assert blobs + built <= limit


def test_more_than_the_disk_has_is_a_clear_error(world, assigner, home):
    assignment = assigner.assign(0, model_bytes=1)
    apply(home, Application())
    set_policy(
        home,
        easy_policy(
            world[0] / "devices" / "kitchen",
            resources=Resources(disk_mb=0, spare_memory_mb=0, spare_disk_mb=0),
        ),
    )
    with pytest.raises((PolicyRefused, QuotaError)):
        fetched_proxy(home, assignment)


@pytest.mark.parametrize("harm", ["plan", "base", "name", "companion", "code", "nothing"])
def test_a_manifest_that_was_not_assigned_is_refused(assigner, home, harm):
    manifest = json.loads(assigner.base.manifest(assigner.plan(0)).model_dump_json())
    first = sorted(manifest["companions"])[0]
    if harm == "plan":
        manifest = json.loads(assigner.base.manifest(assigner.plan(1)).model_dump_json())
    elif harm == "base":
        manifest["plan"]["base"] = "0" * 64
    elif harm == "name":
        manifest["companions"]["../../escaped"] = manifest["companions"].pop(first)
    elif harm == "companion":
        manifest["companions"][first] = "0" * 64
    elif harm == "code":
        manifest["config"]["auto_map"] = {"AutoConfig": "evil.Config"}
    content = json.dumps(manifest if harm != "nothing" else []).encode()
    assignment = assigner.assign(0, manifest=assigner.add(content))
    apply(home, Application())
    with pytest.raises(ProtocolError, match="manifest: "):
        fetched_proxy(home, assignment)
    assert not home.submodel(assignment.plan).exists()
    assert not list(home.path.rglob("escaped"))


@pytest.mark.slow
def test_a_job_in_a_process_of_its_own_builds_the_same(assigner, home):
    assignment, folder = joined(home, assigner, 0)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    fetch_proxy(home, assignment)
    assert (folder / "model.safetensors").read_bytes() == whole


# Opening


def test_a_device_answers_bit_for_bit_as_in_the_simulation(world, assigner, home):
    assignment, _ = joined(home, assigner, 1, 4)
    _, site, base = world
    plan = assigner.plan(1, 4)
    base.materialise(plan, site.submodels / plan.digest)
    simulated, device = worker.open_device(site, "kitchen", plan.digest), open_device(home)
    assert device.layout.digest == simulated.layout.digest == assignment.layout
    tokenizer = device.loaded.tokenizer
    expected = device_examples(site.device("kitchen"), "train", tokenizer, site.experiment)
    assert tuple(device.examples) == expected.examples
    task = encode(
        TrainTask(
            run="run",
            round=0,
            device="kitchen",
            base=assignment.base,
            plan=plan.digest,
            layout=assignment.layout,
            train=assignment.train,
            clip_norm=10.0,
            seed=3,
        ),
        torch.zeros(device.layout.size).numpy(),
    )
    answers = [personalize(each, task) for each in (device, simulated)]
    vectors = [answer[-4 * device.layout.size :] for answer in answers]
    assert vectors[0] == vectors[1]


def test_an_adapter_of_another_kind_is_refused(assigner, home):
    joined(home, assigner, 0, layout="f" * 64)
    with pytest.raises(LayoutMismatch, match="assigned was ffffffffffff"):
        open_device(home)


def test_without_data_no_device_opens(assigner, home, tmp_path):
    with pytest.raises(ConfigError, match="no plan is assigned"):
        open_device(home)
    joined(home, assigner, 0)
    for folder in (None, tmp_path / "nowhere"):
        set_policy(home, easy_policy(folder))
        with pytest.raises(DataError):
            open_device(home)


# Describing


@pytest.fixture
def described(assigner, home, tmp_path):
    """A home whose data is mostly digits, and an assignment with a table of letters and digits."""
    rows = [{"text": f"{i:05d} {i * 7:05d}"} for i in range(150)]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    set_policy(home, easy_policy(tmp_path / "data"))
    counts = {"digits": [0] * VOCABULARY, "letters": [0] * VOCABULARY}
    for domain, letters in (("digits", "0123456789 "), ("letters", "abcdefghijklm ")):
        for letter in letters:
            counts[domain][ord(letter) - 28] = 50
    table = domain_table(counts)
    assigner.assign(0, table=assigner.add(table_bytes(table)))
    return home, apply(home, Application()), table


def test_a_mixture_is_noised_once_and_paid_for_once(assigner, described):
    home, assignment, table = described
    fetched = fetch_table(home, assignment)
    assert table_bytes(fetched) == table_bytes(table)
    assert not set(assigner.fetched) & {p.digest for p in assigner.base.pieces}
    mixture = describe_data(home, fetched, work=HERE)
    assert mixture["digits"] > 0.5
    assert sum(mixture.values()) == pytest.approx(1.0)
    assert describe_data(home, fetched, work=HERE) == mixture
    assert Kind.MIXTURE not in kinds(home)  # nothing has left yet
    for budget in (None, 10**6):
        apply(home, Application(mixture=mixture, budget_bytes=budget))
    costs = [r.entry.epsilon for r in home.ledger().newest() if r.entry.kind is Kind.MIXTURE]
    assert costs == [None, 1.0]
    assert home.usage(time.time()).epsilon == 1.0
    spent = home.mixture()
    assert spent is not None
    assert spent.is_spent
    describe_data(home, fetched, anew=True, work=HERE)  # noise may lead to the same corner again
    anew = home.mixture()
    assert anew is not None
    assert not anew.is_spent


def test_a_mixture_that_was_not_released_here_does_not_leave(assigner, described):
    home, _, _ = described
    with pytest.raises(ConfigError, match="not noised here"):
        apply(home, Application(mixture={"digits": 1.0}))
    assert len(assigner.applications) == 1


def test_where_no_mixture_may_leave_none_is_made(assigner, described, tmp_path):
    home, assignment, table = described
    set_policy(home, easy_policy(tmp_path / "data", privacy=Privacy(smallest_cohort=2)))
    for ask in (
        lambda: fetch_table(home, assignment),
        lambda: describe_data(home, table, work=HERE),
    ):
        with pytest.raises(PolicyRefused, match=r"privacy\.mixture_may_leave"):
            ask()
    assert assigner.fetched == []
    assert home.mixture() is None


def test_a_mixture_that_costs_too_much_is_not_made(described, tmp_path):
    home, _, table = described
    privacy = Privacy(mixture_may_leave=True, largest_epsilon=0.5)
    set_policy(home, easy_policy(tmp_path / "data", privacy=privacy))
    with pytest.raises(PolicyRefused, match=r"privacy\.largest_epsilon"):
        describe_data(home, table, work=HERE)


def test_too_few_rows_tell_how_many_it_takes(described, tmp_path):
    home, assignment, _ = described
    write_rows(tmp_path / "data" / "train.jsonl", [{"text": "12345"}] * 9)
    with pytest.raises(DataError, match="9 rows are too few"):
        describe_data(home, fetch_table(home, assignment), work=HERE)


def test_a_coordinator_without_a_table_says_so(assigner, home):
    assigner.assign(0)
    with pytest.raises(ConfigError, match="no domain table"):
        fetch_table(home, apply(home, Application()))


def test_the_table_stays_when_the_submodel_comes(assigner, described):
    home, assignment, _ = described
    fetch_table(home, assignment)
    fetched_proxy(home, assignment)
    assert set(home.store().pins()) == {"table", assignment.plan}


def test_a_blob_is_named_by_its_digest(assigner):
    assert assigner.add(b"x") == Blob(digest=digest_of(b"x"), num_bytes=1)
    assert PUBLIC_KEY
