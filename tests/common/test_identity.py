"""One device key in every format that somebody wants, and nothing else passes for one."""

import re

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common import identity
from proxymoe.common.errors import ConfigError, ProtocolError
from tests.laws import tried

KEY = identity.new_device_key()
PUBLIC = identity.public_key(KEY)
OTHER_PUBLIC = identity.public_key(identity.new_device_key())
SIGNING = identity.new_signing_key()
VERIFYING = identity.verifying_key(SIGNING)


def pem(key, form=PrivateFormat.PKCS8, encryption=None):
    return key.private_bytes(Encoding.PEM, form, encryption or NoEncryption())


FOREIGN_KEYS = {
    "garbage": b"no key",
    "empty": b"",
    "oversized": KEY + b"\n" * identity.MAX_PEM_BYTES,
    "another curve": pem(ec.generate_private_key(ec.SECP256R1())),
    "rsa": pem(rsa.generate_private_key(65537, 1024)),
    "ed25519": SIGNING,
    "encrypted": pem(
        ec.generate_private_key(ec.SECP384R1()),
        encryption=serialization.BestAvailableEncryption(b"secret"),
    ),
}


def test_flower_reads_the_same_key_in_openssh_format():
    private = serialization.load_ssh_private_key(identity.ssh_private_key(KEY), None)
    public = serialization.load_ssh_public_key(identity.ssh_public_key(PUBLIC))
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert identity.public_pem(private.public_key()) == PUBLIC
    assert identity.public_pem(public) == PUBLIC
    assert pem(private) == KEY


def test_every_key_is_new():
    assert len({identity.new_device_key() for _ in range(3)}) == 3
    assert len({identity.new_signing_key() for _ in range(3)}) == 3


def test_a_digest_names_the_key_and_not_the_layout_of_its_pem():
    digest = identity.key_digest(PUBLIC)
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert identity.key_digest(PUBLIC.replace(b"\n", b"\r\n")) == digest
    assert identity.key_digest(OTHER_PUBLIC) != digest


@tried(10)
@given(message=st.binary(max_size=64))
def test_a_device_signature_is_for_one_message_and_one_key(message):
    key = identity.load_device_key(KEY)
    signature = key.sign(message, ec.ECDSA(hashes.SHA256()))
    identity.check_device_signature(PUBLIC, message, signature)
    with pytest.raises(ProtocolError, match="not made with this device key"):
        identity.check_device_signature(PUBLIC, message + b"!", signature)
    with pytest.raises(ProtocolError, match="not made with this device key"):
        identity.check_device_signature(OTHER_PUBLIC, message, signature)


@given(message=st.binary(max_size=64), position=st.integers(0, identity.SIGNATURE_BYTES * 8 - 1))
def test_the_coordinator_s_signature_is_whole_or_worth_nothing(message, position):
    signature = identity.sign(SIGNING, message)
    assert len(signature) == identity.SIGNATURE_BYTES
    assert identity.is_signed(VERIFYING, message, signature)
    damaged = bytearray(signature)
    damaged[position // 8] ^= 1 << position % 8
    assert not identity.is_signed(VERIFYING, message, bytes(damaged))
    assert not identity.is_signed(VERIFYING, message + b"!", signature)
    assert not identity.is_signed(VERIFYING, message, signature[:-1])


@pytest.mark.parametrize("public_key", ["", "no hex", "00", "ff" * 32, "00" * 33])
def test_what_is_no_public_key_signed_nothing(public_key):
    assert not identity.is_signed(public_key, b"message", identity.sign(SIGNING, b"message"))


@pytest.mark.parametrize("key", FOREIGN_KEYS.values(), ids=FOREIGN_KEYS)
def test_no_other_private_key_passes_for_a_device_key(key):
    for read in (identity.public_key, identity.ssh_private_key):
        with pytest.raises(ProtocolError, match="key"):
            read(key)


@pytest.mark.parametrize(
    "key", [b"", b"no key", KEY, SIGNING, PUBLIC + b" " * identity.MAX_PEM_BYTES]
)
def test_no_other_public_key_passes_for_a_device_key(key):
    for read in (identity.key_digest, identity.ssh_public_key):
        with pytest.raises(ProtocolError, match="key"):
            read(key)


def test_a_public_key_on_another_curve_is_refused():
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    with pytest.raises(ProtocolError, match="P-384"):
        identity.key_digest(identity.public_pem(other))


@pytest.mark.parametrize("key", [KEY, b"no key"])
def test_only_an_ed25519_key_signs_for_the_coordinator(key):
    with pytest.raises(ProtocolError, match="restore it"):
        identity.sign(key, b"message")
    with pytest.raises(ProtocolError, match="restore it"):
        identity.verifying_key(key)


@given(name=st.from_regex(identity.NAME, fullmatch=True))
def test_a_good_name_stays_what_it_is(name):
    assert identity.check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "a" * 65, ".hidden", "-rf", "_", "a/b", "..", "a b", "a\n", "é", "a\0", "CN=a"]
)
def test_a_name_that_could_mean_something_else_is_refused(name):
    with pytest.raises(ConfigError, match="1 to 64"):
        identity.check_name(name)
