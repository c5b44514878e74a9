"""What the ServerApp adds to the engine: who a node is, tickets for tasks, opened envelopes."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict

from proxymoe.client.app import enveloped
from proxymoe.client.entries import Kind
from proxymoe.client.guard import Guard
from proxymoe.common import identity
from proxymoe.common.assignment import Assignment, Blob, issue_assignment
from proxymoe.common.certificates import sign_device, signing_request
from proxymoe.common.config import AdapterSettings
from proxymoe.common.files import digest_of
from proxymoe.common.identity import key_digest, verifying_key
from proxymoe.common.keys_at_rest import write_key
from proxymoe.common.messages import CONTENT, DESCRIBE, RECORD, decode
from proxymoe.common.sealing import MAGIC
from proxymoe.common.tickets import verify_ticket
from proxymoe.server.app import GridTransport
from proxymoe.server.devices import Devices
from proxymoe.server.engine import RoundEngine, Rules
from proxymoe.server.round import tasks_of
from proxymoe.server.serverapp import admission, sealing, ticketing
from proxymoe.server.store import Phase, RoundStore
from proxymoe.simulations.faults.cohort import InMemory, honest, plain, small_federation
from tests.assigner import SIGNING, easy_policy, enrolled_home
from tests.clock import Clock
from tests.grid import LocalGrid
from tests.runs import run_directory

NOW = time.time()
NODE = 2**64 - 5
FEDERATION = small_federation()


@pytest.fixture
def run(tmp_path):
    return run_directory(tmp_path / "d", run=FEDERATION.run, rules={"quorum": 0.5})


@pytest.fixture
def store(run):
    store = run.store(FEDERATION.layout.size)
    yield store
    store.close()


def nodes(keys):
    """What a grid says of nodes with these public keys."""
    return lambda: [SimpleNamespace(node_id=n, public_key=key) for n, key in keys.items()]


def enrolled(run, name):
    """The devices, and the public key of this one, which is enrolled; its node is not known."""
    key, devices = identity.new_device_key(), Devices(run.devices_db)
    certificate = sign_device(run.authority, name, signing_request(name, key), NOW)
    devices.invite(name, "0" * 64, NOW + 60)
    assert devices.claim(name, certificate.key)
    devices.admit(certificate)
    return devices, identity.public_key(key)


def test_a_node_that_was_registered_for_a_device_is_that_device_and_no_other(run):
    devices, public_key = enrolled(run, "phone")
    devices.note_node(key_digest(public_key), NODE)
    is_device = admission(devices, nodes({}))
    assert is_device(NODE, "phone")
    assert not is_device(NODE + 1, "phone")


def test_a_node_whose_registration_was_cut_short_is_known_by_its_key(run):
    devices, public_key = enrolled(run, "phone")
    told = nodes({3: b"", 4: b"no key", NODE: public_key})
    assert admission(devices, told)(NODE, "phone")
    assert devices.node_of("phone") == NODE


def test_a_node_with_another_key_is_nobody(run):
    devices, _ = enrolled(run, "phone")
    stranger = identity.public_key(identity.new_device_key())
    is_device = admission(devices, nodes({NODE: stranger}))
    assert not is_device(NODE, "phone")
    assert not is_device(NODE, "laptop")


def test_a_revoked_device_is_no_longer_its_node(run):
    devices, public_key = enrolled(run, "phone")
    devices.note_node(key_digest(public_key), NODE)
    devices.revoke("phone")
    assert not admission(devices, nodes({NODE: public_key}))(NODE, "phone")


def test_every_task_has_a_ticket_that_its_device_accepts(run, store):
    store.begin(1, NOW)
    store.enter(1, Phase.DISTRIBUTING, NOW, cohort=["a", "b", "c"])
    ticket_of = ticketing(run, FEDERATION, store, clock=lambda: NOW)
    tasks = tasks_of(FEDERATION, store.state(1, 0), ["a", "b", "c"])
    for name, task in tasks.items():
        header, _ = decode(task)
        member = FEDERATION.members[name]
        ticket = verify_ticket(
            ticket_of(name, task),
            verifying_key(run.signing_key),
            NOW,
            device=name,
            base=FEDERATION.base,
            plan=member.plan.digest,
            layout=member.layout.digest,
            task=task,
        )
        assert (ticket.run, ticket.round) == (header.run, 1)
        assert ticket.cohort_size == 2  # half of three, rounded up
        assert ticket.expires - ticket.issued >= run.settings.rules.deadline_seconds


# Rounds in the clear, past the guards of real devices


class Guarded:
    """A node that answers as a device does: past its guard, and with what that lets out."""

    def __init__(self, home):
        self.home, self._guard = home, Guard(home)

    def __call__(self, message):
        answer: RecordDict | Error
        if (word := self._guard.check(message)) is not None:
            answer = Error(6, word)
        elif message.metadata.message_type == DESCRIBE:
            answer = RecordDict({RECORD: ConfigRecord(describe(self.home))})
        else:
            reply = honest(message.content[RECORD][CONTENT])
            answer = RecordDict({RECORD: ConfigRecord({CONTENT: reply})})
        with self._guard.sending(message, answer) as envelope:
            return Message(enveloped(answer, envelope), reply_to=message)


def describe(home):
    assignment = home.assignment()
    return {"device": assignment.device, "plan": assignment.plan}


def home_of(folder, name):
    """The home of a device of the federation, with its plan assigned."""
    home, member = enrolled_home(folder, easy_policy(folder), device=name), FEDERATION.members[name]
    assignment = Assignment(
        run=FEDERATION.run,
        device=name,
        base=FEDERATION.base,
        plan=member.plan.digest,
        layout=member.layout.digest,
        adapter=AdapterSettings(rank=2),
        adapter_seed=0,
        manifest=Blob(digest="d" * 64, num_bytes=10),
        model_bytes=1000,
        memory_bytes=1000,
        train=FEDERATION.train,
        clip_norm=FEDERATION.settings.clip_norm,
        cohort_size=2,
        rounds=FEDERATION.settings.rounds,
    )
    home.keep_assignment(issue_assignment(assignment, SIGNING))
    return home


@pytest.fixture
def clear(run, store, tmp_path):
    """Devices of real homes on a grid, and what runs their rounds; `sealed` may be False."""
    write_key(run.signing_key_file, SIGNING)
    homes = {name: home_of(tmp_path / name, name) for name in "abc"}
    devices = Devices(run.devices_db)
    for name, home in homes.items():
        request = signing_request(name, home.key.read_bytes())
        certificate = sign_device(run.authority, name, request, NOW)
        devices.invite(name, "0" * 64, NOW + 60)
        assert devices.claim(name, certificate.key)
        devices.admit(certificate)
    grid = LocalGrid({20 + at: Guarded(home) for at, home in enumerate(homes.values())})

    def engine(*, sealed=True):
        mail, tickets = sealing(run, FEDERATION, store, devices), ticketing(run, FEDERATION, store)
        link = GridTransport(
            grid,
            lambda: 3,
            5.0,
            5.0,
            lambda _: None,
            ticket_of=tickets,
            round_keys=mail.offer if sealed else None,
        )
        clock = Clock()
        return RoundEngine(
            FEDERATION,
            store,
            link,
            plain(FEDERATION),
            replace(run.settings.round_rules, quorum=1.0, deadline_seconds=30.0),
            clock=clock,
            pause=clock.wait,
            passed=mail.passed,
            opened=mail.opened,
        )

    return engine, grid, homes


def test_rounds_past_guards_and_in_envelopes_end_in_the_bits_of_rounds_in_process(
    clear, store, tmp_path
):
    engine, grid, homes = clear
    answers = []

    def noted(node):
        def answer(message):
            answers.append(node(message))
            return answers[-1]

        return answer

    grid.nodes = {number: noted(node) for number, node in grid.nodes.items()}
    found = engine().run()
    plainly = RoundStore(tmp_path / "plain", FEDERATION.run, FEDERATION.layout.size)
    expected = RoundEngine(FEDERATION, plainly, InMemory(), plain(FEDERATION), Rules()).run()
    assert torch.equal(found.adapter, expected.adapter)
    assert store.updates(4) == plainly.updates(4)
    sent = [a.content[RECORD][CONTENT] for a in answers if CONTENT in a.content[RECORD]]
    assert len(sent) == 12
    for home in homes.values():
        entries = [record.entry for record in home.ledger().newest()]
        assert [entry.kind for entry in entries] == [*[Kind.UPDATE] * 4, Kind.DESCRIPTION]
        assert {entry.digest for entry in entries[:4]} <= {digest_of(content) for content in sent}
    assert all(content.startswith(MAGIC) for content in sent)


def test_a_coordinator_without_round_keys_gets_no_update_and_the_owner_reads_why(clear, store):
    engine, _, homes = clear
    running = engine(sealed=False)
    while (now := store.latest()) is None or not now.phase.over:
        running.step(now)
    assert now.phase is Phase.ABANDONED
    for home in homes.values():
        assert {record.entry.kind for record in home.ledger().newest()} == {
            Kind.DESCRIPTION,
            Kind.REFUSAL,
        }
        (line, *_) = map(json.loads, home.refusals.read_text().splitlines())
        assert line["word"] == "round keys"
        assert "the coordinator must be updated" in line["reason"]
