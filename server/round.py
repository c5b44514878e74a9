"""★ One federated round, top to bottom.

Ask the cohort, check every reply, add what passes, take per-block means, let the strategy make a
candidate, and commit it only if the full model still reads public text as before. The round takes
values and returns a value; who carries the bytes is the transport's business.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from proxymoe.common.adapter import AdapterLayout
from proxymoe.common.config import FederationSettings, TrainSettings
from proxymoe.common.errors import ProtocolError
from proxymoe.common.messages import Refusal, TrainReply, TrainTask, Vector, decode, encode
from proxymoe.common.plan import Plan
from proxymoe.server import strategy
from proxymoe.server.aggregate import Summation
from proxymoe.server.strategy import StrategyState

NORM_SLACK = 1.001
"""An update may exceed the clip norm by this factor, for rounding; more is refused."""


class Transport(Protocol):
    """Carries bytes to devices and back: in process, over Flower, or with faults in tests."""

    def devices(self) -> list[str]:
        """Names of the devices that can be asked now."""

    def exchange(self, tasks: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        """Sends each device its task and yields replies as they come; some may never come."""


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
    cohort = sample_cohort(known, federation.settings.cohort_size, federation.seed, number)
    tasks = {name: _task(federation, state, name, number) for name in cohort}

    replies: dict[str, TrainReply] = {}
    refused: dict[str, str] = {}
    uplink = 0
    for name, content in transport.exchange(tasks):
        uplink += len(content)
        try:
            if name not in tasks:
                raise ProtocolError("the device was not asked in this round")
            reply, vector = _checked(federation, name, number, content)
            layout = federation.members[name].layout
            summation.add(name, layout, torch.from_numpy(vector), weight=1.0)
        except ProtocolError as error:
            refused[name] = str(error)
            continue
        replies[name] = reply
    if not replies:
        raise ProtocolError(f"round {number}: no usable update of {len(cohort)} devices: {refused}")

    total = summation.sum()
    mean = total.mean(federation.layout)
    strategy_state, candidate = strategy.apply(
        state.strategy,
        state.adapter,
        mean,
        federation.settings,
        rate=server_rate(federation.settings, number),
    )
    state, committed, canary_loss = _judged(federation, state, candidate, strategy_state)
    report = RoundReport(
        round=number,
        committed=committed,
        canary_loss=canary_loss,
        refused=refused,
        skipped_blocks=int((total.weight == 0).sum()),
        uplink_bytes=uplink,
        downlink_bytes=sum(map(len, tasks.values())),
        **_summary(replies, federation.settings.clip_norm),
    )
    return state, report


def _judged(
    federation: Federation, state: FederationState, candidate: Tensor, memory: StrategyState
) -> tuple[FederationState, bool, float | None]:
    """The state after the candidate's round, whether it was committed, and its canary loss.

    A canary that fails undoes every round since the last one that passed.
    """
    number, every = state.round + 1, federation.settings.canary_every
    last = state.proven or state
    if number % every and number != federation.settings.rounds:
        return FederationState(number, candidate, memory, last), True, None
    loss = federation.canary(candidate)
    if math.isfinite(loss) and loss <= federation.canary_limit:
        return FederationState(number, candidate, memory), True, loss
    return FederationState(number, last.adapter, last.strategy), False, loss


def sample_cohort(names: list[str], size: int | None, seed: int, number: int) -> list[str]:
    """The devices of a round: as many as asked for, every device equally often over the rounds.

    Rounds deal from one shuffled deck after another, and each deck holds every device once. Who
    has a card in a round that two decks share comes last in the second, so no round has twins.
    """
    if size is None or size >= len(names):
        return sorted(names)
    dealt: list[str] = []
    for deck in itertools.count():
        order = np.random.default_rng([seed, deck]).permutation(sorted(names)).tolist()
        unfinished = dealt[len(dealt) - len(dealt) % size :]
        dealt += sorted(order, key=unfinished.__contains__)
        if len(dealt) >= number * size:
            break
    return sorted(dealt[(number - 1) * size : number * size])


def task_seed(seed: int, number: int, device: str) -> int:
    """The seed of one device's randomness in one round; independent of the cohort."""
    words = [seed, number, *device.encode()]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint32)[0])


def _task(federation: Federation, state: FederationState, name: str, number: int) -> bytes:
    member, settings = federation.members[name], federation.settings
    rate = _decay(settings, settings.final_rate, number)
    train = federation.train.model_copy(
        update={"learning_rate": federation.train.learning_rate * rate}
    )
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
    )
    return encode(task, member.layout.take_from(federation.layout, state.adapter).numpy())


def server_rate(settings: FederationSettings, number: int) -> float:
    """Share of the server's learning rate in a round: linear warm-up times linear decay."""
    warm = min(1.0, number / (settings.server_warmup_rounds + 1))
    return warm * _decay(settings, settings.server_final_rate, number)


def _decay(settings: FederationSettings, final: float, number: int) -> float:
    progress = (number - 1) / max(1, settings.rounds - 1)
    return 1.0 - (1.0 - final) * min(1.0, progress)


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


def _checked(
    federation: Federation, name: str, number: int, content: bytes
) -> tuple[TrainReply, Vector]:
    """The reply and its update, or ProtocolError with the reason why it cannot be used."""
    member = federation.members[name]
    reply, vector = decode(content, max_vector_bytes=4 * member.layout.size)
    expected = (federation.run, number, name, federation.base, member.plan.digest)
    found = (reply.run, reply.round, reply.device, reply.base, reply.plan)
    if found != expected or reply.layout != member.layout.digest:
        raise ProtocolError(f"reply for another run, round, base model or plan: {found[:3]}")
    if isinstance(reply, Refusal):
        raise ProtocolError(f"the device refused: {reply.reason}")
    if not isinstance(reply, TrainReply):
        raise ProtocolError(f"a {reply.kind!r} message is no reply")
    if vector.size != member.layout.size:
        raise ProtocolError(f"update of {vector.size} numbers, expected {member.layout.size}")
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if not np.isfinite(norm) or norm > NORM_SLACK * federation.settings.clip_norm:
        raise ProtocolError(
            f"update of norm {norm:.4g}, the limit is {federation.settings.clip_norm}"
        )
    return reply, vector
