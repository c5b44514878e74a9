"""★ What stands between the wire and this device's app: nothing is answered or sent but past it.

Before the app sees a message: the ticket of a job must be the coordinator's, for this very task
and what this device holds, and so must the keys be that an update in the clear is sealed to; the
owner must allow it; the machine must be free. Before an answer leaves: it must be of a kind that
we know, an update within its bounds, sealed or under masks, and on record. A refusal
sends one of a few fixed words; why, only the owner gets to read. No model code is imported here.
"""

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import psutil

from proxymoe.client.envelopes import Envelopes, offered
from proxymoe.client.gates import Need, read_gates, this_machine
from proxymoe.client.home import EnrolmentRecord, Home
from proxymoe.client.outgoing import Asked, Job, Letter, leaving
from proxymoe.client.policy import MB, judge
from proxymoe.client.requests import job_request, task_request
from proxymoe.common.assignment import Assignment
from proxymoe.common.errors import ProtocolError, ProxyMoEError
from proxymoe.common.messages import (
    CONTENT,
    DESCRIBE,
    LETTER,
    RECORD,
    ROUND_KEYS,
    TICKET,
    TRAIN,
    Trained,
    TrainReply,
    TrainTask,
    decode,
)
from proxymoe.common.round_keys import Offer
from proxymoe.common.tickets import Ticket, verify_ticket

log = logging.getLogger(__name__)

UNKNOWN, BAD_TICKET, BAD_KEYS = "message", "ticket", "round keys"
BAD_POLICY, CLOSED, FAILED = "policy", "gate: ", "device"
"""All the words that leave: of no known kind; no valid ticket; an update in the clear, and no valid
keys to seal it to; the owner does not allow it; a gate is closed, and its name; something is wrong
on the device."""
MAX_LOG_BYTES = 1 << 20
"""Of refusals, after which the older ones give way."""
LOAD_SECONDS = 60.0
"""What the load average is an average over."""


class _Refused(Exception):
    """A message that is not answered: the word that leaves, and what the owner reads."""

    def __init__(self, word: str, reason: str) -> None:
        super().__init__(reason)
        self.word = word


