"""Real TLS accepts what it should, and a device is believed only with its own certificate."""

import base64
import socket
import ssl
import threading
import time

import pytest

from proxymoe.common import certificates, identity
from proxymoe.common.certificates import Identity, check_device_certificate, sign_device
from proxymoe.common.errors import ConfigError, ProtocolError

NOW = time.time()
DAY = 86_400
AUTHORITY = certificates.new_authority(NOW)
FOREIGN = certificates.new_authority(NOW)
SERVER = certificates.new_server_certificate(AUTHORITY, ["127.0.0.1", "::1", "localhost"], NOW)
KEY = identity.new_device_key()
REQUEST = certificates.signing_request("phone", KEY)
PHONE = sign_device(AUTHORITY, "phone", REQUEST, NOW)


def context(tmp_path, side, own=None, trusted=AUTHORITY.certificate):
    """A TLS context as strict as Python has one, with its own certificate, if any."""
    found = ssl.SSLContext(side)
    found.verify_flags |= ssl.VERIFY_X509_STRICT
    found.verify_mode = ssl.CERT_REQUIRED
    found.load_verify_locations(cadata=trusted.decode())
    if own is not None:
        path = tmp_path / f"{side.name}.pem"
        path.write_bytes(own.key + own.certificate)
        found.load_cert_chain(path)
    return found


def handshake(server, client, host):
    """The common name that the server saw; raises what the client raises."""
    ours, theirs = socket.socketpair()
    seen = []

    def answer():
        try:
            with server.wrap_socket(theirs, server_side=True) as link:
                seen.append(dict(part[0] for part in link.getpeercert()["subject"])["commonName"])
                link.sendall(b"welcome")
        except OSError as error:
            seen.append(error)
            theirs.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=host) as link:
            if link.recv(7) != b"welcome":
                raise ConnectionResetError("not welcome")
    finally:
        ours.close()
        thread.join()
    return seen[0]


def mutual(tmp_path, own=None, trusted=AUTHORITY.certificate, host="127.0.0.1", server=SERVER):
    device = own or Identity(PHONE.certificate, KEY)
    return handshake(
        context(tmp_path, ssl.PROTOCOL_TLS_SERVER, server),
        context(tmp_path, ssl.PROTOCOL_TLS_CLIENT, device, trusted),
        host,
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_coordinator_and_device_recognise_each_other(tmp_path, host):
    assert mutual(tmp_path, host=host) == "phone"


def test_a_device_refuses_a_server_with_another_name(tmp_path):
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        mutual(tmp_path, host="elsewhere.example")


def test_a_device_refuses_a_server_of_a_foreign_ca(tmp_path):
    with pytest.raises(ssl.SSLCertVerificationError):
        mutual(tmp_path, trusted=FOREIGN.certificate)


def test_the_coordinator_refuses_a_device_of_a_foreign_ca(tmp_path):
    stranger = sign_device(FOREIGN, "phone", REQUEST, NOW)
    with pytest.raises(OSError, match=r"unknown ca|not welcome|reset"):
        mutual(tmp_path, own=Identity(stranger.certificate, KEY))


def test_a_device_certificate_serves_nobody(tmp_path):
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        mutual(tmp_path, server=Identity(PHONE.certificate, KEY))


def test_a_certificate_says_who_the_device_is():
    found = check_device_certificate(PHONE.certificate, AUTHORITY.certificate, NOW)
    assert found == PHONE
    assert found.device == "phone"
    assert found.public_key == identity.public_key(KEY)
    assert found.key == identity.key_digest(found.public_key)
    assert found.expires == pytest.approx(NOW + certificates.DEVICE_DAYS * DAY, abs=1)
    assert certificates.expiry(found.certificate) == found.expires


def test_a_second_certificate_for_a_key_has_another_serial_and_the_same_key():
    again = sign_device(AUTHORITY, "phone", REQUEST, NOW)
    assert again.key == PHONE.key
    assert again.serial != PHONE.serial


def test_validity_is_by_the_clock_that_is_given():
    check_device_certificate(PHONE.certificate, AUTHORITY.certificate, NOW - 0.9 * DAY)
    for when in (NOW - 1.1 * DAY, NOW + (certificates.DEVICE_DAYS + 0.1) * DAY):
        with pytest.raises(ProtocolError, match="set the clock"):
            check_device_certificate(PHONE.certificate, AUTHORITY.certificate, when)


def tampered():
    """The request for `phone`, made out to `phond` by hand."""
    lines = REQUEST.decode().strip().splitlines()
    content = base64.b64decode("".join(lines[1:-1])).replace(b"phone", b"phond")
    body = base64.encodebytes(content).decode().strip()
    return "\n".join([lines[0], body, lines[-1], ""]).encode()


@pytest.mark.parametrize(
    ("device", "request_", "reason"),
    [
        ("tablet", REQUEST, "not for device tablet"),
        ("phond", tampered(), "not signed"),
        ("phone", b"no request", "unreadable"),
        ("phone", PHONE.certificate, "unreadable"),
        ("phone", REQUEST + b"\n" * identity.MAX_PEM_BYTES, "limit"),
    ],
)
def test_a_request_that_is_not_the_device_s_own_is_refused(device, request_, reason):
    with pytest.raises(ProtocolError, match=reason):
        sign_device(AUTHORITY, device, request_, NOW)


@pytest.mark.parametrize(
    ("certificate", "reason"),
    [
        (sign_device(FOREIGN, "phone", REQUEST, NOW).certificate, "foreign CA"),
        (SERVER.certificate, "not one that identifies a device"),
        (AUTHORITY.certificate, "not one that identifies a device"),
        (b"no certificate", "unreadable"),
    ],
)
def test_a_certificate_that_is_no_device_s_of_ours_is_refused(certificate, reason):
    with pytest.raises(ProtocolError, match=reason):
        check_device_certificate(certificate, AUTHORITY.certificate, NOW)


def test_the_ca_s_name_without_its_key_signs_nothing():
    with pytest.raises(ProtocolError, match="foreign CA"):
        sign_device(Identity(AUTHORITY.certificate, FOREIGN.key), "phone", REQUEST, NOW)
    broken = Identity(AUTHORITY.certificate, identity.new_signing_key())
    with pytest.raises(ProtocolError, match="restore it"):
        sign_device(broken, "phone", REQUEST, NOW)


@pytest.mark.parametrize(
    "host", ["", " ", "a b", "*.example", "-a", "0.0.0.0", "::", "a" * 64, "a.", "a." * 127 + "aa"]
)
def test_a_host_that_devices_cannot_connect_to_is_refused(host):
    with pytest.raises(ConfigError, match="host"):
        certificates.new_server_certificate(AUTHORITY, [host], NOW)


def test_a_server_certificate_needs_a_host():
    with pytest.raises(ConfigError, match="at least one"):
        certificates.new_server_certificate(AUTHORITY, [], NOW)


def test_a_request_needs_a_good_name_and_a_device_key():
    with pytest.raises(ConfigError, match="device name"):
        certificates.signing_request("a/b", KEY)
    with pytest.raises(ProtocolError, match="P-384"):
        certificates.signing_request("phone", AUTHORITY.key)


def test_private_keys_are_not_printed():
    assert "PRIVATE" in AUTHORITY.key.decode()
    assert "PRIVATE" not in repr(AUTHORITY)
