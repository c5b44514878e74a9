"""What server and devices say to each other: a typed header and one vector of fp32 numbers.

On the wire: magic and version, header length, JSON header, raw little-endian fp32. Any byte
string decodes to a message or to a ProtocolError, and nothing is allocated before its size has
been checked.
"""

import struct
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from proxymoe.common.config import TrainSettings
from proxymoe.common.errors import ProtocolError
from proxymoe.common.privacy_settings import Noise

MAGIC = b"PXM1"
MAX_HEADER_BYTES = 64 << 10
MAX_VECTOR_BYTES = 1 << 30
DESCRIBE, TRAIN, LETTER = "query.describe", "train.adapter", "query.letter"
"""What a device is asked for, as category and action: to describe itself, to answer a task, and to
answer a letter of secure aggregation."""
RECORD, CONTENT, TICKET, ROUND_KEYS = "proxymoe", "content", "ticket", "round_keys"
"""Where a Flower message carries ours: the name of its one record, the field of the bytes, the
field of the job ticket that lets a device believe them, and the field of the keys that it seals
its answer to, if that is to be in the clear."""
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

Vector = np.ndarray[tuple[int], np.dtype[np.float32]]


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    run: str = Field(max_length=128)
    round: int = Field(ge=0)
    device: str = Field(max_length=128)
    base: Digest
    plan: Digest
    layout: Digest
    """Digest of the adapter layout that the vector is in."""


class TrainTask(_Header):
    """Server to device: tune from this adapter. The vector is the federated adapter."""

    kind: Literal["train"] = "train"
    train: TrainSettings
    clip_norm: float = Field(gt=0)
    seed: int = Field(ge=0)
    masked: bool = False
    """Whether the update waits on the device until it is summed under masks."""
    noise: Noise | None = None
    """What is added to the sum, and by whom; None adds nothing."""


class TrainReply(_Header):
    """Device to server: the clipped update. The vector is tuned minus received adapter."""

    kind: Literal["update"] = "update"
    num_examples: int = Field(ge=1)
    first_loss: float
    last_loss: float
    norm: float = Field(ge=0)
    """L2 norm of the update before clipping."""
    seconds: float = Field(ge=0)
    peak_rss_mb: float = Field(ge=0)


class Trained(_Header):
    """Device to server: an update is here, to be summed under masks. The vector is empty.

    What training was like, losses and norm among it, would tell of the data, and stays here, too.
    """

    kind: Literal["trained"] = "trained"
    seconds: float = Field(ge=0)
    peak_rss_mb: float = Field(ge=0)


class Refusal(_Header):
    """Device to server: no update, and why, without private detail. The vector is empty."""

    kind: Literal["refusal"] = "refusal"
    reason: Literal["diverged", "mismatch", "policy", "data", "failed"]


class Description(BaseModel):
    """Device to server: who it is, and which proxy submodel it holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    device: str = Field(min_length=1, max_length=128)
    plan: Digest


Message = TrainTask | TrainReply | Trained | Refusal
_ADAPTER: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])


def address_of(message: Message) -> dict[str, str | int]:
    """What a message and its answer have in common: run, round, device, and what that holds."""
    return message.model_dump(include=set(_Header.model_fields))


def encode(message: Message, vector: Vector | None = None) -> bytes:
    """The bytes of a message; `vector` is (P,) fp32, or None for none."""
    header = message.model_dump_json().encode()
    if len(header) > MAX_HEADER_BYTES:
        raise ProtocolError(f"header of {len(header)} bytes, the limit is {MAX_HEADER_BYTES}")
    body = b"" if vector is None else np.ascontiguousarray(vector, dtype="<f4").tobytes()
    return MAGIC + struct.pack("<I", len(header)) + header + body


def decode(content: bytes, max_vector_bytes: int = MAX_VECTOR_BYTES) -> tuple[Message, Vector]:
    """The message and its vector, (P,) fp32, possibly empty.

    Raises:
        ProtocolError: anything but a well-formed message within the limits.
    """
    start = len(MAGIC) + 4
    if content[: len(MAGIC)] != MAGIC or len(content) < start:
        raise ProtocolError("not a ProxyMoE message of version 1")
    (length,) = struct.unpack_from("<I", content, len(MAGIC))
    if length > min(MAX_HEADER_BYTES, len(content) - start):
        raise ProtocolError(f"header of {length} bytes does not fit the message")
    body = memoryview(content)[start + length :]
    if len(body) > max_vector_bytes or len(body) % 4:
        raise ProtocolError(f"vector of {len(body)} bytes, the limit is {max_vector_bytes}")
    try:
        message = _ADAPTER.validate_json(content[start : start + length])
    except ValidationError as error:
        fields = sorted({".".join(map(str, e["loc"])) for e in error.errors()})
        raise ProtocolError(f"header refused at {fields}") from None
    return message, np.frombuffer(body, dtype="<f4").astype(np.float32)
