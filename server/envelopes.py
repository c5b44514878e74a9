"""Envelopes at the coordinator: round keys go out with tasks in the clear, and open the answers.

The private halves are made when the first task of a round goes out, and are never written down.
They end with the collecting of answers, or with this process: the next one numbers a new attempt,
makes new keys, and asks those whose answers are not on disk yet.
"""

import time
from collections.abc import Callable, Mapping

from proxymoe.common.errors import Equivocation, ProtocolError
from proxymoe.common.messages import MAGIC, MAX_HEADER_BYTES
from proxymoe.common.round_keys import RoundKeys
from proxymoe.common.sealing import Freshness, Seen, note, open_envelope
from proxymoe.server.round import Federation
from proxymoe.server.store import Phase, Round, RoundStore

COLLECTING = (Phase.DISTRIBUTING, Phase.TRAINING, Phase.COLLECTING)


class Envelopes:
    """Round keys of the newest attempt, and what was sealed to them so far.

    Args:
        federation: whose devices answer.
        store: of its rounds; numbers the attempts.
        signing_key: the coordinator's, PEM.
        seconds: how long round keys are good for.
        device_keys: {device: PEM public key} of those that are enrolled now.
        clock: unix seconds.
    """

    def __init__(
        self,
        federation: Federation,
        store: RoundStore,
        signing_key: bytes,
        seconds: float,
        device_keys: Callable[[], Mapping[str, str]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._federation, self._store = federation, store
        self._signing_key, self._seconds = signing_key, seconds
        self._device_keys, self._clock = device_keys, clock
        self._keys: RoundKeys | None = None
        self._signed = b""
        self._seen: Seen = {}

    def offer(self) -> bytes:
        """Keys to seal to in the newest round, signed; of a new attempt if there are none yet."""
        now, current = self._clock(), self._store.latest()
        assert current is not None, "keys belong to a round"
        offer = self._keys.offer if self._keys else None
        if offer is None or offer.round != current.number or now >= offer.expires:
            self.forget()
            attempt = self._store.begin_attempt(current.number, current.cohort, now)
            address, expires = (self._federation.run, current.number, attempt), now + self._seconds
            self._keys = RoundKeys.new(*address, now, expires)
            self._signed = self._keys.signed(self._signing_key)
        return self._signed

    def opened(self, number: int, device: str, content: bytes) -> bytes:
        """What a device sealed for this attempt at round `number`; the same again is the same.

        Raises:
            Equivocation: it signed another envelope for the same place before.
            ProtocolError: anything else than its envelope for this attempt, in time and undamaged.
        """
        if self._keys is None or self._keys.offer.round != number:
            raise ProtocolError(f"envelope: round {number} has no keys that would open it")
        member, key = self._federation.members.get(device), self._device_keys().get(device)
        if member is None or key is None:
            raise ProtocolError("envelope: of a device that is not enrolled, or not any more")
        if content.startswith(MAGIC):
            raise ProtocolError("an answer without an envelope; update ProxyMoE on this device")
        opened = open_envelope(
            content,
            self._keys,
            key.encode(),
            self._clock(),
            device=device,
            base=self._federation.base,
            plan=member.plan.digest,
            mode="plain",
            max_content_bytes=2 * MAX_HEADER_BYTES + 4 * member.layout.size,
        )
        before = self._seen.get(opened.header.slot)
        self._seen, freshness = note(self._seen, opened)
        if freshness is Freshness.EQUIVOCATION:
            raise Equivocation(
                f"envelopes {before} and {opened.digest}: the device signed both for one place; "
                "the first counts"
            )
        return opened.content

    def passed(self, now: Round) -> None:
        """Told of every phase of a round; its keys are gone as soon as nothing is collected."""
        if now.phase not in COLLECTING:
            self.forget()

    def forget(self) -> None:
        """Drops the private halves, for good."""
        if self._keys is not None:
            self._keys.forget()
        self._keys, self._signed, self._seen = None, b"", {}
