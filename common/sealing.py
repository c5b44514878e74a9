"""The envelope: a message sealed on the device for the coordinator's round key, and signed.

    magic, lengths | header | signature | wrapped content key | chunk 0 | chunk 1 | … | last chunk

The header is canonical JSON and says all that the message is good for. HPKE (RFC 9180) wraps a
fresh content key for this header and no other, and every chunk of the body is bound to both
(`chunks`). The device signs the digest of it all with the key that it was enrolled with.

Encryption keeps an update from everybody between device and coordinator. It does not keep it from
the coordinator: in `plain` mode that reads single updates, in `secure` mode what it finds inside is
masked. Any bytes open to a message or to a ProtocolError, and no size is believed unchecked.
"""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from proxymoe.common.chunks import (
    KEY_BYTES,
    decrypt_chunks,
    encrypt_chunks,
    num_encrypted_bytes,
)
from proxymoe.common.errors import ProtocolError
from proxymoe.common.files import canonical_json, digest_of
from proxymoe.common.identity import DeviceName, check_device_signature, load_device_key
from proxymoe.common.messages import Digest
from proxymoe.common.round_keys import SUITES, Offer, RoundKeys, best_suite, wrap
from proxymoe.common.tickets import UnixSeconds

MAGIC = b"PXE1"
LENGTHS = struct.Struct("<HH")
"""Of the header and of the signature."""
START = len(MAGIC) + LENGTHS.size
MAX_HEADER_BYTES = 4 << 10
MAX_SIGNATURE_BYTES = 128
MAX_CONTENT_BYTES = 1 << 30
CHUNK_BYTES = 1 << 20
_BOUND, _SIGNED = b"proxymoe envelope 1\n", b"proxymoe envelope signature 1\n"
"""What is bound or signed begins with its purpose, so that nothing else can pass for it."""

Mode = Literal["plain", "secure"]
"""Whether the content is an update, or masked for secure aggregation."""
Part = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")]


