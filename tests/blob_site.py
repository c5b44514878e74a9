"""A blob service on 127.0.0.1 with a throw-away certificate authority; nothing here is a mock."""

import ipaddress
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from proxymoe.client.fetch import open_channel
from proxymoe.common.files import digest_of
from proxymoe.server.blobs import BlobLimits, BlobPlace, BlobService, serve_blobs

SMALL_CHUNKS = BlobLimits(chunk_bytes=16 << 10)


class Authority:
    """A certificate authority that signs whatever a test asks for."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(["test authority"])
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        found = self._builder(self._name, self._key).add_extension(constraints, critical=True)
        self.certificate = _pem(found.sign(self._key, hashes.SHA256()))

    def issue(self, *names: str) -> tuple[bytes, bytes]:
        """(certificate, key), PEM, with these common names, for 127.0.0.1."""
        key = ec.generate_private_key(ec.SECP256R1())
        host = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        builder = self._builder(_name(names), key).add_extension(host, critical=False)
        plain = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return _pem(builder.sign(self._key, hashes.SHA256())), plain

    def _builder(self, subject, key) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
        )


class BlobFiles(dict[str, BlobPlace]):
    """Blobs in one file, one after another, as in a checkpoint."""

    def __init__(self, path, *contents: bytes) -> None:
        self.path = path
        self.contents = contents
        path.write_bytes(b"header" + b"".join(contents))
        offset = len(b"header")
        for content in contents:
            self[digest_of(content)] = BlobPlace(path, offset, len(content))
            offset += len(content)

    @property
    def needs(self) -> dict[str, int]:
        """{digest: num_bytes} of all of them."""
        return {digest: place.num_bytes for digest, place in self.items()}


class BlobSite:
    """A running service: its port, and how to connect to it."""

    def __init__(self, authority: Authority, port: int) -> None:
        self.authority = authority
        self.port = port

    def connector(self, device="device-a", port=None, authority=None):
        """Opens connections as a device, through another port if one is given."""
        certificate, key = (authority or self.authority).issue(device)
        address = f"127.0.0.1:{port or self.port}"
        return partial(open_channel, address, self.authority.certificate, certificate, key)


@contextmanager
def serving(service: BlobService, authority: Authority | None = None) -> Iterator[BlobSite]:
    """The service on a free port while the block runs."""
    authority = authority or Authority()
    certificate, key = authority.issue("coordinator")
    server, port = serve_blobs(service, "127.0.0.1:0", certificate, key, authority.certificate)
    try:
        yield BlobSite(authority, port)
    finally:
        server.stop(None).wait()


def everyone(device: str, digest: str) -> bool:
    """Allows every blob to every device."""
    return bool(device and digest)


def contents(*sizes: int) -> list[bytes]:
    """Random blobs of these sizes."""
    return [os.urandom(size) for size in sizes]


def status(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    """Code and words of a failed call."""
    return error.code(), error.details() or ""


def _name(names) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)
