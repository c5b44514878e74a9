"""The round engine: a persisted state machine around the pure steps of `round`.

planned → selecting → distributing → training → collecting → aggregated → evaluated →
committed | abandoned | rolled back. Each step does what the phase asks for and makes the next one
durable; killed anywhere, the next process finds the phase and goes on. Replies are kept on disk as
they come and added one at a time, so memory does not grow with devices, and no update can count
twice.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from proxymoe.common.errors import ConfigError, Equivocation, PrivacySpent, ProtocolError, Unsummed
from proxymoe.common.files import digest_of
from proxymoe.common.messages import decode
from proxymoe.server.aggregate import Summation
from proxymoe.server.round import (
    Federation,
    FederationState,
    Transport,
    accept,
    candidate_of,
    judged,
    require_trained,
    tasks_of,
)
from proxymoe.server.secure_sum import summable_classes
from proxymoe.server.store import Phase, Round, RoundStore

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rules:
    """When a round starts, when it stops waiting, and when it counts."""

    selecting_seconds: float = 60.0
    """Pause between two looks for devices while there are too few."""
    over_selection: float = 1.0
    """The cohort is this many times as large as asked for; some will not answer."""
    quorum: float = 0.8
    """Share of the cohort size that must arrive for the round to count."""
    deadline_seconds: float = 3600.0
    """Longest wait for replies; it begins again when the coordinator does."""
    patience: float = 1.0
    """After the quorum, stragglers get this share of the time that the quorum took."""
    asking_seconds: float = 15.0
    """Pause before those whose answers were lost on the way are asked again."""
    min_devices: int = 1
    """Fewest updates that are ever summed, whatever the quorum."""
    smallest_class: int = 1
    """Fewest of a cohort that must hold a block if it is to be summed under masks."""

    def needed(self, size: int) -> int:
        """Updates that a round with a cohort of this size must have to count."""
        return max(1, self.min_devices, math.ceil(self.quorum * size))


class Receipt(StrEnum):
    """What became of a reply."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    """The same update again: acknowledged, counted once."""
    CONFLICT = "conflict"
    """Another update than the one that was accepted: refused, and on record."""
    LATE = "late"
    """For a round that is over: acknowledged, not applied."""
    REFUSED = "refused"


class RoundEngine:
    """Runs the rounds of a federation that are left.

    Args:
        federation: what stays the same over the rounds; its canary reads every candidate.
        store: what has happened so far.
        transport: carries bytes to devices and back.
        summation_of: a fresh sum for a round, by its number.
        rules: see `Rules`.
        clock: seconds on a clock that nobody sets.
        pause: waits for that many seconds; it may raise, which ends the run where it stands.
        passed: told of every phase that has become durable.
        opened: what a device says in a reply to a round; it may be in an envelope.
    """

    def __init__(
        self,
        federation: Federation,
        store: RoundStore,
        transport: Transport,
        summation_of: Callable[[int], Summation],
        rules: Rules,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
        passed: Callable[[Round], None] = lambda _: None,
        opened: Callable[[int, str, bytes], bytes] = lambda *reply: reply[-1],
    ) -> None:
        if federation.settings.canary_every != 1:
            raise ConfigError(
                f"canary_every is {federation.settings.canary_every}; a coordinator commits every "
                "round, so every candidate is checked: set it to 1"
            )
        self._federation, self._store, self._transport = federation, store, transport
        self._summation_of, self._rules = summation_of, rules
        self._clock, self._pause, self._passed = clock, pause, passed
        self._opened = opened

    def run(self) -> FederationState:
        """Runs to the last round and returns the state after it."""
        rounds = self._federation.settings.rounds
        while (now := self._store.latest()) is None or not (
            now.phase.over and now.number >= rounds
        ):
            self.step(now)
        self._store.forget(now.number)
        return self._store.state(rounds + 1, self._store.current())

    def step(self, now: Round | None) -> None:
        """Does what the newest round asks for."""
        if now is None or now.phase.over:
            number = 1 if now is None else now.number + 1
            if now is not None:
                self._store.forget(now.number)
            self._store.begin(number, time.time())
            self._announce()
            return
        match now.phase:
            case Phase.PLANNED:
                self._enter(now, Phase.SELECTING)
            case Phase.SELECTING:
                self._select(now)
            case Phase.DISTRIBUTING | Phase.TRAINING | Phase.COLLECTING:
                self._collect(now)
            case Phase.AGGREGATED:
                self._evaluate(now)
            case Phase.EVALUATED:
                self._conclude(now)

    def receive(self, now: Round, name: str, content: bytes) -> Receipt:
        """Judges a reply that came while a round was on, and makes an accepted one durable."""
        try:
            content = self._opened(now.number, name, content)
            header, vector = decode(content)
            digest = digest_of(vector.tobytes())
            kept = self._store.updates(header.round).get(name)
            if kept == digest:
                return Receipt.DUPLICATE
            if kept is not None:
                reason = "another update than the one that was accepted"
                return self._refuse(now, name, Receipt.CONFLICT, reason)
            if header.round < now.number and header.run == self._federation.run:
                return Receipt.LATE
            if name not in now.cohort:
                raise ProtocolError("the device was not asked in this round")
            if self._federation.masked:
                require_trained(self._federation, now.number, name, content)
            else:
                accept(self._federation, now.number, name, content)
        except Equivocation as error:
            return self._refuse(now, name, Receipt.CONFLICT, str(error))
        except ProtocolError as error:
            return self._refuse(now, name, Receipt.REFUSED, str(error))
        self._store.keep_update(now.number, name, content, digest, time.time())
        return Receipt.ACCEPTED

    def _refuse(self, now: Round, name: str, receipt: Receipt, reason: str) -> Receipt:
        log.warning("round %d: reply of %s: %s, %s", now.number, name, receipt, reason)
        body = {"round": now.number, "device": name, "reason": reason}
        with self._store.change(time.time(), receipt, **body):
            pass  # The entry is all there is to change.
        return receipt

    def _select(self, now: Round) -> None:
        settings, known = self._federation.settings, self._known()
        size = settings.cohort_size or len(self._federation.members)
        needed = self._rules.needed(size)
        if len(known) < needed:
            log.info("round %d: %d devices, %d needed", now.number, len(known), needed)
            self._pause(self._rules.selecting_seconds)
            return
        asked = math.ceil(size * self._rules.over_selection)
        cohort = self._federation.draw(known, asked, self._federation.seed, now.number)
        try:
            self._require_summable(cohort)
        except ConfigError as error:
            self._enter(now, Phase.ABANDONED, cohort=cohort, reason=f"nobody trained: {error}")
            # Rounds must not all be gone before somebody can help.
            self._pause(self._rules.selecting_seconds)
            return
        self._enter(now, Phase.DISTRIBUTING, cohort=cohort)

    def _require_summable(self, cohort: list[str]) -> None:
        """Raises ConfigError if the masked sum of this cohort could have no block, come who may."""
        if self._federation.masked:
            full, members, rules = self._federation.layout, self._federation.members, self._rules
            layouts = {name: members[name].layout for name in cohort}
            summable_classes(full, layouts, rules.min_devices, rules.smallest_class)

    def _known(self) -> list[str]:
        return [name for name in self._transport.devices() if name in self._federation.members]

    def _collect(self, now: Round) -> None:
        """Asks those who have not answered yet, until the round has what it needs or time is up.

        Whose answer is lost on the way, or was on its way to a coordinator that is no more, is
        asked again: the same task has the same answer.
        """
        state = self._store.state(now.number, now.version)
        size = min(self._federation.settings.cohort_size or len(now.cohort), len(now.cohort))
        waits = _Waiting(self._rules, self._rules.needed(size), self._clock())
        arrived = self._store.updates(now.number).keys()
        outstanding = set(now.cohort) - arrived
        if now.phase is Phase.DISTRIBUTING:
            now = self._enter(now, Phase.TRAINING)
        while outstanding:
            asked = sorted(outstanding.intersection(self._known()))
            tasks = tasks_of(self._federation, state, asked)
            for answer in self._transport.exchange(tasks) if tasks else ():
                if answer is not None:
                    # Of all else, only what arrived counts: a duplicate may be of a round before.
                    if self.receive(now, *answer) is Receipt.REFUSED:
                        outstanding.discard(answer[0])
                    arrived = self._store.updates(now.number).keys()
                    outstanding -= arrived
                if now.phase is Phase.TRAINING and len(arrived) >= waits.needed:
                    now = self._enter(now, Phase.COLLECTING)
                if not outstanding or waits.left(len(arrived), self._clock()) <= 0:
                    break
            left = waits.left(len(arrived), self._clock())
            if not outstanding or left <= 0:
                break
            self._pause(min(left, self._rules.asking_seconds))
        if len(arrived) < waits.needed:
            reason = f"{len(arrived)} updates of {len(now.cohort)} devices, {waits.needed} needed"
            self._enter(now, Phase.ABANDONED, reason=reason)
            return
        self._aggregate(now, state)

    def _aggregate(self, now: Round, state: FederationState) -> None:
        summation = self._summation_of(now.number)
        log.info("round %d: %s", now.number, summation.notice)
        try:
            for name in sorted(self._store.updates(now.number)):
                layout = self._federation.members[name].layout
                summation.add(name, layout, self._update(now.number, name), weight=1.0)
            total = summation.sum()
        except (PrivacySpent, Unsummed) as error:
            self._enter(now, Phase.ABANDONED, reason=str(error))
            return
        candidate = candidate_of(self._federation, state, total)
        self._store.keep_candidate(now.number, candidate)
        self._enter(now, Phase.AGGREGATED, skipped=int((total.weight == 0).sum()))

    def _update(self, number: int, name: str) -> Tensor:
        """What a device sent: its update, or nothing if that waits to be summed under masks."""
        if self._federation.masked:
            return torch.zeros(0)
        content = self._store.update(number, name)
        return torch.from_numpy(accept(self._federation, number, name, content).vector)

    def _evaluate(self, now: Round) -> None:
        loss = self._federation.canary(self._store.candidate(now.number).adapter)
        # JSON and SQLite know no NaN; what is not finite fails the check all the same.
        self._enter(now, Phase.EVALUATED, canary=loss if math.isfinite(loss) else None)

    def _conclude(self, now: Round) -> None:
        if (current := self._store.current()) != now.version:
            reason = f"built on version {now.version}, and version {current} is current since"
            self._enter(now, Phase.ROLLED_BACK, reason=reason)
            return
        candidate = self._store.candidate(now.number)
        state = self._store.state(now.number, now.version)
        loss = math.nan if now.canary is None else now.canary
        _, committed = judged(self._federation, state, candidate, loss)
        if not committed:
            limit = self._federation.canary_limit
            self._enter(now, Phase.ROLLED_BACK, reason=f"canary {loss:.3f}, limit {limit:.3f}")
            return
        self._store.commit(now.number, time.time())
        self._announce()

    def _enter(self, now: Round, phase: Phase, **found: Any) -> Round:
        """The round in its next phase, with what was found out; see `RoundStore.enter`."""
        self._store.enter(now.number, phase, time.time(), **found)
        return self._announce()

    def _announce(self) -> Round:
        now = self._store.latest()
        assert now is not None
        log.info("round %d: %s%s", now.number, now.phase, f", {now.reason}" if now.reason else "")
        self._passed(now)
        return now


class _Waiting:
    """Deadline by progress: a quorum that came quickly does not wait long for the rest."""

    def __init__(self, rules: Rules, needed: int, started: float) -> None:
        self.needed = needed
        self._rules, self._started = rules, started
        self._until = started + rules.deadline_seconds
        self._quorum = False

    def left(self, arrived: int, now: float) -> float:
        """Seconds that anybody is still waited for; none are left at zero."""
        if arrived >= self.needed and not self._quorum:
            self._quorum = True
            self._until = min(self._until, now + self._rules.patience * (now - self._started))
        return self._until - now
