"""An envelope opens for the round, device and content that it was sealed for, or not at all."""

import base64
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common import round_keys, sealing
from proxymoe.common.chunks import decrypt_chunks
from proxymoe.common.errors import ProtocolError
from proxymoe.common.files import canonical_json, digest_of
from proxymoe.common.identity import load_device_key, new_device_key, public_key
from proxymoe.common.round_keys import Offer, PublicKey, RoundKeys
from proxymoe.common.sealing import (
    LENGTHS,
    MAGIC,
    START,
    Freshness,
    Header,
    claims,
    note,
    open_envelope,
    seal,
)
from tests.laws import tried

NOW, LATER = 1_000_000.0, 1_003_600.0
KEYS = RoundKeys.new("run", 3, 1, NOW, LATER)
DEVICE_KEY = new_device_key()
PUBLIC = public_key(DEVICE_KEY)
OTHER_PUBLIC = public_key(new_device_key())
ADDRESS = {"device": "kitchen", "base": "ab" * 32, "plan": "cd" * 32, "mode": "plain"}
CONTENT = b"an update of this device" * 100


def sealed(content=CONTENT, offer=KEYS.offer, **changed):
    return seal(content, offer, DEVICE_KEY, **{**ADDRESS, "chunk_bytes": 1024, **changed})


def opened(envelope, keys=KEYS, public=PUBLIC, now=NOW, **changed):
    return open_envelope(envelope, keys, public, now, **{**ADDRESS, **changed})


def refuse(envelope, reason, **changed):
    with pytest.raises(ProtocolError, match=reason):
        opened(envelope, **changed)


def taken_apart(envelope):
    """Header as a dict, wrapped key, body."""
    length, signature = LENGTHS.unpack_from(envelope, len(MAGIC))
    header = json.loads(envelope[START : START + length])
    wrapped_at = START + length + signature
    body_at = wrapped_at + round_keys.SUITES[header["suite"]].wrapped_bytes
    return header, envelope[wrapped_at:body_at], envelope[body_at:]


def put_together(header, wrapped, body, key=DEVICE_KEY):
    """An envelope with a good signature, whatever is in it: what a lying device could send."""
    raw = header if isinstance(header, bytes) else canonical_json(header)
    digest = digest_of(sealing._bound(raw, wrapped), body)
    signature = load_device_key(key).sign(sealing._SIGNED + digest.encode(), ECDSA(hashes.SHA256()))
    return b"".join((MAGIC, LENGTHS.pack(len(raw), len(signature)), raw, signature, wrapped, body))


ENVELOPE = sealed()
HEADER, WRAPPED, BODY = taken_apart(ENVELOPE)
OTHER_VALUES = {
    "version": 2,
    "suite": 1,
    "keys": "00" * 32,
    "run": "another",
    "round": 4,
    "attempt": 2,
    "device": "garage",
    "base": "00" * 32,
    "plan": "00" * 32,
    "mode": "secure",
    "part": "shares",
    "content_bytes": len(CONTENT) - 1,
    "chunk_bytes": 2048,
    "expires": int(LATER) + 1,
}


@tried(12)
@given(
    content=st.binary(max_size=1200) | st.sampled_from([bytes(1024), bytes(5000)]),
    suite=st.sampled_from(round_keys.offered()),
    part=st.from_regex(r"[a-z][a-z0-9-]{0,31}", fullmatch=True),
    mode=st.sampled_from(["plain", "secure"]),
)
def test_what_is_sealed_opens_for_whom_it_is_for(content, suite, part, mode):
    keys = RoundKeys.new("run", 3, 1, NOW, LATER, suites=[suite])
    envelope = sealed(content, keys.offer, part=part, mode=mode)
    found = opened(envelope, keys, part=part, mode=mode)
    assert found.content == content
    assert found.header == claims(envelope)
    assert found.header.suite == suite
    assert (found.header.run, found.header.round, found.header.attempt) == ("run", 3, 1)


