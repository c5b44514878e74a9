"""Envelopes on a device: what it answers in the clear leaves sealed for the round, and signed.

`offered` believes round keys only of the pinned coordinator; without them nothing is trained and
nothing is sent. No model code is imported here.
"""

from collections.abc import Callable

from proxymoe.common.errors import ProtocolError
from proxymoe.common.files import digest_of
from proxymoe.common.messages import TrainTask, decode
from proxymoe.common.round_keys import Offer, best_suite, verify_offer
from proxymoe.common.sealing import seal


def offered(signed: object, coordinator: str, now: float, task: TrainTask) -> Offer:
    """The keys to seal the answer to this task to, as they came with it.

    Args:
        signed: what came; anything.
        coordinator: the public key that was pinned at enrolment.
        now: unix seconds.
        task: what is to be answered.

    Raises:
        ProtocolError: there are none, or none that this device can use and believe.
    """
    if not isinstance(signed, bytes):
        raise ProtocolError(
            "round keys: none came with a task in the clear, so nobody may have its answer; "
            "the coordinator must be updated"
        )
    offer = verify_offer(signed, coordinator, now, run=task.run, number=task.round)
    best_suite(offer)  # or nothing could be sealed, after all the work
    return offer


class Envelopes:
    """Seals what a device answers; the same update twice is in the same envelope.

    A device that sealed it anew would have signed two envelopes for one place, as only liars do.

    Args:
        key: tells the device's private key, PEM.
    """

    def __init__(self, key: Callable[[], bytes]) -> None:
        self._key = key
        self._last: tuple[object, bytes] | None = None
        """What the last envelope is of, and the envelope."""

    def sealed(self, task: TrainTask, offer: Offer, content: bytes) -> bytes:
        """The answer to a task, in an envelope for these round keys.

        Raises:
            ProtocolError: it cannot be sealed.
        """
        reply, vector = decode(content)
        # How long training took may differ, and makes no other update.
        what = offer.digest, task, reply.kind, digest_of(vector.tobytes())
        if self._last is None or self._last[0] != what:
            envelope = seal(
                content,
                offer,
                self._key(),
                device=task.device,
                base=task.base,
                plan=task.plan,
                mode="plain",
            )
            self._last = what, envelope
        return self._last[1]
