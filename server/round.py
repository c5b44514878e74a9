"""★ One federated round, top to bottom.

Ask the cohort, check every reply, add what passes, take per-block means, let the strategy make a
candidate, and commit it only if the full model still reads public text as before. The round takes
values and returns a value; who carries the bytes is the transport's business.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from proxymoe.common.adapter import AdapterLayout
from proxymoe.common.config import FederationSettings, TrainSettings
from proxymoe.common.errors import ProtocolError
from proxymoe.common.messages import (
    Message,
    Refusal,
    Trained,
    TrainReply,
    TrainTask,
    Vector,
    decode,
    encode,
)
from proxymoe.common.plan import Plan
from proxymoe.common.privacy_settings import Noise
from proxymoe.server import strategy
from proxymoe.server.aggregate import BlockSum, Summation
from proxymoe.server.schedule import Draw, decay, sample_cohort, server_rate, task_seed
from proxymoe.server.strategy import StrategyState

NORM_SLACK = 1.001
"""An update may exceed the clip norm by this factor, for rounding; more is refused."""


Answer = tuple[str, bytes] | None
"""A device's name and its reply; None: nothing has come for a moment."""


class Transport(Protocol):
    """Carries bytes to devices and back: in process, over Flower, or with faults in tests."""

    def devices(self) -> list[str]:
        """Names of the devices that can be asked now."""

    def exchange(self, tasks: Mapping[str, bytes]) -> Iterator[Answer]:
        """Sends each device its task and yields answers as they come; some may never come.

        Where it waits, it yields None now and then, so that the caller can look at the clock and
        stop asking.
        """


@dataclass(frozen=True, slots=True)
class Member:
    """What the server knows of a device: its plan and the layout that follows from it."""

    plan: Plan
    layout: AdapterLayout


@dataclass(frozen=True, slots=True)
class FederationState:
    """Everything a round starts from and ends in."""

    round: int
    """Rounds completed, committed or rolled back."""
    adapter: Tensor
    """(P,) fp32, in the full layout."""
    strategy: StrategyState
    proven: "FederationState | None" = None
    """The last state that passed the canary; None if this one did, or is the first."""


@dataclass(frozen=True, slots=True)
class RoundReport:
    """What happened in a round, for people and files."""

    round: int
    committed: bool
    """False if the canary failed, and everything since the last passed check was undone."""
    canary_loss: float | None
    """None in rounds between two checks."""
    num_updates: int
    refused: dict[str, str]
    """{device: reason} of every update that was not used."""
    losses: dict[str, tuple[float, float]]
    """{device: (first, last) local loss}."""
    norms: dict[str, float]
    clipped: int
    skipped_blocks: int
    """Blocks of the adapter that no update covered."""
    uplink_bytes: int
    downlink_bytes: int
    seconds: dict[str, float]
    peak_rss_mb: dict[str, float]


@dataclass(frozen=True, slots=True)
class Federation:
    """What stays the same over the rounds of a run."""

    run: str
    base: str
    seed: int
    layout: AdapterLayout
    members: Mapping[str, Member]
    train: TrainSettings
    settings: FederationSettings
    canary: Callable[[Tensor], float]
    """Loss on public text of the full model with an adapter vector (P,)."""
    canary_limit: float
    masked: bool = False
    """Whether updates wait on their devices until they are summed under masks."""
    noise: Noise | None = None
    """What is added to every sum, and by whom."""
    draw: Draw = sample_cohort


@dataclass(frozen=True, slots=True)
class Accepted:
    """One device's update that passed every check."""

    reply: TrainReply
    vector: Vector
    """(P of the device's layout,) fp32."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What the strategy proposes; nothing is committed yet."""

    adapter: Tensor
    """(P,) fp32, in the full layout."""
    strategy: StrategyState


def run_round(
    federation: Federation,
    state: FederationState,
    transport: Transport,
    summation: Summation,
) -> tuple[FederationState, RoundReport]:
    """The state after one more round, and its report; a bad candidate is rolled back.

    Raises:
        ProtocolError: not a single usable update came back.
    """
    number = state.round + 1
    known = [name for name in transport.devices() if name in federation.members]
    size = federation.settings.cohort_size
    tasks = tasks_of(federation, state, federation.draw(known, size, federation.seed, number))

    accepted: dict[str, Accepted] = {}
    refused: dict[str, str] = {}
    uplink = 0
    for name, content in filter(None, transport.exchange(tasks)):
        uplink += len(content)
        try:
            if name not in tasks:
                raise ProtocolError("the device was not asked in this round")
            if name in accepted:
                raise ProtocolError("the device has answered before")
            accepted[name] = accept(federation, number, name, content)
        except ProtocolError as error:
            refused[name] = str(error)
    if not accepted:
        raise ProtocolError(f"round {number}: no usable update of {len(tasks)} devices: {refused}")

    for name in sorted(accepted):
        layout = federation.members[name].layout
        summation.add(name, layout, torch.from_numpy(accepted[name].vector), weight=1.0)
    total = summation.sum()
    candidate = candidate_of(federation, state, total)
    loss = federation.canary(candidate.adapter) if canary_due(federation, number) else None
    state, committed = judged(federation, state, candidate, loss)
    report = RoundReport(
        round=number,
        committed=committed,
        canary_loss=loss,
        refused=refused,
        skipped_blocks=int((total.weight == 0).sum()),
        uplink_bytes=uplink,
        downlink_bytes=sum(map(len, tasks.values())),
        **_summary({n: a.reply for n, a in accepted.items()}, federation.settings.clip_norm),
    )
    return state, report


