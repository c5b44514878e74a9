"""The coordinator's side of secure aggregation: collects answers, and unmasks sums. See `secagg`.

Uploads are added as they come, so memory holds one vector per class, however many devices there
are. What a coordinator refuses changes nothing; what it closes too early is refused, too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import cast

import numpy as np

from proxymoe.common.contribution import ClassSum, decoded
from proxymoe.common.directory import Directory
from proxymoe.common.errors import ProtocolError
from proxymoe.common.fixed_point import Words, unpack
from proxymoe.common.letters import (
    Announcement,
    Delivery,
    Introduction,
    Letter,
    Proof,
    Received,
    Release,
    Roster,
    Shares,
    SignedLetter,
    Survivors,
    Upload,
    Vote,
    decode,
    encode,
    header_of,
    statement,
)
from proxymoe.common.masks import (
    TAG_BYTES,
    add_masks,
    agree,
    commitment,
    pair_key,
    public_half,
    self_key,
)
from proxymoe.common.secagg import TURNS, Phase, Terms, continued
from proxymoe.common.shamir import SHARE_BYTES, combine


@dataclass(frozen=True, slots=True)
class Unmasked:
    """The result of an attempt."""

    survivors: tuple[str, ...]
    sums: tuple[ClassSum, ...]
    masked: dict[int, str]
    """{class: why it stays masked}."""


class Coordinator:
    """One attempt, as its coordinator sees it.

    Args:
        terms: what every device is sent first, as `terms.content`.
        directory: of the devices' identity keys.
        threads: for unmasking.
    """

    def __init__(self, terms: Terms, directory: Directory, threads: int = 1) -> None:
        self._terms, self._directory, self._threads = terms, directory, threads
        self._phase, self._transcript = Phase.ANNOUNCE, terms.transcript
        self._asked = frozenset(range(terms.size))
        self._answers: dict[int, Received] = {}
        self._roster: Mapping[int, Introduction] = {}
        self._commitments: dict[tuple[int, int], str] = {}
        self._senders: tuple[int, ...] = ()
        self._survivors: frozenset[int] = frozenset()
        self._live: tuple[int, ...] = ()
        self._totals: dict[int, Words] = {}
        self._shared_at = self._masked_at = ""
        self._result: Unmasked | None = None

    @property
    def phase(self) -> Phase:
        """What devices are being asked for."""
        return self._phase

    @property
    def awaited(self) -> frozenset[str]:
        """Devices that have been asked and have not answered yet."""
        return frozenset(self._terms.devices[i] for i in self._asked - self._answers.keys())

    @property
    def survivors(self) -> list[str]:
        """Those whose updates are in the sums; nobody before the uploads are closed."""
        return [self._terms.devices[i] for i in sorted(self._survivors)]

    @property
    def is_enough(self) -> bool:
        """Whether the phase may be closed with those who have answered."""
        try:
            self._check_enough(sorted(self._answers))
        except ProtocolError:
            return False
        return True

    @property
    def result(self) -> Unmasked:
        """The sums; after the last phase was closed."""
        assert self._result is not None, "the attempt is not over"
        return self._result

    def receive(self, content: bytes) -> str:
        """Takes one device's answer and returns the device's name.

        Raises:
            ProtocolError: not the answer that is asked for, not of a device that is asked, a
                second one, or not signed by that device.
        """
        terms = self._terms
        if self._phase is Phase.OVER:
            raise ProtocolError("this attempt is over")
        received = decode(content)
        letter = received.letter
        if type(letter) is not TURNS[self._phase].answer or not isinstance(letter, SignedLetter):
            raise ProtocolError(f"{type(letter).__name__} in the phase {self._phase.value!r}")
        if letter.transcript != self._transcript or letter.device not in self._asked:
            raise ProtocolError(f"a letter of another attempt, or of device {letter.device}")
        name = terms.devices[letter.device]
        if letter.device in self._answers:
            raise ProtocolError(f"device {name!r}: second answer in one phase")
        self._directory.check(name, statement(letter, received.body), received.signature)
        self._check(letter, len(received.body))
        if self._phase is Phase.UPLOAD:
            self._add(letter.device, received.body)
            received = Received(letter, memoryview(b""), received.signature)
        self._answers[letter.device] = received
        return name

    def close(self) -> dict[str, bytes]:
        """Ends the phase with who has answered; {device: the next question}, empty at the end.

        Raises:
            ProtocolError: too few have answered, or no class is left that could be unmasked. More
                answers may still come; without, the attempt has failed.
        """
        if self._phase is Phase.OVER:
            raise ProtocolError("this attempt is over")
        left = sorted(self._answers)
        self._check_enough(left)
        questions = _CLOSERS[self._phase](self, left)
        self._phase, self._asked, self._answers = TURNS[self._phase].then, frozenset(left), {}
        return {self._terms.devices[i]: content for i, content in questions.items()}

    def _check_enough(self, left: list[int]) -> None:
        terms, roster = self._terms, self._roster or left
        gathers = self._phase in (Phase.ANNOUNCE, Phase.SHARE, Phase.UPLOAD)
        needed = terms.needed(roster) if gathers else terms.threshold.of(len(roster))
        if len(left) < needed:
            raise ProtocolError(
                f"{len(left)} devices answered in the phase {self._phase.value!r}, at least "
                f"{needed} must"
            )
        if gathers and not terms.live(roster, left):
            raise ProtocolError(f"{len(left)} devices are left, and too few of them share blocks")

    def _check(self, letter: SignedLetter, body_bytes: int) -> None:
        """Raises ProtocolError if an answer has not the shape that the terms give it."""
        terms, device, expected = self._terms, letter.device, 0
        match letter:
            case Announcement():
                others = [cast("Announcement", a.letter) for a in self._answers.values()]
                keys = [key for a in (letter, *others) for key in (a.share_key, a.mask_key)]
                if len(set(keys)) != len(keys):
                    raise ProtocolError(f"device {terms.devices[device]!r}: a key that exists")
            case Shares():
                if len(letter.commitments) != len(terms.held(self._live, device)):
                    raise ProtocolError(f"device {terms.devices[device]!r}: other commitments")
                expected = sum(self._sealed_bytes(device, p) for p in self._roster if p != device)
            case Upload():
                numbers = terms.held(self._live, device)
                words = sum(terms.classes[number].num_words for number in numbers)
                expected = words * terms.word_bits // 8
            case Release():
                expected = SHARE_BYTES * len(self._due(device))
        if body_bytes != expected:
            raise ProtocolError(
                f"device {terms.devices[device]!r}: {body_bytes} bytes in the phase "
                f"{self._phase.value!r}, expected {expected}"
            )

    def _add(self, device: int, body: memoryview) -> None:
        start = 0
        for number in self._terms.held(self._live, device):
            total = self._totals[number]
            end = start + total.size * self._terms.word_bits // 8
            total += unpack(body[start:end], self._terms.word_bits)
            start = end

    def _introduce(self, left: list[int]) -> dict[int, bytes]:
        members = []
        for device in left:
            found = cast("Announcement", self._answers[device].letter)
            keys = {"share_key": found.share_key, "mask_key": found.mask_key}
            signature = self._answers[device].signature.hex()
            members.append(Introduction(device=device, signature=signature, **keys))
        letter = Roster(transcript=self._transcript, members=tuple(members))
        self._roster = {member.device: member for member in members}
        self._go_on(letter, left)
        return dict.fromkeys(left, encode(letter))

    def _deliver(self, left: list[int]) -> dict[int, bytes]:
        letter = Delivery(transcript=self._transcript, senders=tuple(left))
        sealed: dict[int, list[memoryview]] = {device: [] for device in left}
        for sender in left:
            start = 0
            for peer in self._roster:
                if peer != sender:
                    end = start + self._sealed_bytes(sender, peer)
                    if peer in sealed:
                        sealed[peer].append(self._answers[sender].body[start:end])
                    start = end
            shares = cast("Shares", self._answers[sender].letter)
            numbers = self._terms.held(self._live, sender)
            for number, found in zip(numbers, shares.commitments, strict=True):
                self._commitments[sender, number] = found
        self._senders, self._shared_at = tuple(left), self._transcript
        self._go_on(letter, left)
        self._masked_at = self._transcript
        self._totals = {
            n: np.zeros(self._terms.classes[n].num_words, dtype=np.uint32) for n in self._live
        }
        return {device: encode(letter, b"".join(parts)) for device, parts in sealed.items()}

    def _name_survivors(self, left: list[int]) -> dict[int, bytes]:
        letter = Survivors(transcript=self._transcript, survivors=tuple(left))
        self._survivors = frozenset(left)
        self._go_on(letter, left)
        return dict.fromkeys(left, encode(letter))

    def _prove(self, left: list[int]) -> dict[int, bytes]:
        votes = [Vote(device=i, signature=self._answers[i].signature.hex()) for i in left]
        letter = Proof(transcript=self._transcript, votes=tuple(votes))
        return dict.fromkeys(left, encode(letter))

    def _unmask(self, left: list[int]) -> dict[int, bytes]:
        shares: dict[tuple[int, int | None], dict[int, bytes]] = {}
        for device in left:
            body = bytes(self._answers[device].body)
            for at, wanted in enumerate(self._due(device)):
                share = body[at * SHARE_BYTES : (at + 1) * SHARE_BYTES]
                shares.setdefault(wanted, {})[device] = share
        key_of = cache(lambda device: self._recovered(device, shares.get((device, None), {})))
        secret_of = cache(lambda device, peer: agree(key_of(device), self._roster[peer].mask_key))
        sums, masked = [], {}
        for number in range(len(self._terms.classes)):
            try:
                if number not in self._live:
                    raise ProtocolError("too few of its holders are left")
                sums.append(self._class_sum(number, shares, secret_of))
            except ProtocolError as error:
                masked[number] = str(error)
        self._totals = {}
        self._result = Unmasked(tuple(self.survivors), tuple(sums), masked)
        return {}

    def _recovered(self, device: int, shares: Mapping[int, bytes]) -> bytes:
        """The mask key of a device that dropped out."""
        private = combine(shares, self._terms.threshold.of(len(self._roster)))
        if public_half(private) != self._roster[device].mask_key:
            raise ProtocolError(f"shares of the key of {self._terms.devices[device]!r} are false")
        return private

    def _class_sum(
        self,
        number: int,
        shares: Mapping[tuple[int, int | None], Mapping[int, bytes]],
        secret_of: Callable[[int, int], bytes],
    ) -> ClassSum:
        """The sum of a live class; ProtocolError if the released shares do not give it."""
        terms, found = self._terms, self._terms.classes[number]
        present = sorted(found.members & self._survivors)
        dropped = sorted(found.members.intersection(self._senders) - self._survivors)
        plus: list[bytes] = []
        minus: list[bytes] = []
        for device in present:
            least = terms.class_threshold(number, self._roster)
            seed = combine(shares.get((device, number), {}), least)
            given = self._commitments[device, number]
            if commitment(seed, self._shared_at, device, number) != given:
                raise ProtocolError(f"shares of the seed of {terms.devices[device]!r} are false")
            minus.append(self_key(seed, self._masked_at, device, number))
        for device, peer in product(dropped, present):
            key = pair_key(secret_of(device, peer), self._masked_at, device, peer, number)
            (minus if peer < device else plus).append(key)
        total = self._totals[number]
        add_masks(total, plus, minus, self._threads)
        return decoded(terms, number, total, len(present))

    def _go_on(self, letter: Letter, left: list[int]) -> None:
        self._transcript = continued(self._transcript, header_of(letter))
        self._live = self._terms.live(self._roster, left)

    def _sealed_bytes(self, one: int, other: int) -> int:
        return self._terms.sealed_bytes(self._live, one, other) + TAG_BYTES

    def _due(self, device: int) -> list[tuple[int, int | None]]:
        return self._terms.due(self._live, self._senders, self._survivors, device)


_CLOSERS: Mapping[Phase, Callable[[Coordinator, list[int]], dict[int, bytes]]] = {
    Phase.ANNOUNCE: Coordinator._introduce,
    Phase.SHARE: Coordinator._deliver,
    Phase.UPLOAD: Coordinator._name_survivors,
    Phase.CONSENT: Coordinator._prove,
    Phase.RELEASE: Coordinator._unmask,
}
"""How each phase ends; nothing is refused any more once a phase is being closed."""