class Guard:
    """Checks each message before it is answered, then puts its answer on record; one by one.

    Args:
        home: of the device; its files are read anew for every message.
        threads: that a training job keeps busy; its own load is not held against the next one.
        clock: unix seconds.
        stopwatch: seconds that never run backwards.
    """

    def __init__(
        self,
        home: Home,
        threads: int = 1,
        clock: Callable[[], float] = time.time,
        stopwatch: Callable[[], float] = time.monotonic,
    ) -> None:
        self._home = home
        self._threads = threads
        self._clock, self._stopwatch = clock, stopwatch
        self._asked: Asked = None
        self._envelopes = Envelopes(home.key.read_bytes)
        self._waiting: TrainTask | None = None
        """The masked task whose update waits here."""
        self._load, self._load_at = 0.0, stopwatch()

    def check(self, message: Any) -> str | None:
        """Why a Flower message must not be answered, in a word; None if it may be.

        The reason goes to the home's `refusals`, one JSON line with `time`, `word` and `reason`.
        """
        self._asked = None
        try:
            self._asked = self._let_in(message)
        except _Refused as refused:
            return self._note(refused.word, str(refused))
        except (ProxyMoEError, OSError) as error:
            return self._note(FAILED, str(error))
        return None

    @contextlib.contextmanager
    def sending(self, message: Any, answer: Any) -> Iterator[bytes | None]:  # noqa: ARG002  `Runner`
        """Surrounds the sending of an answer, an error included: on record before, confirmed after.

        It yields the envelope that is sent in the place of the answer; None sends that as it is.

        Raises:
            ProtocolError, Diverged, DataError: nothing that may leave; or the ledger, or the time
                used, cannot be written. Then nothing is sent.
        """
        asked, self._asked = self._asked, None
        with self._noted():
            receiver = self._home.enrolled().coordinator
            found = leaving(answer, asked, receiver, self._envelopes.sealed)
            if isinstance(asked, Job):
                self._count(asked, found.reply)
                self._waiting = asked.task if isinstance(found.reply, Trained) else self._waiting
        with self._home.ledger().sending(found.entry):
            yield found.envelope

    def _let_in(self, message: Any) -> Asked:
        """What a message that may be answered wants; None if it is but a description."""
        now, kind = self._clock(), message.metadata.message_type
        record, assignment = self._home.enrolled(), self._home.assignment()
        if assignment is None:
            raise _Refused(FAILED, "no plan is assigned to this device; join again")
        if kind not in (DESCRIBE, TRAIN, LETTER):
            raise _Refused(UNKNOWN, f"a message of type {kind[:80]!r}")
        asked: Asked = None
        used = self._home.usage(now)
        request = job_request(assignment, record.public_key, self._home.peak(), used)
        if kind != DESCRIBE:
            content, ticket = self._ticketed(message, assignment, record.public_key, now)
            request = replace(request, cohort_size=ticket.cohort_size, network_bytes=len(content))
            if kind == TRAIN:
                task = self._task_in(content, ticket)
                offer = None if task.masked else self._offered(message, task, record, now)
                asked = Job(task, len(content), self._stopwatch(), used.exposure, offer)
                request = task_request(request, task, offer, used)
            else:
                asked = Letter(ticket, len(content), self._waiting, used.exposure)
                # The work is done; whether the update may go into a sum, its terms will tell.
                request = replace(request, steps=0, memory_bytes=0)
        policy = self._home.policy()
        if objections := judge(policy, request, used):
            raise _Refused(BAD_POLICY, "; ".join(map(str, objections)))
        # What a warm job process has, it does not take again.
        needed = max(0, request.memory_bytes - _memory_of_children())
        need = Need(memory_bytes=needed, own_load=self._own_load() / (psutil.cpu_count() or 1))
        for gate in read_gates(policy, this_machine(self._home.path), need):
            if not gate.open:
                raise _Refused(CLOSED + gate.name, str(gate))
        return asked

    def _ticketed(
        self, message: Any, assignment: Assignment, coordinator: str, now: float
    ) -> tuple[bytes, Ticket]:
        """What the coordinator wants answered, and its ticket for that."""
        record = message.content.get(RECORD) or {}
        content, signed = record.get(CONTENT), record.get(TICKET)
        if not isinstance(content, bytes) or not isinstance(signed, bytes):
            raise _Refused(BAD_TICKET, "a task without a job ticket, or a ticket without a task")
        try:
            ticket = verify_ticket(
                signed,
                coordinator,
                now,
                device=assignment.device,
                base=assignment.base,
                plan=assignment.plan,
                layout=assignment.layout,
                task=content,
            )
        except ProtocolError as error:
            raise _Refused(BAD_TICKET, str(error)) from error
        return content, ticket

    def _task_in(self, content: bytes, ticket: Ticket) -> TrainTask:
        """The task that the coordinator wants done."""
        try:
            task, _ = decode(content)
        except ProtocolError as error:
            raise _Refused(BAD_TICKET, str(error)) from error
        if not isinstance(task, TrainTask) or (task.run, task.round) != (ticket.run, ticket.round):
            raise _Refused(BAD_TICKET, "a ticket for the task of another round")
        return task

    def _offered(self, message: Any, task: TrainTask, record: EnrolmentRecord, now: float) -> Offer:
        """The keys to which the answer to a task in the clear is sealed."""
        try:
            return offered(message.content[RECORD].get(ROUND_KEYS), record.public_key, now, task)
        except ProtocolError as error:
            raise _Refused(BAD_KEYS, str(error)) from error

    def _count(self, job: Job, reply: Trained | TrainReply | None) -> None:
        """Counts the time that a job took, and its memory, whatever became of it."""
        seconds = reply.seconds if reply else self._stopwatch() - job.began
        self._load = self._own_load() + self._threads * -math.expm1(-seconds / LOAD_SECONDS)
        self._load_at = self._stopwatch()
        self._home.add_seconds(seconds, self._clock())
        if reply:
            self._home.note_peak(int(reply.peak_rss_mb * MB))

    def _own_load(self) -> float:
        """What jobs add to the load average still: it forgets them as slowly as it saw them."""
        return self._load * math.exp((self._load_at - self._stopwatch()) / LOAD_SECONDS)

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except ProxyMoEError as error:
            self._note(FAILED, f"an answer is not sent: {error}")
            raise

    def _note(self, word: str, reason: str) -> str:
        """Tells the owner why; a log that cannot be written changes nothing else."""
        path, when = self._home.refusals, datetime.fromtimestamp(self._clock(), UTC)
        line = json.dumps({"time": f"{when:%Y-%m-%dT%H:%M:%SZ}", "word": word, "reason": reason})
        log.info("refused, %s: %s", word, reason)
        try:
            if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
                path.replace(path.with_suffix(".old.jsonl"))
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            log.warning("%s: %s", path, error.strerror)
        return word


def _memory_of_children() -> int:
    """Resident bytes of the processes that this one has started."""
    total = 0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            total += child.memory_info().rss
    return total
