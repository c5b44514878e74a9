"""Devices seal to keys that the coordinator signed for this round, and to no others."""

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.bindings._rust import openssl
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common import round_keys
from proxymoe.common.errors import ConfigError, ProtocolError
from proxymoe.common.files import canonical_json
from proxymoe.common.identity import new_signing_key, sign, verifying_key
from proxymoe.common.round_keys import MAX_OFFER_BYTES, SUITES, RoundKeys, verify_offer, wrap

ROOT = new_signing_key()
PINNED = verifying_key(ROOT)
NOW, LATER = 1_000_000.0, 1_003_600.0
SECRET = bytes(range(32))
KEYS = RoundKeys.new("run", 3, 1, NOW, LATER)
SIGNED = KEYS.signed(ROOT)
EVERY = pytest.mark.parametrize("suite", round_keys.offered())


def verified(content=SIGNED, coordinator=PINNED, now=NOW, run="run", number=3):
    return verify_offer(content, coordinator, now, run=run, number=number)


def refuse(reason, **changed):
    with pytest.raises(ProtocolError, match=reason):
        verified(**changed)


def test_the_library_computes_what_rfc_9180_says():
    """Appendix A.2.1: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20Poly1305, base mode."""
    key = X25519PrivateKey.from_private_bytes(
        bytes.fromhex("8057991eef8f1f1af18f4a9491d16a1ce333f695d4db8e38da75975c4478e0fb")
    )
    enc = bytes.fromhex("1afa08d3dec047a643885163f1180476fa7ddb54c6a8029ea33f95796bf2ac4a")
    encrypted = bytes.fromhex(
        "1c5250d8034ec2b784ba2cfd69dbdb8af406cfe3ff938e131f0def8c8b60b4db21993c62ce81883d2dd1b51a28"
    )
    info, bound = b"Ode on a Grecian Urn", b"Count-0"
    found = openssl.hpke._decrypt_with_aad(SUITES[1].hpke, enc + encrypted, key, info, bound)
    assert found == b"Beauty is truth, truth beauty"


def test_this_library_has_the_hybrid_and_prefers_it():
    assert round_keys.offered() == (2, 1)
    assert round_keys.best_suite(KEYS.offer) == 2


@EVERY
def test_a_content_key_comes_back_for_the_same_bound_bytes_only(suite):
    wrapped = wrap(KEYS.offer, suite, SECRET, b"header")
    assert len(wrapped) == SUITES[suite].wrapped_bytes
    assert KEYS.unwrap(suite, wrapped, b"header") == SECRET
    with pytest.raises(ProtocolError, match="other keys"):
        KEYS.unwrap(suite, wrapped, b"headed")
    with pytest.raises(ProtocolError, match="other keys"):
        RoundKeys.new("run", 3, 1, NOW, LATER).unwrap(suite, wrapped, b"header")


@EVERY
@given(content=st.binary(max_size=64) | st.binary(min_size=1168, max_size=1168))
def test_any_bytes_unwrap_to_a_refusal(suite, content):
    with pytest.raises(ProtocolError, match="damaged"):
        KEYS.unwrap(suite, content, b"header")


def test_a_device_believes_what_the_pinned_coordinator_signed():
    offer = verified()
    assert offer == KEYS.offer
    assert (offer.run, offer.round, offer.attempt) == ("run", 3, 1)
    assert [len(public.key) // 2 for public in offer.keys] == [1216, 32]


def test_every_attempt_has_keys_of_its_own():
    digests = {RoundKeys.new("run", 3, 1, NOW, LATER).offer.digest for _ in range(3)}
    assert len(digests) == 3


@given(position=st.integers(0, len(SIGNED) * 8 - 1))
def test_any_flipped_bit_of_an_offer_is_refused(position):
    damaged = bytearray(SIGNED)
    damaged[position // 8] ^= 1 << position % 8
    refuse("not signed", content=bytes(damaged))


@given(content=st.binary(max_size=200))
def test_any_bytes_are_an_offer_or_a_refusal(content):
    refuse("not signed", content=content)


def test_an_offer_of_somebody_or_something_else_is_refused():
    refuse("not signed", coordinator=verifying_key(new_signing_key()))
    refuse("not signed", content=SIGNED + b" " * MAX_OFFER_BYTES)
    refuse("another task", run="another")
    refuse("for round 3", number=4)
    refuse("valid from", now=NOW - 301)
    refuse("valid from", now=LATER + 301)
    assert verified(now=NOW - 299) == verified(now=LATER + 299)


def test_an_offer_of_a_later_version_asks_for_an_update():
    statement = canonical_json({**KEYS.offer.model_dump(), "version": 2})
    signature = sign(ROOT, round_keys._PURPOSE + statement)
    refuse("update one side", content=signature + statement)


def test_forgotten_keys_open_nothing():
    wrapped = wrap(KEYS.offer, 1, SECRET, b"")
    with RoundKeys.new("run", 1, 0, NOW, LATER) as keys:
        mine = wrap(keys.offer, 1, SECRET, b"")
        assert keys.unwrap(1, mine, b"") == SECRET
    with pytest.raises(ProtocolError, match="forgotten"):
        keys.unwrap(1, mine, b"")
    assert KEYS.unwrap(1, wrapped, b"") == SECRET


def test_a_device_without_ml_kem_takes_the_other_suite(monkeypatch):
    monkeypatch.setattr(round_keys, "offered", lambda: (1,))
    assert round_keys.best_suite(KEYS.offer) == 1
    monkeypatch.setattr(round_keys, "offered", lambda: (9,))
    with pytest.raises(ProtocolError, match="and here are"):
        round_keys.best_suite(KEYS.offer)


def test_a_suite_counts_as_offered_only_if_it_works():
    def broken():
        raise UnsupportedAlgorithm("no ML-KEM")

    row = SUITES[2]
    without = round_keys.Suite(2, row.name, row.kem, row.public_bytes, broken, row.load)
    assert not round_keys._works(without)
    assert round_keys._works(row)


def test_a_coordinator_may_offer_fewer_suites_but_none_that_it_has_not():
    only = RoundKeys.new("run", 1, 0, NOW, LATER, suites=[1])
    assert [public.suite for public in only.offer.keys] == [1]
    with pytest.raises(ProtocolError, match="offered were"):
        only.unwrap(2, b"", b"")
    with pytest.raises(ProtocolError, match="no usable key"):
        wrap(only.offer, 2, SECRET, b"")
    for suites, expires in (([7], LATER), ([], LATER), ([1], NOW)):
        with pytest.raises(ConfigError, match="suite"):
            RoundKeys.new("run", 1, 0, NOW, expires, suites=suites)


def test_an_offered_key_that_is_none_is_refused():
    """A zero point has no secret; only the coordinator itself could have signed it."""
    zero = round_keys.PublicKey(suite=1, key="00" * 32)
    offer = KEYS.offer.model_copy(update={"keys": (zero,)})
    with pytest.raises(ProtocolError, match="no usable key"):
        wrap(offer, 1, SECRET, b"")
