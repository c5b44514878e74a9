"""Tokens and tickets: whole, in time and for this device, or refused with the reason."""

import base64
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common import identity, tickets
from proxymoe.common.addresses import split_address
from proxymoe.common.errors import ConfigError, ProtocolError
from proxymoe.common.files import canonical_json, digest_of
from proxymoe.common.tickets import Ticket, issue_ticket, parse_token, verify_ticket

AUTHORITY = b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
NOW = 1_800_000_000
TOKEN = tickets.new_token("127.0.0.1:8443", AUTHORITY, "phone", NOW + 60)
SIGNING = identity.new_signing_key()
COORDINATOR = identity.verifying_key(SIGNING)
TASK = b"the task, as it came"
HELD = {"device": "phone", "base": "ab" * 32, "plan": "cd" * 32, "layout": "ef" * 32}
TICKET = Ticket(
    run="run",
    round=3,
    **HELD,
    task=digest_of(TASK),
    cohort_size=4,
    issued=NOW,
    expires=NOW + 600,
)
ISSUED = issue_ticket(TICKET, SIGNING)


def verify(content=ISSUED, coordinator=COORDINATOR, now=NOW + 1, task=TASK, **held):
    return verify_ticket(content, coordinator, now, **{**HELD, **held}, task=task)


names = st.from_regex(identity.NAME, fullmatch=True)
hosts = st.sampled_from(["127.0.0.1", "[::1]", "localhost", "coordinator.example"])


@given(name=names, host=hosts, port=st.integers(1, 65535), seconds=st.integers(1, 10**6))
def test_a_token_survives_being_carried(name, host, port, seconds):
    token = tickets.new_token(f"{host}:{port}", AUTHORITY, name, NOW + seconds)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", token.text)
    assert parse_token(f"  {token.text}\n", NOW) == token
    assert split_address(token.coordinator) == (host.strip("[]"), port)


def test_only_the_digest_of_a_secret_is_needed_to_know_it_again():
    digest = tickets.secret_digest(TOKEN.secret)
    assert digest == digest_of(bytes.fromhex(TOKEN.secret))
    assert tickets.is_secret(TOKEN.secret, digest)
    assert not tickets.is_secret("00" * 32, digest)


def test_every_token_has_its_own_secret_and_nobody_prints_it():
    other = tickets.new_token(TOKEN.coordinator, AUTHORITY, TOKEN.device, TOKEN.expires)
    assert other.secret != TOKEN.secret
    assert TOKEN.secret not in repr(TOKEN)
    assert TOKEN.secret not in str(TOKEN)
    request = tickets.EnrolRequest(device="phone", secret=TOKEN.secret, request="pem")
    assert TOKEN.secret not in repr(request)


def test_a_token_that_was_cut_is_refused():
    for length in range(0, len(TOKEN.text), 7):
        with pytest.raises(ProtocolError, match="copy it again"):
            parse_token(TOKEN.text[:length], NOW)


@given(text=st.text(max_size=80))
def test_anything_else_is_no_token(text):
    with pytest.raises(ProtocolError, match="copy it again"):
        parse_token(text, NOW)


def altered(**fields):
    content = canonical_json({**TOKEN.model_dump(), **fields})
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


@pytest.mark.parametrize(
    "fields",
    [
        {"device": "../phone"},
        {"secret": "00"},
        {"coordinator": "127.0.0.1"},
        {"coordinator": "127.0.0.1:0"},
        {"expires": "soon"},
        {"expires": -1},
        {"authority": "x" * (identity.MAX_PEM_BYTES + 1)},
        {"extra": 1},
    ],
)
def test_a_token_with_a_field_that_cannot_be_is_refused(fields):
    assert parse_token(altered(), NOW) == TOKEN
    with pytest.raises(ProtocolError, match="copy it again"):
        parse_token(altered(**fields), NOW)


