"""Keys are claimed once, enrolled once and revoked for ever; whatever happens is on record."""

import ast
import sqlite3
import subprocess
import sys
import threading
from subprocess import PIPE

import pytest

from proxymoe.common import identity
from proxymoe.common.assignment import Application
from proxymoe.common.errors import ConfigError, IntegrityError
from proxymoe.common.files import digest_of
from proxymoe.common.tickets import secret_digest
from proxymoe.server.devices import Devices
from proxymoe.server.enrolment import Invitation, Refused, Standing, enrol
from proxymoe.simulations.faults.cohort import small_plan
from tests.doors import NOW, Applicant, enrolment

NODE = (1 << 64) - 5
KEYS = [digest_of(bytes([i])) for i in range(8)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "devices.db"


@pytest.fixture
def devices(path):
    found = Devices(path, clock=lambda: NOW)
    yield found
    found.close()


class Inviting:
    """What an `Applicant` needs of a registry."""

    def __init__(self, devices):
        self._devices = devices

    def invite(self, token):
        self._devices.invite(token.device, secret_digest(token.secret), token.expires)


def applicant(devices, name="phone"):
    return Applicant(Inviting(devices), name)


def enrolled(devices, name="phone", node=None):
    """A device that has gone the whole way; returns it with the digest of its key."""
    found = applicant(devices, name)
    key = identity.key_digest(identity.public_key(found.key))

    def register(device, public_key):
        if node is not None:
            devices.note_node(identity.key_digest(public_key), node)

    enrol(found.request(), enrolment(devices, register), NOW)
    return found, key


def events(devices):
    return [entry.event for entry in devices.history()]


CLAIM = """
import sys
from pathlib import Path
from proxymoe.server.devices import Devices

devices = Devices(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
print([key for key in sys.argv[2:] if devices.claim("phone", key)], flush=True)
"""


def test_a_token_becomes_an_enrolled_key_and_every_step_is_on_record(devices):
    assert devices.invitation("phone") is None
    found = applicant(devices)
    assert devices.invitation("phone") == Invitation(
        secret_digest(found.token.secret), found.token.expires
    )
    (entry,) = devices.entries()
    assert (entry.name, entry.standing, entry.key) == ("phone", Standing.UNKNOWN, None)
    enrol(found.request(), enrolment(devices), NOW)
    (entry,) = devices.entries()
    assert devices.standing(entry.key) is Standing.ENROLLED
    assert (entry.standing, entry.enrolled_at, entry.node) == (Standing.ENROLLED, NOW, None)
    assert entry.expires > NOW + 86400
    assert events(devices) == ["invited", "claimed", "enrolled"]


def test_what_is_known_outlives_the_process(devices, path):
    _, key = enrolled(devices, node=NODE)
    devices.close()
    again = Devices(path)
    assert again.standing(key) is Standing.ENROLLED
    assert again.node_of("phone") == NODE
    again.close()


def test_of_several_processes_that_claim_a_token_one_gets_it(devices, path):
    devices.invite("phone", "00" * 32, NOW + 60)
    command = [sys.executable, "-c", CLAIM, str(path)]
    processes = [
        subprocess.Popen([*command, key], stdin=PIPE, stdout=PIPE, text=True) for key in KEYS[:3]
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    winners = [ast.literal_eval(process.communicate()[0]) for process in processes]
    (winner,) = [key for found in winners for key in found]
    assert devices.claim("phone", winner)
    assert not any(devices.claim("phone", key) for key in KEYS if key != winner)
    assert events(devices) == ["invited", "claimed"]


def test_of_several_threads_that_claim_a_token_one_gets_it(devices):
    devices.invite("phone", "00" * 32, NOW + 60)
    told = []
    threads = [
        threading.Thread(target=lambda key=key: told.append(devices.claim("phone", key)))
        for key in KEYS
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told) == [False] * 7 + [True]


def test_without_an_invitation_nobody_claims(devices):
    assert not devices.claim("phone", KEYS[0])
    assert devices.history() == []


def test_a_key_is_one_devices(devices):
    _, key = enrolled(devices, "phone")
    devices.invite("tablet", "00" * 32, NOW + 60)
    assert not devices.claim("tablet", key)


def test_the_newest_invitation_counts(devices):
    devices.invite("phone", "00" * 32, NOW + 60)
    assert devices.claim("phone", KEYS[0])
    devices.invite("phone", "11" * 32, NOW + 90)
    assert devices.invitation("phone") == Invitation("11" * 32, NOW + 90)
    assert devices.claim("phone", KEYS[1])
    assert not devices.claim("phone", KEYS[0])


def test_a_revoked_key_never_comes_back_and_its_name_does_with_another(devices):
    found, key = enrolled(devices, node=7)
    assert devices.revoke("phone") == [7]
    assert devices.standing(key) is Standing.REVOKED
    assert not devices.is_enrolled("phone")
    assert not devices.is_device(7, "phone")
    assert devices.invitation("phone") is None

    again = applicant(devices)
    with pytest.raises(Refused, match="revoked"):
        enrol(again.request(key=found.key), enrolment(devices), NOW)
    assert not devices.claim("phone", key)
    enrol(again.request(), enrolment(devices), NOW)
    assert devices.standing(key) is Standing.REVOKED
    assert devices.is_enrolled("phone")
    (entry,) = devices.entries()
    assert entry.standing is Standing.ENROLLED
    assert entry.key != key


def test_a_key_that_is_revoked_between_claim_and_admission_is_not_enrolled(devices, caplog):
    found = applicant(devices)
    enrol(found.request(), enrolment(devices, lambda *_: devices.revoke("phone")), NOW)
    assert not devices.is_enrolled("phone")
    assert "was revoked; not enrolled" in caplog.text


def test_a_name_that_enrols_with_another_key_loses_its_older_one(devices):
    _, old = enrolled(devices, node=7)
    _, new = enrolled(devices, node=8)
    assert devices.standing(old) is Standing.REVOKED
    assert devices.standing(new) is Standing.ENROLLED
    assert devices.is_device(8, "phone")
    assert not devices.is_device(7, "phone")
    assert devices.num_enrolled() == 1


def test_revoking_nobody_is_refused_and_leaves_no_trace(devices):
    with pytest.raises(ConfigError, match="'phone': no such device"):
        devices.revoke("phone")
    assert devices.history() == []
    devices.invite("phone", "00" * 32, NOW + 60)
    assert devices.revoke("phone") == []
    with pytest.raises(ConfigError, match="revoked already"):
        devices.revoke("phone")


def test_a_node_is_the_device_that_was_admitted_with_it(devices):
    enrolled(devices, "phone", node=NODE)
    enrolled(devices, "tablet")
    assert devices.is_device(NODE, "phone")
    assert not devices.is_device(NODE, "tablet")
    assert devices.node_of("tablet") is None
    assert not devices.is_device(NODE, "nobody")
    records = len(devices.history())
    devices.note_node(devices.entries()[0].key, NODE)
    assert len(devices.history()) == records  # nothing new
    with pytest.raises(ConfigError, match="no device has it"):
        devices.note_node(KEYS[0], 1)


def test_bad_names_are_not_invited(devices):
    with pytest.raises(ConfigError, match="device name"):
        devices.invite("../phone", "00" * 32, NOW)


def test_a_device_may_have_what_its_plan_names_while_it_is_enrolled(devices, path):
    for name in ("phone", "tablet"):
        enrolled(devices, name)
    asked = Application(domain="math")
    devices.keep_plan("phone", asked, small_plan(0, 1), "aa" * 32, KEYS[:3])
    devices.keep_plan("tablet", Application(), small_plan(1), "bb" * 32, KEYS[2:5])
    assert [devices.may_have("phone", key) for key in KEYS] == [True] * 3 + [False] * 5
    assert [devices.may_have("tablet", key) for key in KEYS[:5]] == [False] * 2 + [True] * 3
    assert not devices.may_have("nobody", KEYS[0])
    assert not any(devices.may_have("phone", odd) for odd in ("", "zz", KEYS[0][:-2]))
    planned = devices.planned("phone")
    assert (planned.application, planned.plan, planned.manifest) == (
        asked,
        small_plan(0, 1),
        "aa" * 32,
    )
    assert devices.assigned() == ["phone", "tablet"]

    other = Devices(path)
    other.revoke("phone")
    assert not devices.may_have("phone", KEYS[0])
    assert devices.assigned() == ["tablet"]
    assert devices.plan_of("phone") == small_plan(0, 1)  # a round may still be on
    other.close()


def test_a_new_plan_replaces_the_old_one_and_what_nobody_has_is_forgotten(devices, path):
    for name in ("phone", "tablet"):
        enrolled(devices, name)
        devices.keep_plan(name, Application(), small_plan(0, 1), "aa" * 32, KEYS[:2])
    devices.keep_plan("phone", Application(), small_plan(1), "bb" * 32, KEYS[1:3])
    assert [devices.may_have("phone", key) for key in KEYS[:3]] == [False, True, True]
    assert [devices.may_have("tablet", key) for key in KEYS[:3]] == [True, True, False]
    devices.keep_plan("tablet", Application(), small_plan(1), "bb" * 32, KEYS[1:3])
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT DISTINCT manifest FROM blobs").fetchall() == [("bb" * 32,)]
    database.close()


def test_the_record_gives_a_change_away(devices, path):
    enrolled(devices)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE audit SET event = 'invited' WHERE seq = 2")
    database.close()
    with pytest.raises(IntegrityError, match="entry 2"):
        devices.history()


def test_public_keys_are_those_of_enrolled_devices(devices):
    assert devices.public_keys() == {}
    phone, _ = enrolled(devices, "phone")
    enrolled(devices, "laptop")
    enrolled(devices, "watch")
    devices.revoke("laptop")
    found = devices.public_keys()
    assert sorted(found) == ["phone", "watch"]
    assert found["phone"].encode() == identity.public_key(phone.key)
