"""What the ServerApp adds to the round engine: who a node is, and a ticket for every task."""

import time
from types import SimpleNamespace

import pytest

from proxymoe.common import identity
from proxymoe.common.certificates import sign_device, signing_request
from proxymoe.common.identity import key_digest, verifying_key
from proxymoe.common.messages import decode
from proxymoe.common.tickets import verify_ticket
from proxymoe.server.devices import Devices
from proxymoe.server.round import tasks_of
from proxymoe.server.serverapp import admission, ticketing
from proxymoe.server.store import Phase
from proxymoe.simulations.faults.cohort import small_federation
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
