"""What a device applies for, and the signed answer."""

import pytest

from proxymoe.common.assignment import (
    MAX_APPLICATION_BYTES,
    Application,
    Assignment,
    Blob,
    application_bytes,
    issue_assignment,
    parse_application,
    verify_assignment,
)
from proxymoe.common.config import AdapterSettings, TrainSettings
from proxymoe.common.errors import ProtocolError
from proxymoe.common.identity import new_signing_key, sign, verifying_key

KEY = new_signing_key()
ASSIGNMENT = Assignment(
    run="run",
    device="phone",
    base="ab" * 32,
    plan="cd" * 32,
    layout="ef" * 32,
    adapter=AdapterSettings(),
    adapter_seed=7,
    manifest=Blob(digest="01" * 32, num_bytes=9_000),
    companions={"23" * 32: 100},
    model_bytes=12_000_000,
    memory_bytes=900_000_000,
    train=TrainSettings(),
    clip_norm=2.0,
    cohort_size=8,
    rounds=3,
)


@pytest.mark.parametrize(
    "application",
    [
        Application(),
        Application(domain="banking", budget_bytes=10**8),
        Application(mixture={"banking": 0.25, "travel": 0.75}),
    ],
)
def test_an_application_arrives_as_it_was(application):
    assert parse_application(application_bytes(application)) == application


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"domain": "../etc"}',
        b'{"domain": "a", "mixture": {"a": 1.0}}',
        b'{"mixture": {"a": 0.4}}',
        b'{"mixture": {"a": 1.5, "b": -0.5}}',
        b'{"mixture": {"a": NaN}}',
        b'{"budget_bytes": -1}',
        b'{"wish": 1}',
        b" " * (MAX_APPLICATION_BYTES + 1),
    ],
)
def test_what_is_no_application_is_refused(content):
    with pytest.raises(ProtocolError, match="application"):
        parse_application(content)


def test_an_assignment_arrives_as_it_was():
    content = issue_assignment(ASSIGNMENT, KEY)
    assert verify_assignment(content, verifying_key(KEY), "phone") == ASSIGNMENT


def test_a_changed_assignment_is_refused():
    content = bytearray(issue_assignment(ASSIGNMENT, KEY))
    for position in (0, 63, 64, len(content) - 1):
        changed = content.copy()
        changed[position] ^= 1
        with pytest.raises(ProtocolError, match="not signed"):
            verify_assignment(bytes(changed), verifying_key(KEY), "phone")


def test_an_assignment_of_another_coordinator_is_refused():
    content = issue_assignment(ASSIGNMENT, new_signing_key())
    with pytest.raises(ProtocolError, match="not signed"):
        verify_assignment(content, verifying_key(KEY), "phone")


def test_an_assignment_for_another_device_is_refused():
    content = issue_assignment(ASSIGNMENT, KEY)
    with pytest.raises(ProtocolError, match="for device phone, and this is laptop"):
        verify_assignment(content, verifying_key(KEY), "laptop")


def test_a_signature_made_for_another_purpose_is_refused():
    statement = issue_assignment(ASSIGNMENT, KEY)[64:]
    with pytest.raises(ProtocolError, match="not signed"):
        verify_assignment(sign(KEY, statement) + statement, verifying_key(KEY), "phone")


def test_a_signed_assignment_of_another_version_is_refused():
    statement = b'{"run": "run", "surprise": 1}'
    content = sign(KEY, b"proxymoe assignment 1\n" + statement) + statement
    with pytest.raises(ProtocolError, match="surprise"):
        verify_assignment(content, verifying_key(KEY), "phone")
