"""Devices that seal what they answer, and the coordinator's part that opens it; real keys."""

import time
from collections.abc import Callable, Mapping
from functools import partial

from proxymoe.client.envelopes import Envelopes as Sealing
from proxymoe.client.envelopes import offered
from proxymoe.common.identity import new_device_key, new_signing_key, public_key, verifying_key
from proxymoe.common.messages import TrainTask, decode
from proxymoe.server.envelopes import Envelopes
from proxymoe.server.round import Federation
from proxymoe.server.store import Round, RoundStore
from proxymoe.simulations.faults.cohort import InMemory, Reaction

SECONDS = 600.0
"""How long round keys last here."""


class SealingDevices(InMemory):
    """A transport to devices that answer honestly, unless told otherwise, and seal it.

    Args:
        federation, store: whose rounds these are.
        answers: see `InMemory`.
        clock: unix seconds, of both sides.
        signing_key: the coordinator's, PEM; None makes a new one.
    """

    def __init__(
        self,
        federation: Federation,
        store: RoundStore,
        answers: Mapping[str, Reaction | None] | None = None,
        clock: Callable[[], float] = time.time,
        signing_key: bytes | None = None,
    ) -> None:
        super().__init__("".join(federation.members), answers)
        signing_key = signing_key or new_signing_key()
        self.private = {name: new_device_key() for name in federation.members}
        self.public = {name: public_key(key).decode() for name, key in self.private.items()}
        self.envelopes = Envelopes(
            federation, store, signing_key, SECONDS, lambda: self.public, clock
        )
        self._coordinator, self._clock = verifying_key(signing_key), clock
        self._sealing = {
            name: Sealing(partial(self.private.__getitem__, name)) for name in self.private
        }

    def sent(self, task: bytes, content: bytes) -> bytes:
        """An answer to a task, in the envelope of the device that the task is for."""
        header, _ = decode(task)
        assert isinstance(header, TrainTask)
        signed = self.envelopes.offer()
        offer = offered(signed, self._coordinator, self._clock(), header)
        return self._sealing[header.device].sealed(header, offer, content)

    def opened(self, number: int, name: str, content: bytes) -> bytes:
        """See `InMemory`."""
        return self.envelopes.opened(number, name, content)

    def passed(self, now: Round) -> None:
        """See `InMemory`."""
        self.envelopes.passed(now)
