"""X.509: the local CA, the coordinator's server certificate, and one certificate per device.

Pure functions over PEM bytes; the clock is an argument, in unix seconds.
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from proxymoe.common.addresses import HOST
from proxymoe.common.errors import ConfigError, ProtocolError
from proxymoe.common.identity import (
    NAME,
    UNREADABLE,
    bounded,
    check_name,
    key_digest,
    load_device_key,
    load_device_public_key,
    load_private_key,
    public_pem,
)

MAX_HOST = 253
AUTHORITY_DAYS, SERVER_DAYS, DEVICE_DAYS = 3650, 825, 365
BACKDATED = timedelta(days=1)
"""Certificates are valid from a day before they are made, for devices whose clock is behind."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate and the private key that belongs to it, both PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class DeviceCertificate:
    """A device's certificate that was checked, and what it says."""

    certificate: bytes
    device: str
    serial: str
    """Lower-case hex; names this certificate where it is recorded or revoked."""
    public_key: bytes
    """PEM, byte for byte what the device's Flower node sends along."""
    key: str
    """`key_digest` of the public key; another certificate for the same key has the same."""
    expires: float
    """Unix seconds."""


def new_authority(now: float) -> Identity:
    """A new local CA, EC P-256, valid for ten years; it may sign certificates but no other CA."""
    key = generate_private_key(SECP256R1())
    serial = x509.random_serial_number()
    name = _name(f"ProxyMoE CA {serial % 16**8:08x}")
    builder = _builder(name, key.public_key(), now, AUTHORITY_DAYS, serial)
    builder = builder.add_extension(x509.BasicConstraints(True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(certificates=True), critical=True)
    return _identity(_signed(builder, name, key), key)


def new_server_certificate(authority: Identity, hosts: Sequence[str], now: float) -> Identity:
    """A new EC P-256 key with a certificate for all of `hosts`, names or addresses.

    Raises:
        ConfigError: no host, or one that devices could not connect to.
        ProtocolError: the authority is unreadable.
    """
    if not hosts:
        raise ConfigError("a server certificate needs at least one host name or address")
    alternatives = x509.SubjectAlternativeName([_alternative(host) for host in hosts])
    key = generate_private_key(SECP256R1())
    builder = _builder(_name("ProxyMoE coordinator"), key.public_key(), now, SERVER_DAYS)
    builder = builder.add_extension(alternatives, critical=False)
    return _identity(_issued(authority, builder, ExtendedKeyUsageOID.SERVER_AUTH), key)


def signing_request(device: str, key: bytes) -> bytes:
    """A PEM request for a certificate of `device`, signed with the device's own key.

    Raises:
        ConfigError: not a name that a device may have.
        ProtocolError: not the private key of a device.
    """
    builder = x509.CertificateSigningRequestBuilder().subject_name(_name(check_name(device)))
    return builder.sign(load_device_key(key), hashes.SHA384()).public_bytes(Encoding.PEM)


def sign_device(
    authority: Identity, device: str, request: bytes, now: float, days: float = DEVICE_DAYS
) -> DeviceCertificate:
    """A certificate for `device` and the key in `request`; nothing else of the request is used.

    Raises:
        ProtocolError: the request is malformed, not signed by its own key, for another name or
            kind of key, or the authority is unreadable.
    """
    key = load_device_public_key(requested_key(device, request))
    builder = _builder(_name(device), key, now, days)
    certificate = _issued(authority, builder, ExtendedKeyUsageOID.CLIENT_AUTH)
    return check_device_certificate(certificate, authority.certificate, now)


def requested_key(device: str, request: bytes) -> bytes:
    """The PEM public key in a request for a certificate of `device`, which the key itself signed.

    Raises:
        ProtocolError: malformed, not signed by that key, for another name or kind of key.
    """
    try:
        found = x509.load_pem_x509_csr(bounded(request))
        proven, key = found.is_signature_valid, found.public_key()
    except UNREADABLE:
        raise ProtocolError("certificate request: unreadable") from None
    if not proven or not isinstance(key, EllipticCurvePublicKey):
        raise ProtocolError("certificate request: not signed by the device key that it names")
    if _common_name(found.subject) != device:
        raise ProtocolError(f"certificate request: not for device {device}")
    return public_pem(load_device_public_key(public_pem(key)))


def check_device_certificate(certificate: bytes, authority: bytes, now: float) -> DeviceCertificate:
    """What a device's certificate says, if `authority` signed it as one and it is valid now.

    Raises:
        ProtocolError: malformed, from a foreign CA, no device's, expired or not yet valid.
    """
    found, issuer = _certificate(certificate), _certificate(authority)
    try:
        found.verify_directly_issued_by(issuer)
    except (*UNREADABLE, InvalidSignature):
        raise ProtocolError("certificate: signed by a foreign CA; enrol again") from None
    key = found.public_key()
    if not _is_for_devices(found) or not isinstance(key, EllipticCurvePublicKey):
        raise ProtocolError("certificate: not one that identifies a device")
    when = datetime.fromtimestamp(now, UTC)
    start, end = found.not_valid_before_utc, found.not_valid_after_utc
    if not start <= when <= end:
        raise ProtocolError(
            f"certificate: valid from {start:%Y-%m-%d} to {end:%Y-%m-%d}, and here it is "
            f"{when:%Y-%m-%d}; enrol again, or set the clock"
        )
    public = public_pem(key)
    return DeviceCertificate(
        certificate=found.public_bytes(Encoding.PEM),
        device=_common_name(found.subject),
        serial=f"{found.serial_number:x}",
        public_key=public,
        key=key_digest(public),
        expires=end.timestamp(),
    )


def expiry(certificate: bytes) -> float:
    """When a certificate expires, unix seconds.

    Raises:
        ProtocolError: not a certificate.
    """
    return _certificate(certificate).not_valid_after_utc.timestamp()


def _builder(
    subject: x509.Name,
    key: EllipticCurvePublicKey,
    now: float,
    days: float,
    serial: int | None = None,
) -> x509.CertificateBuilder:
    made = datetime.fromtimestamp(int(now), UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(serial or x509.random_serial_number())
        .not_valid_before(made - BACKDATED)
        .not_valid_after(made + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _issued(
    authority: Identity, builder: x509.CertificateBuilder, purpose: ObjectIdentifier
) -> bytes:
    key = load_private_key(authority.key)
    if not isinstance(key, EllipticCurvePrivateKey):
        raise ProtocolError("CA key: not an EC key; restore it from a backup")
    link = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    builder = (
        builder.add_extension(x509.BasicConstraints(False, path_length=None), critical=True)
        .add_extension(_usage(certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(link, critical=False)
    )
    return _signed(builder, _certificate(authority.certificate).subject, key)


def _signed(
    builder: x509.CertificateBuilder, issuer: x509.Name, key: EllipticCurvePrivateKey
) -> bytes:
    return builder.issuer_name(issuer).sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _identity(certificate: bytes, key: EllipticCurvePrivateKey) -> Identity:
    plain = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Identity(certificate, plain)


def _usage(certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        key_cert_sign=certificates,
        crl_sign=certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _is_for_devices(certificate: x509.Certificate) -> bool:
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (ValueError, x509.ExtensionNotFound):
        return False
    return ExtendedKeyUsageOID.CLIENT_AUTH in usage


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _common_name(subject: x509.Name) -> str:
    names = [str(found.value) for found in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if len(names) != 1 or not re.fullmatch(NAME, names[0]):
        raise ProtocolError("certificate: does not name exactly one device")
    return names[0]


def _alternative(host: str) -> x509.GeneralName:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if len(host) > MAX_HOST or not re.fullmatch(HOST, host):
            raise ConfigError(f"host {host[:80]!r}: neither a host name nor an address") from None
        return x509.DNSName(host)
    if address.is_unspecified:
        raise ConfigError(f"host {host}: a place to listen; name what devices connect to")
    return x509.IPAddress(address)


def _certificate(content: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(bounded(content))
    except UNREADABLE:
        raise ProtocolError("certificate: unreadable") from None
