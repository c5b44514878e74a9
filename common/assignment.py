"""What a device applies for, and what the coordinator assigns to it: a plan, and the work on it.

An assignment is all that a device must know before its policy can decide: what there is to fetch,
how much to train, and among how many it hides. It is signed, so nobody else can set a device to
work. Pure functions over bytes.
"""

import math
from typing import Annotated, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from proxymoe.common.config import AdapterSettings, TrainSettings
from proxymoe.common.errors import ProtocolError
from proxymoe.common.files import canonical_json
from proxymoe.common.identity import DeviceName, sign_statement, signed_statement
from proxymoe.common.messages import Digest
from proxymoe.common.privacy_settings import Noise

APPLY = "/proxymoe.plans.v1.Plans/Apply"
"""The gRPC method, beside the blob service: `application_bytes` in, assignment bytes out."""
MAX_APPLICATION_BYTES = 64 << 10
MAX_ASSIGNMENT_BYTES = 64 << 10
MAX_BYTES = 1 << 50
_PURPOSE = b"proxymoe assignment 1\n"
"""Goes before what is signed, so that no other signature of this key can pass for one."""

Size = Annotated[int, Field(ge=0, le=MAX_BYTES)]
Domain = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class _Statement(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Statement = TypeVar("Statement", bound=_Statement)


class Blob(_Statement):
    """Content that the blob service has for this device."""

    digest: Digest
    num_bytes: Size


class Application(_Statement):
    """Device to coordinator: what kind of data it has, as far as its owner wants to tell.

    A domain that the owner names, or a noised domain mixture, or neither: then every public
    domain counts alike.
    """

    domain: Domain | None = None
    mixture: dict[Domain, Annotated[float, Field(ge=0, le=1)]] | None = None
    """Released by `client.mixture`; weights sum to 1."""
    budget_bytes: Size | None = None
    """Most bytes of model weights; None leaves it to the coordinator."""

    @model_validator(mode="after")
    def _describes_once(self) -> Self:
        if self.domain is not None and self.mixture is not None:
            raise ValueError("name a domain or give a mixture, not both")
        if self.mixture is not None and not math.isclose(
            math.fsum(self.mixture.values()), 1.0, abs_tol=1e-6
        ):
            raise ValueError("the weights of a mixture sum to 1")
        return self


class Assignment(_Statement):
    """Coordinator to device: the proxy submodel it gets, and the work that will be asked."""

    run: str = Field(max_length=128)
    device: DeviceName
    base: Digest
    plan: Digest
    layout: Digest
    """Of the adapter on this plan."""
    adapter: AdapterSettings
    adapter_seed: int = Field(ge=0)
    """With `adapter`, all it takes to build the layout on the submodel."""
    manifest: Blob
    """The submodel's `Manifest`, as JSON."""
    companions: dict[str, Size] = Field(default_factory=dict)
    """{digest: num_bytes} of the small files that the manifest names."""
    table: Blob | None = None
    """The `DomainTable` by which a device may find its mixture."""
    experts: Blob | None = None
    """The `ExpertTable` by which it may then rank experts for itself."""
    model_bytes: Size
    """Weights of the submodel, which are what is fetched."""
    memory_bytes: Size
    """Peak of a training job, as the coordinator estimates it."""
    train: TrainSettings
    clip_norm: float = Field(gt=0)
    cohort_size: int = Field(ge=1)
    """Fewest devices whose updates are summed before anything is done with the sum."""
    masked: bool = False
    """Whether updates are summed under masks."""
    noise: Noise | None = None
    """What is added to every sum; None adds nothing."""
    rounds: int = Field(ge=1)


def application_bytes(application: Application) -> bytes:
    """The application as canonical JSON."""
    return canonical_json(application.model_dump(exclude_none=True))


def parse_application(content: bytes) -> Application:
    """The application that bytes from anywhere stand for.

    Raises:
        ProtocolError: too large, or not one.
    """
    return _parsed(Application, content, MAX_APPLICATION_BYTES, "application")


def issue_assignment(assignment: Assignment, signing_key: bytes) -> bytes:
    """The assignment as bytes that `verify_assignment` accepts: signature, then canonical JSON.

    Raises:
        ProtocolError: not the coordinator's signing key.
    """
    statement = canonical_json(assignment.model_dump(mode="json", exclude_none=True))
    return sign_statement(signing_key, _PURPOSE, statement)


def verify_assignment(content: bytes, coordinator: str, device: str) -> Assignment:
    """The assignment, if `coordinator`, the public key pinned at enrolment, made it for `device`.

    Raises:
        ProtocolError: anything else.
    """
    statement = signed_statement(coordinator, _PURPOSE, content)
    if statement is None:
        raise ProtocolError("assignment: not signed by the pinned coordinator; nothing was done")
    assignment = _parsed(Assignment, statement, MAX_ASSIGNMENT_BYTES, "assignment")
    if assignment.device != device:
        raise ProtocolError(f"assignment: for device {assignment.device}, and this is {device}")
    return assignment


def _parsed(kind: type[Statement], content: bytes, limit: int, what: str) -> Statement:
    if len(content) > limit:
        raise ProtocolError(f"{what}: {len(content)} bytes, the limit is {limit}")
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        fields = sorted({".".join(map(str, e["loc"])) or "whole" for e in error.errors()})
        raise ProtocolError(
            f"{what}: refused at {fields}; update the older side of ProxyMoE"
        ) from None