class Header(BaseModel):
    """What an envelope says of itself; all of it is bound to the content and signed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    suite: int
    """Row of `round_keys.SUITES`."""
    keys: Digest
    """`Offer.digest` of the round keys that it is sealed to."""
    run: str = Field(max_length=128)
    round: int = Field(ge=0, lt=1 << 53)
    attempt: int = Field(ge=0, lt=1 << 53)
    device: DeviceName
    base: Digest
    plan: Digest
    mode: Mode
    part: Part
    """Which of the messages of this attempt it is; a device sends one of each."""
    content_bytes: int = Field(ge=0, le=MAX_CONTENT_BYTES)
    chunk_bytes: int = Field(ge=1 << 10, le=1 << 22)
    expires: UnixSeconds

    @property
    def slot(self) -> tuple[str, int, int, str, str]:
        """The place that one envelope may take."""
        return self.run, self.round, self.attempt, self.device, self.part


@dataclass(frozen=True, slots=True)
class Opened:
    """An envelope that passed every check."""

    header: Header
    digest: str
    """Names the envelope: SHA-256 of header, wrapped key and body."""
    content: bytes


class Freshness(StrEnum):
    """What an envelope is to those that came before."""

    FRESH = "fresh"
    DUPLICATE = "duplicate"
    """The same again: acknowledge it, use it once."""
    EQUIVOCATION = "equivocation"
    """Another one in the same place: the device signed both, which proves it."""


Seen = Mapping[tuple[str, int, int, str, str], str]
"""{slot: digest} of the envelopes that were opened; to be kept as durably as what was in them."""


def seal(
    content: bytes,
    offer: Offer,
    device_key: bytes,
    *,
    device: str,
    base: str,
    plan: str,
    mode: Mode,
    part: str = "update",
    chunk_bytes: int = CHUNK_BYTES,
) -> bytes:
    """An envelope for the owner of the offered round keys.

    Sealing the same content again makes another envelope, which looks like equivocation: keep the
    bytes until they are acknowledged, and send those again.

    Args:
        content: the message.
        offer: from `verify_offer`; names run, round and attempt.
        device_key: the device's private PEM key.
        device, base, plan, mode, part, chunk_bytes: see `Header`.

    Raises:
        ProtocolError: no suite in common, too large, or a name or digest that cannot be.
    """
    suite = best_suite(offer)
    try:
        header = Header(
            suite=suite,
            keys=offer.digest,
            run=offer.run,
            round=offer.round,
            attempt=offer.attempt,
            device=device,
            base=base,
            plan=plan,
            mode=mode,
            part=part,
            content_bytes=len(content),
            chunk_bytes=chunk_bytes,
            expires=offer.expires,
        )
    except ValidationError as error:
        raise ProtocolError(f"envelope: cannot be sealed, {_fields(error)} is impossible") from None
    raw = canonical_json(header.model_dump())
    secret = os.urandom(KEY_BYTES)
    wrapped = wrap(offer, suite, secret, _BOUND + raw)
    bound = _bound(raw, wrapped)
    body = encrypt_chunks(secret, content, chunk_bytes, bound)
    digest = digest_of(bound, body)
    signature = load_device_key(device_key).sign(_SIGNED + digest.encode(), ECDSA(hashes.SHA256()))
    lengths = LENGTHS.pack(len(raw), len(signature))
    return b"".join((MAGIC, lengths, raw, signature, wrapped, body))


def claims(envelope: bytes) -> Header:
    """What an envelope says of itself. Nothing of it is proven: use it to find keys, no more.

    Raises:
        ProtocolError: not a well-formed envelope.
    """
    return _parts(envelope, MAX_CONTENT_BYTES)[0]


def open_envelope(
    envelope: bytes,
    keys: RoundKeys,
    device_public_key: bytes,
    now: float,
    *,
    device: str,
    base: str,
    plan: str,
    mode: Mode,
    part: str = "update",
    max_content_bytes: int = MAX_CONTENT_BYTES,
) -> Opened:
    """The message that this device sealed for this attempt.

    Args:
        envelope: the bytes that came.
        keys: the round keys of the attempt.
        device_public_key: PEM, as the device was enrolled with.
        now: unix seconds.
        device, base, plan, mode, part: what the header must say.
        max_content_bytes: the limit on what is decrypted.

    Raises:
        ProtocolError: anything else; the message tells what does not fit.
    """
    header, raw, signature, wrapped, body = _parts(envelope, max_content_bytes)
    offer = keys.offer
    here = {"keys": offer.digest, "run": offer.run, "round": offer.round, "attempt": offer.attempt}
    here |= {"device": device, "base": base, "plan": plan, "mode": mode, "part": part}
    here |= {"expires": offer.expires}
    for what, value in here.items():
        if (found := getattr(header, what)) != value:
            raise ProtocolError(f"envelope: for {what} {found!s:.16}, and here is {value!s:.16}")
    bound = _bound(raw, wrapped)
    digest = digest_of(bound, body)
    check_device_signature(device_public_key, _SIGNED + digest.encode(), signature)
    if now >= header.expires:
        raise ProtocolError(
            f"envelope: expired {now - header.expires:.0f} s ago; the round is over"
        )
    secret = keys.unwrap(header.suite, wrapped, _BOUND + raw)
    content = decrypt_chunks(secret, body, header.content_bytes, header.chunk_bytes, bound)
    return Opened(header, digest, content)


def note(seen: Seen, opened: Opened) -> tuple[Seen, Freshness]:
    """What was seen with this envelope added, and what it is to those before.

    A later envelope in a place that is taken is not added.
    """
    known = seen.get(opened.header.slot)
    if known is None:
        return {**seen, opened.header.slot: opened.digest}, Freshness.FRESH
    return seen, Freshness.DUPLICATE if known == opened.digest else Freshness.EQUIVOCATION


def _parts(
    envelope: bytes, max_content_bytes: int
) -> tuple[Header, bytes, bytes, bytes, memoryview]:
    """Header, its bytes, signature, wrapped key and body; sizes are checked, nothing else."""
    if len(envelope) < START or envelope[: len(MAGIC)] != MAGIC:
        raise ProtocolError("not an envelope of version 1")
    length, signature_length = LENGTHS.unpack_from(envelope, len(MAGIC))
    signature_at, wrapped_at = START + length, START + length + signature_length
    if max(length - MAX_HEADER_BYTES, signature_length - MAX_SIGNATURE_BYTES) > 0:
        raise ProtocolError(f"envelope: header and signature of {length}, {signature_length} bytes")
    raw = envelope[START:signature_at]
    try:
        header = Header.model_validate_json(raw)
    except ValidationError as error:
        raise ProtocolError(f"envelope: header refused at {_fields(error)}") from None
    if canonical_json(header.model_dump()) != raw:
        raise ProtocolError("envelope: the header is not written canonically")
    if (suite := SUITES.get(header.suite)) is None:
        raise ProtocolError(f"envelope: suite {header.suite}, known are {list(SUITES)}")
    if header.content_bytes > max_content_bytes:
        raise ProtocolError(
            f"envelope: {header.content_bytes} bytes in it, the limit is {max_content_bytes}"
        )
    body_at = wrapped_at + suite.wrapped_bytes
    whole = body_at + num_encrypted_bytes(header.content_bytes, header.chunk_bytes)
    if len(envelope) != whole:
        raise ProtocolError(f"envelope: {len(envelope)} bytes, by its header it has {whole}")
    signature, wrapped = envelope[signature_at:wrapped_at], envelope[wrapped_at:body_at]
    return header, raw, signature, wrapped, memoryview(envelope)[body_at:]


def _bound(raw: bytes, wrapped: bytes) -> bytes:
    """What every chunk is bound to: all that comes before the body, but the signature."""
    return bytes.fromhex(digest_of(_BOUND, len(raw).to_bytes(2, "big"), raw, wrapped))


def _fields(error: ValidationError) -> list[str]:
    return sorted({".".join(map(str, e["loc"])) for e in error.errors()})
