"""What opens an attempt at a masked sum: the terms, and what a device needs to hold them against.

The terms are the same for all. Beside them a device is told which of its numbers belong to which
block, since it does not know the full adapter, and its peers' identity keys, which it compares with
those that it has pinned. A false word about the blocks spoils the sum and gives nothing away: all
numbers are masked, and who hides whom follows from the terms.
"""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from proxymoe.common.errors import ProtocolError
from proxymoe.common.files import canonical_json
from proxymoe.common.identity import MAX_PEM_BYTES, DeviceName
from proxymoe.common.secagg import MAX_TERMS_BYTES, Terms

MAGIC = b"PXO1"
Pem = Annotated[str, Field(max_length=MAX_PEM_BYTES)]


class Opening(BaseModel):
    """The coordinator's first word to one device in one attempt."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    terms: Terms
    keys: dict[DeviceName, Pem]
    """PEM public keys of all devices of the terms."""
    blocks: tuple[int, ...] = Field(min_length=1)
    """This device's blocks, as places in the full layout, increasing."""
    sizes: tuple[Annotated[int, Field(gt=0)], ...]
    """Numbers per block."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if sorted(self.keys) != list(self.terms.devices):
            raise ValueError("there is one key for each device of the terms")
        if list(self.blocks) != sorted(set(self.blocks)) or len(self.blocks) != len(self.sizes):
            raise ValueError("blocks are in order, each once and with its size")
        return self


def opening_bytes(opening: Opening) -> bytes:
    """The opening as bytes that `parse_opening` reads."""
    return MAGIC + canonical_json(opening.model_dump(mode="json"))


def is_opening(content: bytes) -> bool:
    """Whether bytes want to be an opening, and not a later letter."""
    return content[: len(MAGIC)] == MAGIC


def parse_opening(content: bytes) -> Opening:
    """The opening that bytes from anywhere stand for.

    Raises:
        ProtocolError: too large, no opening, or one that contradicts itself.
    """
    if not is_opening(content) or len(content) > MAX_TERMS_BYTES:
        raise ProtocolError(
            f"{len(content)} bytes are no opening of a masked sum; the limit is {MAX_TERMS_BYTES}"
        )
    try:
        return Opening.model_validate_json(content[len(MAGIC) :])
    except ValidationError as error:
        found = [(".".join(map(str, e["loc"])), e["msg"]) for e in error.errors()[:3]]
        raise ProtocolError(f"opening of a masked sum refused: {found}") from None
