"""What devices and coordinator write to each other while they aggregate securely.

A letter is a typed header and raw bytes. Devices sign theirs, over header and body, so that the
coordinator cannot put words in a device's mouth; peers check the two kinds that they rely on,
introductions and consents. The coordinator's own letters carry no signature: they travel inside
ticketed tasks, and the protocol is made for a coordinator that may lie.

Every letter names the transcript it continues: a digest over all that has been agreed so far in
this attempt. A letter of another run, round, attempt or phase, or of a coordinator that tells
different devices different things, does not fit and is refused. Any byte string decodes to a letter
or to a ProtocolError.
"""

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from proxymoe.common.errors import ProtocolError
from proxymoe.common.files import canonical_json
from proxymoe.common.identity import PublicKey
from proxymoe.common.messages import Digest

MAGIC = b"PXA1"
MAX_HEADER_BYTES = 1 << 20
MAX_BODY_BYTES = 1 << 30
MAX_DEVICES = 256
_PURPOSE = b"proxymoe secure aggregation 1\n"
"""Goes before what is signed, so that no other signature of a device's key can pass for one."""
_FRAME = struct.Struct("<4sHI")
"""Magic, bytes of the signature, bytes of the header."""


def _increasing(numbers: tuple[int, ...]) -> tuple[int, ...]:
    if any(a >= b for a, b in pairwise(numbers)):
        raise ValueError("numbers must increase")
    return numbers


Index = Annotated[int, Field(ge=0, lt=MAX_DEVICES)]
"""A device, by its place in the sorted list of the terms."""
Indices = Annotated[tuple[Index, ...], AfterValidator(_increasing)]
Signature = Annotated[str, Field(pattern=r"^(?:[0-9a-f]{2}){1,256}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Letter(_Part):
    """Base of all letters."""

    transcript: Digest


class SignedLetter(Letter):
    """Base of the letters that a device writes."""

    device: Index


class Announcement(SignedLetter):
    """Device: I take part, and these are my keys for this attempt."""

    kind: Literal["announcement"] = "announcement"
    share_key: PublicKey
    """X25519; seals the shares that peers keep for each other."""
    mask_key: PublicKey
    """X25519; pairs of devices make the masks that cancel out from it."""


class Introduction(_Part):
    """A peer's announcement, passed on by the coordinator."""

    device: Index
    share_key: PublicKey
    mask_key: PublicKey
    signature: Signature

    def announcement(self, transcript: str) -> Announcement:
        """The announcement as that device must have signed it."""
        return Announcement(
            transcript=transcript,
            device=self.device,
            share_key=self.share_key,
            mask_key=self.mask_key,
        )


class Roster(Letter):
    """Coordinator: these devices have announced themselves."""

    kind: Literal["roster"] = "roster"
    members: tuple[Introduction, ...]


class Shares(SignedLetter):
    """Device: shares of my secrets. Body: what is sealed for each peer of the roster, in order."""

    kind: Literal["shares"] = "shares"
    commitments: tuple[Digest, ...]
    """Of this device's seeds, one per live class it is in, in order."""


class Delivery(Letter):
    """Coordinator: these devices shared. Body: what each of them sealed for you, in order."""

    kind: Literal["delivery"] = "delivery"
    senders: Indices


class Upload(SignedLetter):
    """Device: my masked vector. Body: packed words of every live class it is in, in order."""

    kind: Literal["upload"] = "upload"


class Survivors(Letter):
    """Coordinator: these devices have uploaded, and only their sum shall be unmasked."""

    kind: Literal["survivors"] = "survivors"
    survivors: Indices


class Consent(SignedLetter):
    """Device: I know of this one set of survivors (the transcript names it), and of no other."""

    kind: Literal["consent"] = "consent"


class Vote(_Part):
    """A peer's consent, passed on by the coordinator."""

    device: Index
    signature: Signature


class Proof(Letter):
    """Coordinator: enough devices have consented to the same survivors."""

    kind: Literal["proof"] = "proof"
    votes: tuple[Vote, ...]


class Release(SignedLetter):
    """Device: for each peer one kind of share. Body: shares in the order of `Terms.due`."""

    kind: Literal["release"] = "release"


AnyLetter = Annotated[
    Announcement | Roster | Shares | Delivery | Upload | Survivors | Consent | Proof | Release,
    Field(discriminator="kind"),
]
_ADAPTER: TypeAdapter[Letter] = TypeAdapter(AnyLetter)
L = TypeVar("L", bound=Letter)


@dataclass(frozen=True, slots=True)
class Received:
    """A decoded letter; nothing about its signature has been checked yet."""

    letter: Letter
    body: memoryview
    signature: bytes


def statement(letter: Letter, body: bytes | memoryview = b"") -> bytes:
    """What a device signs."""
    return _PURPOSE + header_of(letter) + hashlib.sha256(body).digest()


def encode(
    letter: Letter, body: bytes = b"", sign: Callable[[bytes], bytes] | None = None
) -> bytes:
    """The bytes of a letter, signed if it is a device's."""
    header = header_of(letter)
    signature = sign(statement(letter, body)) if sign else b""
    return _FRAME.pack(MAGIC, len(signature), len(header)) + signature + header + body


def decode(content: bytes, max_body_bytes: int = MAX_BODY_BYTES) -> Received:
    """The letter, its body and its signature.

    Raises:
        ProtocolError: anything but one well-formed letter, in its only spelling.
    """
    if len(content) < _FRAME.size or content[:4] != MAGIC:
        raise ProtocolError("not a letter of secure aggregation, version 1")
    _, signature_bytes, header_bytes = _FRAME.unpack_from(content)
    start = _FRAME.size + signature_bytes
    body = memoryview(content)[start + header_bytes :]
    if header_bytes > MAX_HEADER_BYTES or len(content) < start + header_bytes:
        raise ProtocolError(f"header of {header_bytes} bytes does not fit the letter")
    if len(body) > max_body_bytes:
        raise ProtocolError(f"letter of {len(body)} bytes, the limit is {max_body_bytes}")
    header = content[start : start + header_bytes]
    try:
        letter = _ADAPTER.validate_json(header)
    except ValidationError as error:
        fields = sorted({".".join(map(str, e["loc"])) for e in error.errors()})
        raise ProtocolError(f"letter refused at {fields[:9]}") from None
    if header_of(letter) != header:
        raise ProtocolError(f"{type(letter).__name__}: not in canonical form")
    return Received(letter, body, content[_FRAME.size : start])


def header_of(letter: Letter) -> bytes:
    """The one spelling of a letter without its body and signature."""
    return canonical_json(letter.model_dump(mode="json"))