def test_a_token_expires_to_the_second():
    assert parse_token(TOKEN.text, TOKEN.expires - 0.001) == TOKEN
    with pytest.raises(ProtocolError, match="expired 0 s ago"):
        parse_token(TOKEN.text, TOKEN.expires)


@pytest.mark.parametrize(
    "address", ["", "host", ":1", "host:", "h:0", "h:65536", "::1:80", "a b:1"]
)
def test_an_address_that_cannot_be_is_refused(address):
    with pytest.raises(ConfigError, match="host:port"):
        tickets.new_token(address, AUTHORITY, "phone", NOW)


def test_a_token_is_for_a_good_name():
    with pytest.raises(ConfigError, match="device name"):
        tickets.new_token("host:1", AUTHORITY, "a/b", NOW)


def test_a_ticket_that_was_issued_is_believed():
    assert verify() == TICKET


@given(position=st.integers(0, 8 * len(ISSUED) - 1))
def test_a_ticket_with_any_bit_changed_is_refused(position):
    damaged = bytearray(ISSUED)
    damaged[position // 8] ^= 1 << position % 8
    with pytest.raises(ProtocolError, match="not signed by the pinned coordinator"):
        verify(bytes(damaged))


@given(content=st.binary(max_size=200))
def test_anything_else_is_no_ticket(content):
    with pytest.raises(ProtocolError, match="not signed"):
        verify(content)


def test_a_ticket_of_another_coordinator_is_refused():
    with pytest.raises(ProtocolError, match="not signed by the pinned coordinator"):
        verify(issue_ticket(TICKET, identity.new_signing_key()))


def test_a_ticket_that_is_cut_or_too_long_is_refused():
    for content in (ISSUED[:-1], ISSUED + b" ", b"", ISSUED + b" " * tickets.MAX_TICKET_BYTES):
        with pytest.raises(ProtocolError, match="not signed"):
            verify(content)


def test_no_other_signature_of_the_coordinator_passes_for_a_ticket():
    statement = ISSUED[identity.SIGNATURE_BYTES :]
    with pytest.raises(ProtocolError, match="not signed"):
        verify(identity.sign(SIGNING, statement) + statement)


def test_a_signed_statement_that_is_no_ticket_of_this_version_is_refused():
    fields = {**json.loads(ISSUED[identity.SIGNATURE_BYTES :]), "novelty": 1}
    statement = canonical_json(fields)
    signature = identity.sign(SIGNING, b"proxymoe job ticket 1\n" + statement)
    with pytest.raises(ProtocolError, match="another version"):
        verify(signature + statement)


@pytest.mark.parametrize("what", HELD)
def test_a_ticket_for_something_else_is_refused(what):
    other = "tablet" if what == "device" else "01" * 32
    with pytest.raises(
        ProtocolError, match=f"for {what} {HELD[what][:16]}, and here is {other[:16]}"
    ):
        verify(**{what: other})


def test_a_ticket_for_another_task_is_refused():
    with pytest.raises(ProtocolError, match="for task"):
        verify(task=TASK + b"!")


@pytest.mark.parametrize("now", [NOW - 300, NOW, NOW + 599, NOW + 899])
def test_clocks_may_differ_a_little(now):
    assert verify(now=now) == TICKET


def test_a_ticket_is_neither_early_nor_late():
    with pytest.raises(ProtocolError, match="not valid for another 301 s"):
        verify(now=NOW - 301)
    with pytest.raises(ProtocolError, match="expired 300 s ago"):
        verify(now=NOW + 900)
    with pytest.raises(ProtocolError, match="not valid for another 1 s"):
        verify_ticket(ISSUED, COORDINATOR, NOW - 1, **HELD, task=TASK, skew=0)


def test_a_ticket_that_never_holds_is_not_issued():
    with pytest.raises(ValueError, match="expires before"):
        Ticket(
            run="run",
            round=0,
            **HELD,
            task="00" * 32,
            cohort_size=4,
            issued=NOW,
            expires=NOW,
        )
