"""What the ledger says of one thing that leaves a device."""

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

LARGEST = 1 << 50


class Kind(StrEnum):
    """What was sent."""

    ENROLMENT = "enrolment"
    DESCRIPTION = "description"
    """The device's name and what it holds."""
    REQUEST = "request"
    """For pieces of a proxy submodel, a plan or a table."""
    UPDATE = "update"
    REFUSAL = "refusal"
    NOTICE = "notice"
    """That an update waits here, to be summed under masks."""
    SHARES = "shares"
    """Keys and shares of secure aggregation."""
    MASKED = "masked update"
    MIXTURE = "mixture"


class Entry(BaseModel):
    """One thing that leaves, as it is known before it leaves."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    kind: Kind
    receiver: str = Field(min_length=1, max_length=256)
    """To whom: address and name of the coordinator."""
    num_bytes: int = Field(ge=0, le=LARGEST)
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the bytes."""
    run: str | None = Field(default=None, max_length=128)
    round: int | None = Field(default=None, ge=0, le=LARGEST)
    fetched_bytes: int = Field(default=0, ge=0, le=LARGEST)
    """What is fetched by it; for the network budget only."""
    clip_norm: float | None = Field(default=None, gt=0)
    noise: float | None = Field(default=None, gt=0)
    """Standard deviation of the noise in it, or in the sum that it is part of."""
    epsilon: float | None = Field(default=None, gt=0)
    """What it adds to the epsilon spent."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    exposure: float | None = Field(default=None, gt=0)
    """What it adds to Σ (clip norm / noise)², from which the next epsilon follows."""
