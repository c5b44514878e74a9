"""★ Masked sums on a device: an update waits here, and leaves only as a part of a sum.

`withhold` takes the update out of the answer to a task; `answer` plays the device's part in every
attempt to sum it (`common/masking.py`). One update waits at a time, in memory only: a process that
ends takes it along, and the device is missing from that sum. A question that comes twice has the
same answer; whatever is refused changes nothing.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from proxymoe.client.records import Records
from proxymoe.common.contribution import Contribution, Limits
from proxymoe.common.directory import signer
from proxymoe.common.discrete_gaussian import Steps
from proxymoe.common.errors import ProtocolError
from proxymoe.common.files import digest_of
from proxymoe.common.identity import key_digest, public_key
from proxymoe.common.masking import Device, Step
from proxymoe.common.messages import Trained, TrainReply, TrainTask, Vector, address_of
from proxymoe.common.messages import decode as decode_message
from proxymoe.common.messages import encode as encode_message
from proxymoe.common.opening import Opening, is_opening, parse_opening
from proxymoe.common.secagg import Phase


@dataclass(frozen=True, slots=True)
class _Held:
    """The update that waits, and the task that it answers."""

    task: TrainTask
    vector: Vector


@dataclass(frozen=True, slots=True)
class _Attempt:
    """The newest attempt that this device takes part in."""

    number: int
    device: Device
    question: str
    """Digest of the last question that was answered."""
    reply: bytes


class MaskedUpdates:
    """What waits on one device, and its part in the attempt to sum it.

    Args:
        name: of the device.
        key: its private key, PEM.
        records: what it must never forget.
        limits: what its owner insists on, as it is when an attempt begins.
        bits: random bytes; for keys, shares and rounding.
    """

    def __init__(
        self,
        name: str,
        key: bytes,
        records: Records,
        limits: Callable[[], Limits],
        bits: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._name, self._sign, self._records, self._limits = name, signer(key), records, limits
        self._key = key_digest(public_key(key))
        self._bits = bits
        self._held: _Held | None = None
        self._attempt: _Attempt | None = None
        self.given_away: int | None = None
        """The newest round whose update went into a sum, as far as this device has a say."""

    def withhold(self, task: TrainTask, content: bytes) -> bytes:
        """What is sent in the place of an answer to a masked task; an update in it waits here.

        Raises:
            ProtocolError: not an answer.
        """
        reply, vector = decode_message(content)
        if not isinstance(reply, TrainReply):
            return content
        before = self._held
        if before is None or before.task != task or not np.array_equal(before.vector, vector):
            self._held, self._attempt = _Held(task, vector), None
        told = Trained(**address_of(reply), seconds=reply.seconds, peak_rss_mb=reply.peak_rss_mb)
        return encode_message(told)

    def answer(self, content: bytes) -> bytes:
        """The answer to an opening or a later letter; what it commits to is on record before.

        Raises:
            ProtocolError: nothing waits here, it is not the next question of the attempt, or its
                terms are against the owner's limits or would leave too little noise.
            DataError: the record cannot be written; this device is out of the attempt.
        """
        attempt, question = self._attempt, digest_of(content)
        if attempt is not None and attempt.question == question:
            return attempt.reply
        if is_opening(content):
            number, device = self._opened(parse_opening(content))
            step = device.announce()
        elif attempt is None:
            raise ProtocolError("a letter of an attempt that this device has no part in")
        else:
            number, device = attempt.number, attempt.device
            step = device.answer(content)
        self._commit(step)
        self._attempt = _Attempt(number, device, question, step.reply)
        return step.reply

    def _opened(self, opening: Opening) -> tuple[int, Device]:
        """A part in a new attempt, and its number."""
        terms, held = opening.terms, self._held
        if held is None:
            raise ProtocolError("no update waits here")
        task = held.task
        if (terms.run, terms.round, terms.base) != (task.run, task.round, task.base):
            raise ProtocolError(f"terms for round {terms.round}; what waits is of {task.round}")
        if self._attempt is not None and terms.attempt <= self._attempt.number:
            raise ProtocolError(f"attempt {terms.attempt} after attempt {self._attempt.number}")
        if key_digest(opening.keys.get(self._name, "").encode()) != self._key:
            raise ProtocolError(f"device {self._name!r}: another key than its own in the opening")
        contribution = self._contribution(opening, held)
        device = Device(
            self._name,
            self._sign,
            self._records.pinned(opening.keys),
            terms,
            self._limits(),
            contribution,
            self._records.all(),
            np.random.default_rng(list(self._bits(32))),
            self._bits,
        )
        return terms.attempt, device

    def _contribution(self, opening: Opening, held: _Held) -> Contribution:
        """The update that waits, as it goes into the sum: on a grid if there is to be noise."""
        sizes = dict(zip(opening.blocks, opening.sizes, strict=True))
        weights = np.ones(len(sizes), dtype=np.float32)
        noise = held.task.noise
        if noise is None:
            return Contribution(sizes, held.vector, weights)
        mechanism, terms = noise.mechanism(held.task.clip_norm), opening.terms
        steps, _ = mechanism.clipped(held.vector)

        def share(size: int, holders: int) -> Steps:
            # Drawn when it is known who masks. Who stays is at least the threshold of these.
            if (needed := mechanism.needed(holders)) > (left := terms.threshold.of(holders)):
                raise ProtocolError(
                    f"noise that takes {needed} of {holders} holders, of whom {left} may be left"
                )
            return mechanism.share(size, holders, self._bits)

        return Contribution(sizes, steps.astype(np.float64), weights, share)

    def _commit(self, step: Step) -> None:
        """Makes durable what an answer commits to; an update that is given away is forgotten."""
        if step.record is None:
            return
        try:
            self._records.keep(step.record)
        except BaseException:
            self._held = self._attempt = None  # its state is ahead of what anybody was told
            raise
        if step.record.phase is Phase.RELEASE:
            self._held, self.given_away = None, step.record.round
