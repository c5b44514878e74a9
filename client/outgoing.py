"""What may leave a device, and what its ledger says of that.

The last look at every answer: it must be of a kind that we know, and fit what was asked; an update
must be within its bounds, and one of a masked task stays here. What else answers a task leaves
sealed for the round. No model code is imported here.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from proxymoe.client.entries import Entry, Kind
from proxymoe.common import letters
from proxymoe.common.errors import Diverged, ProtocolError
from proxymoe.common.files import canonical_json, digest_of
from proxymoe.common.messages import (
    CONTENT,
    RECORD,
    Description,
    Refusal,
    Trained,
    TrainReply,
    TrainTask,
    Vector,
    address_of,
    decode,
)
from proxymoe.common.round_keys import Offer
from proxymoe.common.tickets import Ticket

ROUNDING = 1.0 + 1e-5
"""By how much a norm that is computed anew may differ."""


class Job(NamedTuple):
    """A task that was let in, and is not answered yet."""

    task: TrainTask
    num_bytes: int
    began: float
    exposure: float
    """Σ z⁻² of all that was sent before, see `Noise.cost`."""
    offer: Offer | None
    """What the answer is sealed to; None for a masked task, which needs no envelope."""


class Letter(NamedTuple):
    """A letter of secure aggregation that was let in, and is not answered yet."""

    ticket: Ticket
    num_bytes: int
    task: TrainTask | None
    """Whose update waits, as far as that is known."""
    exposure: float


Asked = Job | Letter | None
"""What is being answered; None is for a description."""


class Leaving(NamedTuple):
    """An answer that may leave."""

    entry: Entry
    """What the ledger says of it."""
    reply: Trained | TrainReply | None = None
    """What it says of a job."""
    envelope: bytes | None = None
    """What is sent in its place; None sends it as it is."""


Seal = Callable[[TrainTask, Offer, bytes], bytes]
"""Puts the answer to a task into an envelope."""


def leaving(answer: Any, asked: Asked, receiver: str, seal: Seal) -> Leaving:
    """An answer as it leaves.

    Args:
        answer: a Flower record, or an error.
        asked: what it answers.
        receiver: who gets it.
        seal: see `Seal`; asked only when nothing speaks against it.

    Raises:
        ProtocolError, Diverged: it must not leave.
    """
    if hasattr(answer, "reason"):  # an error
        return Leaving(_entry(Kind.REFUSAL, receiver, f"{answer.reason or ''}".encode()))
    record = dict(answer.get(RECORD) or {}) if set(answer) == {RECORD} else {}
    content = record.get(CONTENT)
    if set(record) == {CONTENT} and isinstance(content, bytes) and asked:
        if isinstance(asked, Letter):
            return Leaving(_letter_entry(receiver, content, asked))
        return _of_job(receiver, content, asked, seal)
    try:
        described = Description.model_validate(record).model_dump()
    except ValidationError:
        raise ProtocolError("an answer of no known kind; it stays here") from None
    return Leaving(_entry(Kind.DESCRIPTION, receiver, canonical_json(described)))


def _of_job(receiver: str, content: bytes, job: Job, seal: Seal) -> Leaving:
    reply, vector = decode(content)
    if isinstance(reply, TrainTask) or address_of(reply) != address_of(job.task):
        raise ProtocolError("an answer to another task; it stays here")
    about: dict[str, Any] = {
        "run": reply.run,
        "round": reply.round,
        "fetched_bytes": job.num_bytes,
    }
    if isinstance(reply, Refusal):
        kind = Kind.REFUSAL
    elif isinstance(reply, Trained) != job.task.masked or (vector.size and job.task.masked):
        raise ProtocolError("an update in the clear, or none, against the task; it stays here")
    elif isinstance(reply, Trained):
        kind = Kind.NOTICE
    else:
        kind = Kind.UPDATE
        _require_bounded(vector, job.task.clip_norm)
        about |= _price(job.task, job.exposure)
    told = None if isinstance(reply, Refusal) else reply
    if job.task.masked:
        return Leaving(_entry(kind, receiver, content, **about), told)
    if job.offer is None:
        raise ProtocolError("an answer in the clear without round keys to seal it; it stays here")
    envelope = seal(job.task, job.offer, content)
    return Leaving(_entry(kind, receiver, envelope, **about), told, envelope)


def _letter_entry(receiver: str, content: bytes, asked: Letter) -> Entry:
    ticket, letter = asked.ticket, letters.decode(content).letter
    if not isinstance(letter, letters.SignedLetter):
        raise ProtocolError("a letter that no device writes; it stays here")
    about: dict[str, Any] = {
        "run": ticket.run,
        "round": ticket.round,
        "fetched_bytes": asked.num_bytes,
    }
    if not isinstance(letter, letters.Upload):
        return _entry(Kind.SHARES, receiver, content, **about)
    if asked.task is None:
        raise ProtocolError("a masked update of no known task; it stays here")
    about |= _price(asked.task, asked.exposure)
    return _entry(Kind.MASKED, receiver, content, **about)


def _price(task: TrainTask, exposure: float) -> dict[str, float]:
    """How an update of this task is bounded, and what sending it costs, after so much exposure."""
    found = {"clip_norm": task.clip_norm}
    if (noise := task.noise) is not None:
        found |= {
            "noise": noise.noise_multiplier * task.clip_norm,
            "epsilon": noise.cost(exposure),
            "delta": noise.delta,
            "exposure": noise.noise_multiplier**-2,
        }
    return found


def _entry(kind: Kind, receiver: str, content: bytes, **about: Any) -> Entry:
    size, digest = len(content), digest_of(content)
    return Entry(kind=kind, receiver=receiver, num_bytes=size, digest=digest, **about)


def _require_bounded(vector: Vector, clip_norm: float) -> None:
    """What is not finite, or too long, stays here."""
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if not math.isfinite(norm):
        raise Diverged("an update that is not finite; it stays here")
    if norm > clip_norm * ROUNDING:
        raise ProtocolError(f"an update of norm {norm:g}, the limit is {clip_norm:g}; it stays")
