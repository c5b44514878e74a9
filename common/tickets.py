"""What the coordinator hands out: enrolment tokens, used once, and job tickets, signed.

An enrolment token is everything a new device must know, in one string that is carried to it by a
trusted hand. A job ticket says that this coordinator wants this task done by this device now; the
device checks it before it does anything else. Pure functions; the clock is an argument, in unix
seconds.
"""

import base64
import binascii
import hmac
import re
import secrets
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from proxymoe.common.addresses import split_address
from proxymoe.common.errors import ConfigError, ProtocolError
from proxymoe.common.files import canonical_json, digest_of
from proxymoe.common.identity import (
    MAX_PEM_BYTES,
    DeviceName,
    PublicKey,
    check_name,
    sign_statement,
    signed_statement,
)
from proxymoe.common.messages import Digest

SECRET_BYTES = 32
SKEW_SECONDS = 300
"""How far a device's clock may be from the coordinator's before tickets are refused."""
MAX_TOKEN_CHARACTERS = 32 << 10
MAX_TICKET_BYTES = 4 << 10
_PURPOSE = b"proxymoe job ticket 1\n"
"""Goes before what is signed, so that no other signature of this key can pass for a ticket."""

Secret = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
Pem = Annotated[str, Field(max_length=MAX_PEM_BYTES)]
UnixSeconds = Annotated[int, Field(ge=0, lt=1 << 40)]


def _checked_address(address: str) -> str:
    try:
        split_address(address)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return address


class _Statement(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class EnrolmentToken(_Statement):
    """An invitation for one device to one coordinator; whoever holds it may enrol once."""

    coordinator: Annotated[str, AfterValidator(_checked_address)]
    """host:port of the gateway."""
    authority: Pem
    """The coordinator's CA; the device trusts no other."""
    device: DeviceName
    secret: Secret
    expires: UnixSeconds

    @property
    def text(self) -> str:
        """The token as one string without spaces; `parse_token` reads it."""
        content = canonical_json(self.model_dump())
        return base64.urlsafe_b64encode(content).decode().rstrip("=")


class EnrolRequest(_Statement):
    """Device to coordinator: the token's secret, and a request for a certificate."""

    device: DeviceName
    secret: Secret
    request: Pem
    """PEM certificate signing request."""


class EnrolReply(_Statement):
    """Coordinator to device: its certificate, and whom to believe from now on."""

    certificate: Pem
    authority: Pem
    coordinator: PublicKey
    """Verifies job tickets; the device pins it."""
    blobs: Annotated[str, AfterValidator(_checked_address)]
    """host:port of the blob service."""


class Ticket(_Statement):
    """One job: which task, for which device and what it holds, and how long that is so."""

    run: str = Field(max_length=128)
    round: int = Field(ge=0)
    device: DeviceName
    base: Digest
    plan: Digest
    layout: Digest
    task: Digest
    """Digest of the task's bytes."""
    cohort_size: int = Field(ge=1)
    """Fewest devices of the round whose updates are summed before the sum is used."""
    issued: UnixSeconds
    expires: UnixSeconds

    @model_validator(mode="after")
    def _lasts(self) -> Self:
        if self.expires <= self.issued:
            raise ValueError("expires before it is issued")
        return self


def new_token(coordinator: str, authority: bytes, device: str, expires: float) -> EnrolmentToken:
    """A token with a new random secret; keep only `secret_digest` of that.

    Raises:
        ConfigError: an address or a name that cannot be.
    """
    split_address(coordinator)
    return EnrolmentToken(
        coordinator=coordinator,
        authority=authority.decode(),
        device=check_name(device),
        secret=secrets.token_hex(SECRET_BYTES),
        expires=int(expires),
    )


def parse_token(text: str, now: float) -> EnrolmentToken:
    """The token that a string stands for.

    Raises:
        ProtocolError: not a whole token, or it has expired.
    """
    text = text.strip()
    try:
        if len(text) > MAX_TOKEN_CHARACTERS or not re.fullmatch(r"[A-Za-z0-9_-]+", text):
            raise ValueError
        content = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        token = EnrolmentToken.model_validate_json(content)
    except (ValueError, binascii.Error):
        raise ProtocolError(
            "enrolment token: damaged or incomplete; copy it again, whole, from the coordinator"
        ) from None
    if token.expires <= now:
        raise ProtocolError(
            f"enrolment token: expired {now - token.expires:.0f} s ago by this clock; "
            "ask for a new one, or set the clock"
        )
    return token


def secret_digest(secret: str) -> str:
    """What the coordinator keeps of a token's secret, lower-case hex."""
    return digest_of(bytes.fromhex(secret))


def is_secret(secret: str, digest: str) -> bool:
    """Whether a secret has this digest; takes the same time whatever the answer."""
    return hmac.compare_digest(secret_digest(secret), digest)


def issue_ticket(ticket: Ticket, signing_key: bytes) -> bytes:
    """The ticket as bytes that `verify_ticket` accepts: signature, then canonical JSON.

    Raises:
        ProtocolError: not the coordinator's signing key.
    """
    statement = canonical_json(ticket.model_dump())
    return sign_statement(signing_key, _PURPOSE, statement)


def verify_ticket(
    content: bytes,
    coordinator: str,
    now: float,
    *,
    device: str,
    base: str,
    plan: str,
    layout: str,
    task: bytes,
    skew: float = SKEW_SECONDS,
) -> Ticket:
    """The ticket, if `coordinator` signed it for this task, this device and what it holds.

    Args:
        coordinator: the public key that was pinned at enrolment.
        base, plan, layout: digests of what the device holds.
        task: the task's bytes, as received.
        skew: seconds by which the two clocks may differ.

    Raises:
        ProtocolError: anything else; the message tells what does not fit.
    """
    is_short = len(content) <= MAX_TICKET_BYTES
    statement = signed_statement(coordinator, _PURPOSE, content) if is_short else None
    if statement is None:
        raise ProtocolError("job ticket: not signed by the pinned coordinator; nothing was done")
    try:
        ticket = Ticket.model_validate_json(statement)
    except ValidationError:
        raise ProtocolError("job ticket: of another version of ProxyMoE; update one side") from None
    if now < ticket.issued - skew:
        raise ProtocolError(
            f"job ticket: not valid for another {ticket.issued - now:.0f} s by this clock; "
            f"the clocks may differ by {skew:.0f} s; set the clock"
        )
    if now >= ticket.expires + skew:
        raise ProtocolError(
            f"job ticket: expired {now - ticket.expires:.0f} s ago by this clock; "
            "the round is over, or the clock is wrong"
        )
    here = {"device": device, "base": base, "plan": plan, "layout": layout}
    for what, value in {**here, "task": digest_of(task)}.items():
        if (wanted := getattr(ticket, what)) != value:
            raise ProtocolError(f"job ticket: for {what} {wanted[:16]}, and here is {value[:16]}")
    return ticket