def tasks_of(
    federation: Federation, state: FederationState, cohort: Iterable[str]
) -> dict[str, bytes]:
    """{device: task} of the next round; the same bytes however often it is asked."""
    number, settings = state.round + 1, federation.settings
    rate = decay(settings, settings.final_rate, number)
    train = federation.train.model_copy(
        update={"learning_rate": federation.train.learning_rate * rate}
    )
    tasks = {}
    for name in cohort:
        member = federation.members[name]
        task = TrainTask(
            run=federation.run,
            round=number,
            device=name,
            base=federation.base,
            plan=member.plan.digest,
            layout=member.layout.digest,
            train=train,
            clip_norm=settings.clip_norm,
            seed=task_seed(federation.seed, number, name),
            masked=federation.masked,
            noise=federation.noise,
        )
        held = member.layout.take_from(federation.layout, state.adapter)
        tasks[name] = encode(task, held.numpy())
    return tasks


def accept(federation: Federation, number: int, name: str, content: bytes) -> Accepted:
    """The update in a reply to the task of round `number`.

    Raises:
        ProtocolError: it cannot be used; the message is the reason.
    """
    member = federation.members[name]
    reply, vector = _answer(federation, number, name, content)
    if not isinstance(reply, TrainReply):
        raise ProtocolError(f"a {reply.kind!r} message is no reply")
    if vector.size != member.layout.size:
        raise ProtocolError(f"update of {vector.size} numbers, expected {member.layout.size}")
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if not np.isfinite(norm) or norm > NORM_SLACK * federation.settings.clip_norm:
        raise ProtocolError(
            f"update of norm {norm:.4g}, the limit is {federation.settings.clip_norm}"
        )
    return Accepted(reply, vector)


def require_trained(federation: Federation, number: int, name: str, content: bytes) -> None:
    """Returns if a reply to the masked task of round `number` says that an update waits.

    Raises:
        ProtocolError: it says something else; an update in the clear, too, is not even looked at.
    """
    reply, vector = _answer(federation, number, name, content)
    if not isinstance(reply, Trained) or vector.size:
        raise ProtocolError(f"a {reply.kind!r} message in a round that is summed under masks")


def _answer(
    federation: Federation, number: int, name: str, content: bytes
) -> tuple[Message, Vector]:
    """A reply to the task of round `number`, if the device did not refuse it."""
    member = federation.members[name]
    reply, vector = decode(content, max_vector_bytes=4 * member.layout.size)
    expected = (federation.run, number, name, federation.base, member.plan.digest)
    found = (reply.run, reply.round, reply.device, reply.base, reply.plan)
    if found != expected or reply.layout != member.layout.digest:
        raise ProtocolError(f"reply for another run, round, base model or plan: {found[:3]}")
    if isinstance(reply, Refusal):
        raise ProtocolError(f"the device refused: {reply.reason}")
    return reply, vector


def candidate_of(federation: Federation, state: FederationState, total: BlockSum) -> Candidate:
    """The strategy's step from the mean of the summed updates."""
    settings, layout = federation.settings, federation.layout
    rate = server_rate(settings, state.round + 1)
    mean, held = total.mean(layout), total.held(layout)
    memory, adapter = strategy.apply(state.strategy, state.adapter, mean, held, settings, rate)
    return Candidate(adapter, memory)


def canary_due(federation: Federation, number: int) -> bool:
    """Whether the candidate of this round must read public text before it may stay."""
    settings = federation.settings
    return number % settings.canary_every == 0 or number == settings.rounds


def judged(
    federation: Federation, state: FederationState, candidate: Candidate, loss: float | None
) -> tuple[FederationState, bool]:
    """The state after the candidate's round, and whether it was committed.

    Args:
        federation: what stays the same over the rounds.
        state: the state that the candidate was made from.
        candidate: from `candidate_of`.
        loss: its canary loss; None if no check was due. One that fails undoes every round since
            the last that passed.
    """
    number, last = state.round + 1, state.proven or state
    if loss is None:
        return FederationState(number, candidate.adapter, candidate.strategy, last), True
    if math.isfinite(loss) and loss <= federation.canary_limit:
        return FederationState(number, candidate.adapter, candidate.strategy), True
    return FederationState(number, last.adapter, last.strategy), False


def _summary(replies: Mapping[str, TrainReply], limit: float) -> dict[str, Any]:
    """The part of a report that the devices' own words make up, in the order of their names."""
    ordered = sorted(replies.items())
    return {
        "num_updates": len(ordered),
        "losses": {name: (reply.first_loss, reply.last_loss) for name, reply in ordered},
        "norms": {name: reply.norm for name, reply in ordered},
        "clipped": sum(reply.norm > limit for _, reply in ordered),
        "seconds": {name: reply.seconds for name, reply in ordered},
        "peak_rss_mb": {name: reply.peak_rss_mb for name, reply in ordered},
    }
