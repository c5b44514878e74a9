"""★ One masked sum, top to bottom: terms, five answers of every device, and nothing but their sum.

A `Summation` whose updates never come: each waits on its device, and what is added here is only who
has one. An attempt asks one question after another, and goes on with those who answered in time.
If too few are left, there is another attempt, unless devices have consented to this one already: an
update goes into one sum or none. Who answers when, and what it may not say, is `common/secagg.py`.
"""

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from proxymoe.common.adapter import AdapterLayout
from proxymoe.common.directory import PinnedKeys
from proxymoe.common.errors import ConfigError, ProtocolError, Unsummed
from proxymoe.common.opening import Opening, opening_bytes
from proxymoe.common.secagg import Phase, Terms
from proxymoe.common.unmasking import Coordinator
from proxymoe.server.aggregate import BlockSum
from proxymoe.server.private_sum import noise_notice, released
from proxymoe.server.round import Answer, Federation
from proxymoe.server.secure_sum import NOTICE, SecureSum, terms_for

log = logging.getLogger(__name__)

Exchange = Callable[[Mapping[str, bytes]], Iterator[Answer]]
"""Carries letters to devices and yields their answers: `GridTransport.exchange_letters`."""


@dataclass(frozen=True, slots=True)
class MaskRules:
    """Who must be left in a masked sum, and how long anybody is waited for."""

    smallest_cohort: int
    smallest_class: int
    letter_seconds: float = 120.0
    """Longest wait for the answers to one letter."""
    asking_seconds: float = 15.0
    """Pause before those whose answers were lost are asked again."""
    attempts: int = 3


class MaskedRound:
    """The summation of one round.

    Args:
        federation: whose devices they are.
        number: of the round.
        rules: see `MaskRules`.
        exchange: see `Exchange`.
        keys: {device: PEM public key}.
        begin: makes it durable that these devices are about to be asked, and numbers the attempt.
        spend: told of an attempt and of those in its sum, before anybody can read it; may refuse.
        clock, pause: seconds that pass; `pause` may raise, which ends the waiting.
    """

    def __init__(
        self,
        federation: Federation,
        number: int,
        rules: MaskRules,
        exchange: Exchange,
        keys: Mapping[str, str],
        begin: Callable[[list[str]], int],
        spend: Callable[[int, list[str]], None] = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        noise, clip_norm = federation.noise, federation.settings.clip_norm
        self._mechanism = noise.mechanism(clip_norm) if noise else None
        self.notice = NOTICE.format(least=rules.smallest_class)
        if self._mechanism:
            self.notice += f"; {noise_notice(self._mechanism)}"
        self._federation, self._number, self._rules = federation, number, rules
        self._exchange, self._keys = exchange, keys
        self._begin, self._spend = begin, spend
        self._clock, self._pause = clock, pause
        self._layouts: dict[str, AdapterLayout] = {}

    def add(self, device: str, layout: AdapterLayout, update: Tensor, weight: float) -> None:
        """Notes that an update waits on this device; `update` is empty, and all weigh the same.

        Raises:
            ConfigError: it is not empty, or another weight: the coordinator must not have it.
            ProtocolError: the device has been added before.
        """
        if update.numel() or weight != 1.0:
            raise ConfigError(f"device {device!r}: an update, or a weight, in a masked sum")
        if device in self._layouts:
            raise ProtocolError(f"second update of device {device!r} in one round")
        self._layouts[device] = layout

    def sum(self) -> BlockSum:
        """The sum over the devices that were left in the end.

        Raises:
            Unsummed: too few of them were, in every attempt; says how the last one ended.
            PrivacySpent: a device would spend more than it was promised; nothing was unmasked.
        """
        reason = "nobody was asked"
        for attempt in range(self._rules.attempts):
            if attempt:
                self._pause(self._rules.asking_seconds)
            try:
                terms = self._terms()
            except ConfigError as error:
                raise Unsummed(str(error)) from error
            keys = {name: self._keys[name].encode() for name in terms.devices}
            secure = SecureSum(
                self._federation.layout, terms, PinnedKeys(keys), os.cpu_count() or 1
            )
            try:
                self._ask_through(secure.coordinator, terms, self._openings(terms))
                return self._released(secure.sum())
            except ProtocolError as error:
                reason = f"masked sum, attempt {terms.attempt}: {error}"
                log.warning("round %d: %s", self._number, reason)
                if secure.coordinator.phase in (Phase.CONSENT, Phase.RELEASE, Phase.OVER):
                    break
        raise Unsummed(reason)

    def _terms(self) -> Terms:
        """Of a new attempt with all devices that have a key; ConfigError if they are too few."""
        federation, rules = self._federation, self._rules
        layouts = {name: found for name, found in self._layouts.items() if name in self._keys}
        return terms_for(
            federation.layout,
            layouts,
            run=federation.run,
            round=self._number,
            attempt=self._begin(sorted(layouts)),
            base=federation.base,
            clip_norm=None if self._mechanism else federation.settings.clip_norm,
            smallest_cohort=rules.smallest_cohort,
            smallest_class=rules.smallest_class,
        )

    def _openings(self, terms: Terms) -> dict[str, bytes]:
        keys = {name: self._keys[name] for name in terms.devices}
        found = {}
        for name in terms.devices:
            places = self._layouts[name].positions_in(self._federation.layout)
            blocks, sizes = zip(*((b, stop - start) for b, start, stop in places), strict=True)
            found[name] = opening_bytes(Opening(terms=terms, keys=keys, blocks=blocks, sizes=sizes))
        return found

    def _ask_through(
        self, coordinator: Coordinator, terms: Terms, questions: Mapping[str, bytes]
    ) -> None:
        """Asks everything that there is to ask; ProtocolError if too few answer."""
        while (phase := coordinator.phase) is not Phase.OVER:
            self._gather(coordinator, questions)
            count = len(questions) - len(coordinator.awaited)
            log.info("round %d: %s: %d of %d devices", self._number, phase, count, len(questions))
            if phase is Phase.RELEASE:
                self._spend(terms.attempt, coordinator.survivors)
            questions = coordinator.close()

    def _gather(self, coordinator: Coordinator, questions: Mapping[str, bytes]) -> None:
        """Collects answers until all are there, time is up, or asking again would be in vain.

        That is so when it brought none, and either enough are there, or nothing is lost yet by
        another attempt.
        """
        deadline = self._clock() + self._rules.letter_seconds
        while awaited := coordinator.awaited:
            for answer in self._exchange({name: questions[name] for name in sorted(awaited)}):
                if answer is not None:
                    self._receive(coordinator, *answer)
                if not coordinator.awaited or self._clock() >= deadline:
                    return
            left = deadline - self._clock()
            in_vain = coordinator.is_enough or coordinator.phase is Phase.ANNOUNCE
            if left <= 0 or (coordinator.awaited == awaited and in_vain):
                return
            if coordinator.awaited:
                self._pause(min(left, self._rules.asking_seconds))

    def _released(self, found: BlockSum) -> BlockSum:
        """The sum as it may be shown; those who are left have made its noise whole among them."""
        if self._mechanism is None:
            return found
        layout, holders = self._federation.layout, found.weight.round().numpy()
        count, bits = found.num_devices, secrets.token_bytes
        return released(layout, self._mechanism, found, holders, count, bits)

    def _receive(self, coordinator: Coordinator, name: str, content: bytes) -> None:
        try:
            coordinator.receive(content)
        except ProtocolError as error:
            log.warning("round %d: letter of %s refused: %s", self._number, name, error)