@tried(100)
@given(position=st.integers(0, len(ENVELOPE) * 8 - 1))
def test_any_flipped_bit_is_refused(position):
    damaged = bytearray(ENVELOPE)
    damaged[position // 8] ^= 1 << position % 8
    refuse(bytes(damaged), ".")


@pytest.mark.slow
def test_every_flipped_bit_is_refused():
    for position in range(len(ENVELOPE) * 8):
        damaged = bytearray(ENVELOPE)
        damaged[position // 8] ^= 1 << position % 8
        refuse(bytes(damaged), ".")


@pytest.mark.parametrize("field", Header.model_fields)
def test_every_field_of_the_header_must_be_what_is_expected(field):
    refuse(put_together({**HEADER, field: OTHER_VALUES[field]}, WRAPPED, BODY), ".")


@pytest.mark.parametrize("field", Header.model_fields)
def test_every_field_of_the_header_is_bound_to_the_content(field, monkeypatch):
    """Even a device that signs a changed header cannot make the content open under it."""
    header = {**HEADER, field: OTHER_VALUES[field]}
    if field == "version":
        return  # there is no other yet
    raw = canonical_json(header)
    with pytest.raises(ProtocolError, match="other keys"):
        KEYS.unwrap(HEADER["suite"], WRAPPED, sealing._BOUND + raw)
    secret = KEYS.unwrap(HEADER["suite"], WRAPPED, sealing._BOUND + canonical_json(HEADER))
    with pytest.raises(ProtocolError, match="number 0"):
        decrypt_chunks(secret, BODY, len(CONTENT), 1024, sealing._bound(raw, WRAPPED))


@pytest.mark.parametrize("field", ["device", "base", "plan", "mode", "part"])
def test_an_honest_envelope_for_something_else_is_refused_by_name(field):
    refuse(ENVELOPE, f"for {field}", **{field: OTHER_VALUES[field]})


@pytest.mark.parametrize(("number", "attempt"), [(4, 1), (3, 2), (3, 1)])
def test_an_envelope_for_other_round_keys_is_refused(number, attempt):
    refuse(ENVELOPE, "for keys", keys=RoundKeys.new("run", number, attempt, NOW, LATER))


def test_nobody_else_signs_for_a_device():
    refuse(ENVELOPE, "not made with this device key", public=OTHER_PUBLIC)
    forged = put_together(HEADER, WRAPPED, BODY, key=new_device_key())
    refuse(forged, "not made with this device key")


def test_an_envelope_expires_with_its_round():
    assert opened(ENVELOPE, now=LATER - 1).content == CONTENT
    refuse(ENVELOPE, "expired", now=LATER)


def test_nothing_opens_once_the_keys_are_forgotten():
    keys = RoundKeys.new("run", 3, 1, NOW, LATER)
    envelope = sealed(offer=keys.offer)
    keys.forget()
    refuse(envelope, "forgotten", keys=keys)


def test_parts_of_two_envelopes_do_not_mix():
    header, wrapped, body = taken_apart(sealed())
    assert header == HEADER
    refuse(put_together(HEADER, wrapped, BODY), "number 0")
    refuse(put_together(HEADER, WRAPPED, body), "number 0")


def test_the_same_again_is_a_duplicate_and_another_is_equivocation():
    first, other = opened(ENVELOPE), opened(sealed())
    assert first.content == other.content
    seen, fresh = note({}, first)
    assert fresh is Freshness.FRESH
    assert note(seen, first) == (seen, Freshness.DUPLICATE)
    assert note(seen, other) == (seen, Freshness.EQUIVOCATION)
    assert seen == {("run", 3, 1, "kitchen", "update"): first.digest}
    later, fresh = note(seen, opened(sealed(part="shares"), part="shares"))
    assert fresh is Freshness.FRESH
    assert len(later) == 2
    assert len(seen) == 1


def test_signing_again_makes_no_other_envelope():
    """ECDSA signatures can be made anew, and even changed by others, for the same message."""
    again = put_together(HEADER, WRAPPED, BODY)
    assert again != ENVELOPE
    assert opened(again).digest == opened(ENVELOPE).digest


@given(st.binary(max_size=300))
def test_any_bytes_are_an_envelope_or_a_refusal(content):
    refuse(content, ".")
    refuse(MAGIC + content, ".")
    with pytest.raises(ProtocolError):
        claims(MAGIC + content)


@tried(30)
@given(st.data())
def test_a_damaged_envelope_is_refused(data):
    start = data.draw(st.integers(0, len(ENVELOPE)))
    stop = data.draw(st.integers(start, len(ENVELOPE)))
    damaged = ENVELOPE[:start] + data.draw(st.binary(max_size=20)) + ENVELOPE[stop:]
    if damaged != ENVELOPE:
        refuse(damaged, ".")


@pytest.mark.slow
def test_no_mutation_out_of_two_hundred_thousand_gets_through():
    import numpy as np

    rng = np.random.default_rng(0)
    for _ in range(200_000):
        damaged = bytearray(ENVELOPE[: rng.integers(0, 900)])
        for position in rng.integers(0, max(len(damaged), 1), 3):
            if damaged:
                damaged[position] = rng.integers(0, 256)
        with pytest.raises(ProtocolError):
            claims(bytes(damaged))


def test_sizes_are_refused_before_anything_is_decrypted():
    refuse(ENVELOPE, "the limit is 10", max_content_bytes=10)
    refuse(ENVELOPE + b"!", "by its header")
    refuse(ENVELOPE[:-1], "by its header")
    huge = {**HEADER, "content_bytes": 1 << 30}
    refuse(put_together(huge, WRAPPED, BODY), "by its header")
    beyond = {**HEADER, "content_bytes": (1 << 30) + 1}
    refuse(put_together(beyond, WRAPPED, BODY), "refused at .*content_bytes")
    refuse(MAGIC + LENGTHS.pack(5000, 0), "header and signature of 5000")
    refuse(MAGIC + LENGTHS.pack(0, 200), "header and signature of 0, 200")


def test_a_header_is_written_in_one_way_only():
    spaced = json.dumps(HEADER).encode()
    refuse(put_together(spaced, WRAPPED, BODY), "canonically")
    refuse(put_together({**HEADER, "note": 1}, WRAPPED, BODY), "refused at")
    refuse(put_together({**HEADER, "suite": 9}, WRAPPED, BODY), "suite 9")


def test_what_cannot_be_sealed_is_refused_on_the_device():
    for field, value in {"device": "../etc", "base": "no digest", "part": "Two Words"}.items():
        with pytest.raises(ProtocolError, match=f"cannot be sealed.*{field}"):
            sealed(**{field: value})


def test_an_envelope_of_version_1_still_opens():
    known = json.loads(Path(__file__).with_name("envelope_v1.json").read_text(encoding="utf-8"))
    private = X25519PrivateKey.from_private_bytes(bytes(range(32)))
    public = private.public_key().public_bytes_raw().hex()
    offer = Offer(
        run="known answer",
        round=7,
        attempt=2,
        keys=(PublicKey(suite=1, key=public),),
        issued=1000,
        expires=2000,
    )
    found = opened(
        base64.b64decode(known["envelope"]),
        RoundKeys(offer, {1: private}),
        known["device_public_key"].encode(),
        now=1500,
        mode="secure",
        part="masked",
    )
    assert found.content == b"A known answer. " * 100
