"""How a device becomes known: one token, for one key, makes one certificate.

The decision and the order of its steps. What is remembered and how Flower is told are arguments;
the gateway brings the request and carries the answer.
"""

import ipaddress
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from proxymoe.common.certificates import DeviceCertificate, Identity, requested_key, sign_device
from proxymoe.common.errors import ProtocolError
from proxymoe.common.identity import key_digest
from proxymoe.common.tickets import EnrolReply, EnrolRequest, is_secret

log = logging.getLogger(__name__)

RETRY_SECONDS = 2


class Standing(StrEnum):
    """What the coordinator thinks of a device key."""

    ENROLLED = "enrolled"
    REVOKED = "revoked"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Invitation:
    """What the coordinator remembers of an enrolment token."""

    secret_digest: str
    expires: float
    """Unix seconds."""


NO_INVITATION = Invitation("0" * 64, 0.0)
"""Compared where there is none, so that an answer takes as long for a name nobody knows."""


class Registry(Protocol):
    """What the coordinator durably knows of devices; called from several threads."""

    def standing(self, key: str) -> Standing:
        """Of the device key with this digest."""

    def invitation(self, device: str) -> Invitation | None:
        """The newest one for this device name, used or not."""

    def claim(self, device: str, key: str) -> bool:
        """Whether that invitation is now this key's: it was unused, or this key's already.

        Decided atomically and remembered: of several keys that ask, one is ever told yes.
        """

    def admit(self, certificate: DeviceCertificate) -> None:
        """Records the certificate; from now on its key is enrolled."""


@dataclass(frozen=True, slots=True)
class Enrolment:
    """What turns a token into a device certificate."""

    registry: Registry
    authority: Identity
    coordinator: str
    """Public key that devices pin, hex."""
    blobs: str
    """host:port of the blob service."""
    register: Callable[[str, bytes], None]
    """Tells Flower a device's name and PEM key. Again is fine; OSError says: not now."""


class Refused(Exception):
    """An answer other than success: HTTP status, a word for programs, a sentence for people."""

    def __init__(self, status: int, error: str, detail: str, retry_after: float = 0.0) -> None:
        super().__init__(detail)
        self.status = status
        self.error = error
        self.detail = detail
        self.retry_after = retry_after
        """Seconds after which the same may be tried again; 0 for never."""


class RateLimit:
    """Per address `burst` calls at once, then one every `seconds`; remembers few addresses."""

    def __init__(
        self,
        burst: int = 10,
        seconds: float = 6.0,
        clock: Callable[[], float] = time.monotonic,
        max_addresses: int = 4096,
    ) -> None:
        self._ahead = (burst - 1) * seconds
        self._seconds = seconds
        self._clock = clock
        self._max_addresses = max_addresses
        self._due: dict[str, float] = {}
        """When each address has its whole burst again, the longest unseen first."""

    def wait(self, address: str) -> float:
        """Seconds until a call from this address is welcome; 0 welcomes, and counts, this one."""
        now, who = self._clock(), _subscriber(address)
        due = max(now, self._due.pop(who, now))
        wait = max(0.0, due - now - self._ahead)
        self._due[who] = due if wait else due + self._seconds
        if len(self._due) > self._max_addresses:
            del self._due[next(iter(self._due))]
        return wait


def busy() -> Refused:
    """The answer when something behind us fails: nothing is wrong with the request, try again."""
    return Refused(503, "busy", "the coordinator cannot do this now; try again", RETRY_SECONDS)


def enrol(asked: EnrolRequest, enrolment: Enrolment, now: float) -> EnrolReply:
    """Makes a device known. Until the token expires, the same key may ask again.

    So an answer that got lost, or a crash between any two steps, does not cost the token.

    Raises:
        Refused: the token is unknown, expired or used, the request is malformed, the key was
            revoked, or Flower cannot be told now.
    """
    registry = enrolment.registry
    invitation = registry.invitation(asked.device) or NO_INVITATION
    if not is_secret(asked.secret, invitation.secret_digest):
        raise Refused(403, "unknown", "no such enrolment token; ask for a new one")
    if invitation.expires <= now:
        raise Refused(403, "expired", "the enrolment token has expired; ask for a new one")
    request = asked.request.encode()
    try:
        public_key = requested_key(asked.device, request)
    except ProtocolError as error:
        raise Refused(400, "malformed", str(error)) from None
    key = key_digest(public_key)
    if registry.standing(key) is Standing.REVOKED:
        raise Refused(403, "revoked", "this device key was revoked; wipe the device to enrol anew")
    if not registry.claim(asked.device, key):
        raise Refused(409, "used", "the enrolment token was used already; ask for a new one")
    try:
        enrolment.register(asked.device, public_key)
    except OSError as error:
        log.warning("device %s: cannot be registered with Flower now: %s", asked.device, error)
        raise busy() from None
    certificate = sign_device(enrolment.authority, asked.device, request, now)
    registry.admit(certificate)
    log.info("device %s: enrolled, certificate %s", asked.device, certificate.serial)
    return EnrolReply(
        certificate=certificate.certificate.decode(),
        authority=enrolment.authority.certificate.decode(),
        coordinator=enrolment.coordinator,
        blobs=enrolment.blobs,
    )


def _subscriber(address: str) -> str:
    """The address, or the network of a v6 address: a subscriber has 2⁶⁴ of those."""
    try:
        v6 = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    return str(v6.ipv4_mapped or ipaddress.IPv6Network((v6, 64), strict=False))
