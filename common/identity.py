"""Names and keys: what a device is called, its one key, and the coordinator's signing key.

Pure functions over bytes; keeping private keys private is the caller's part. A device has one
EC P-384 key, for TLS and as its Flower node; Flower wants the same key in OpenSSH's format. The
coordinator signs jobs with an Ed25519 key whose public half devices pin at enrolment.
"""

import re
from typing import Annotated

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from pydantic import Field

from proxymoe.common.errors import ConfigError, ProtocolError
from proxymoe.common.files import digest_of

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""A device's name: fits a certificate's common name, a file name and a log line."""
DeviceName = Annotated[str, Field(pattern=rf"^{NAME}$")]
PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""An Ed25519 public key as lower-case hex, to be pinned, printed and compared by eye."""
MAX_PEM_BYTES = 16 << 10
SIGNATURE_BYTES = 64
"""Length of an Ed25519 signature."""
UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm)
"""What cryptography raises for bytes that are not what they should be."""


def check_name(device: str) -> str:
    """The name itself.

    Raises:
        ConfigError: not a name that a device may have.
    """
    if not re.fullmatch(NAME, device):
        raise ConfigError(
            f"device name {device[:80]!r}: use 1 to 64 letters, digits, '.', '_' and '-', "
            "and begin with a letter or digit"
        )
    return device


def new_device_key() -> bytes:
    """A new EC P-384 private key, PEM (PKCS 8, not encrypted)."""
    key = generate_private_key(SECP384R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_key(key: bytes) -> bytes:
    """The PEM public key of a device's private key, as its Flower node sends it along.

    Raises:
        ProtocolError: not the private key of a device.
    """
    return public_pem(load_device_key(key).public_key())


def public_pem(key: EllipticCurvePublicKey) -> bytes:
    """The PEM of a public key."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def key_digest(public_key: bytes) -> str:
    """Lower-case hex SHA-256 that names a device's public key, however its PEM is laid out.

    Raises:
        ProtocolError: not the public key of a device.
    """
    key = load_device_public_key(public_key)
    return digest_of(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def check_device_signature(public_key: bytes, message: bytes, signature: bytes) -> None:
    """Returns if the device key signed `message` (ECDSA over SHA-256, as Flower nodes do).

    Raises:
        ProtocolError: not the public key of a device, or not its signature.
    """
    try:
        load_device_public_key(public_key).verify(signature, message, ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise ProtocolError("the signature was not made with this device key") from None


def ssh_private_key(key: bytes) -> bytes:
    """A device's private key in OpenSSH's format, which `flower-supernode` reads.

    Raises:
        ProtocolError: not the private key of a device.
    """
    return load_device_key(key).private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def ssh_public_key(public_key: bytes) -> bytes:
    """A device's public key in OpenSSH's format, which `flwr supernode register` reads.

    Raises:
        ProtocolError: not the public key of a device.
    """
    return load_device_public_key(public_key).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def load_device_key(key: bytes) -> EllipticCurvePrivateKey:
    """The key object of a device's private PEM key.

    Raises:
        ProtocolError: not the private key of a device.
    """
    found = load_private_key(key)
    if not isinstance(found, EllipticCurvePrivateKey) or not isinstance(found.curve, SECP384R1):
        raise ProtocolError("private key: not a device key (EC P-384)")
    return found


def load_device_public_key(public_key: bytes) -> EllipticCurvePublicKey:
    """The key object of a device's public PEM key.

    Raises:
        ProtocolError: not the public key of a device.
    """
    try:
        found = load_pem_public_key(bounded(public_key))
    except UNREADABLE:
        raise ProtocolError("public key: unreadable") from None
    if not isinstance(found, EllipticCurvePublicKey) or not isinstance(found.curve, SECP384R1):
        raise ProtocolError("public key: not a device key (EC P-384)")
    return found


def load_private_key(key: bytes) -> object:
    """The key object of any private PEM key that is not encrypted.

    Raises:
        ProtocolError: not a private key.
    """
    try:
        return load_pem_private_key(bounded(key), password=None)
    except UNREADABLE:
        raise ProtocolError("private key: unreadable; restore it from a backup") from None


def bounded(content: bytes) -> bytes:
    """`content`, if it is short enough to be a key or a certificate.

    Raises:
        ProtocolError: it is not.
    """
    if len(content) > MAX_PEM_BYTES:
        raise ProtocolError(f"{len(content)} bytes for a key, the limit is {MAX_PEM_BYTES}")
    return content


def new_signing_key() -> bytes:
    """A new Ed25519 private key, PEM (PKCS 8, not encrypted)."""
    key = Ed25519PrivateKey.generate()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def verifying_key(signing_key: bytes) -> str:
    """The public half of a signing key, as hex.

    Raises:
        ProtocolError: not an Ed25519 private key.
    """
    return _signing_key(signing_key).public_key().public_bytes_raw().hex()


def sign(signing_key: bytes, message: bytes) -> bytes:
    """The Ed25519 signature of `message`, `SIGNATURE_BYTES` long.

    Raises:
        ProtocolError: not an Ed25519 private key.
    """
    return _signing_key(signing_key).sign(message)


def sign_statement(signing_key: bytes, purpose: bytes, statement: bytes) -> bytes:
    """Signature and statement in one; `purpose` keeps it from passing for anything else.

    Raises:
        ProtocolError: not an Ed25519 private key.
    """
    return sign(signing_key, purpose + statement) + statement


def signed_statement(verifying_key: str, purpose: bytes, content: bytes) -> bytes | None:
    """The statement in what `sign_statement` made; None if the key's owner did not sign it."""
    signature, statement = content[:SIGNATURE_BYTES], content[SIGNATURE_BYTES:]
    return statement if is_signed(verifying_key, purpose + statement, signature) else None


def is_signed(verifying_key: str, message: bytes, signature: bytes) -> bool:
    """Whether the owner of the hex public key signed `message`; False for anything malformed."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(verifying_key)).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _signing_key(key: bytes) -> Ed25519PrivateKey:
    found = load_private_key(key)
    if not isinstance(found, Ed25519PrivateKey):
        raise ProtocolError("signing key: not an Ed25519 key; restore it from a backup")
    return found
