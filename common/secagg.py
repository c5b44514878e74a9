"""★ Secure aggregation: the coordinator learns sums over devices, and no device's update.

EXPERIMENTAL until reviewed from outside. It is our composition of known parts; the parts are sound,
but whether we put them together rightly has been checked by nobody but us and our tests.

Theory. Two devices u < v that agree on a key add the same keystream to their vectors, u with a plus
and v with a minus. It hides both vectors and vanishes from their sum. When everybody does so with
everybody, only the sum over all is readable (Bonawitz et al. 2017, "Practical Secure Aggregation
for Privacy-Preserving Machine Learning"). If v drops out, its halves stay behind: so each
device leaves Shamir shares of its *mask key* with its peers, of which t give it back. A coordinator
could then call a slow device dropped, get its key, and read its late upload: so each device adds
one more mask from a *seed* that only it knows, shared in the same way. For one device there may be
unmasked either the key (it dropped) or the seed (it survived), never both: a peer gives its share
of one of them, after it has seen that enough devices signed one and the same set of survivors.

Devices hold different experts. Blocks with the same set of holders form a **mask class**, with its
own masks, seeds and threshold; attention, held by all, is one of them. Each block is in exactly
one class, so no two sums over different devices of one attempt overlap. A class with fewer than
`smallest_class` survivors, or with too few for its threshold, stays masked while others proceed.
A seed's threshold is one of its class, a key's one of the roster: a coordinator that told the few
holders of a class "it survived", and all others "it dropped", would get both. That is why nobody
releases anything before t devices have signed the same survivors.

Rules of these files (`secagg` the terms, `masking` the device, `unmasking` the coordinator):
 1. No I/O, no clock. Letters are bytes in, bytes out; entropy is an argument.
 2. `TURNS` is the protocol. What it does not allow is refused, and a refusal changes nothing.
 3. Devices trust nobody's word: terms are compared with the owner's limits, keys and consents with
    the pinned directory of identity keys. Thresholds are computed here, not asked for.
 4. A device answers each question once. It writes down whose survival it consents to before it
    says so (`Record`; the caller makes it durable before it sends), and lives no second life: keys
    are in memory only, and an attempt that is on record is not entered again.
 5. One release per update: what has been consented to once is never masked again, since two sums
    that differ in one device would give that device away.
 6. An upload is all classes of a device or none.

What breaks it. (a) Invented devices: whoever hands out identities can surround a device with its
own; the directory must be pinned and public. (b) Collusion: with everybody else in a class, the
rest is one device; with t peers of the roster and t of a class, late uploads can be read. Two
different sets of survivors need 2t - n devices that sign twice: n/3 of them under `TWO_THIRDS`.
(c) Sums over small classes say much about each member; differential privacy is the remedy,
not masks. (d) Updates that repeat over rounds can be differenced; each round must train anew. (e)
Weak entropy. (f) Liars cannot see, but spoil: a false share or a nonsense upload costs a class or
the round, and an update within the range but not within the norm is added unseen.

Simplified, for now: a complete graph of pairs, good for up to `MAX_DEVICES` devices; one value
range for all blocks; false shares are found out (commitments), but not whose; releases travel in
the clear within TLS, which shows an eavesdropper what the coordinator may know anyway. Identities
are the devices' EC P-384 keys (`common/identity`), which enrolment certifies and revocation covers;
a second key per device would need both again.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from proxymoe.common.directory import Directory
from proxymoe.common.errors import ProtocolError
from proxymoe.common.files import canonical_json, digest_of
from proxymoe.common.fixed_point import FixedPoint, WordBits
from proxymoe.common.identity import DeviceName
from proxymoe.common.letters import (
    MAX_DEVICES,
    Announcement,
    Consent,
    Delivery,
    Indices,
    Introduction,
    Letter,
    Proof,
    Release,
    Roster,
    Shares,
    SignedLetter,
    Survivors,
    Upload,
    statement,
)
from proxymoe.common.messages import Digest
from proxymoe.common.shamir import SHARE_BYTES

MAX_TERMS_BYTES = 8 << 20
MAX_CLASS_WORDS = 1 << 28


class Phase(StrEnum):
    """What devices are being asked for; on a device, what it has answered last."""

    ANNOUNCE = "announce"
    SHARE = "share"
    UPLOAD = "upload"
    CONSENT = "consent"
    RELEASE = "release"
    OVER = "over"


@dataclass(frozen=True, slots=True)
class Turn:
    """One question of the coordinator and every device's answer to it."""

    question: type[Letter] | None
    """None: the terms, which begin an attempt."""
    answer: type[SignedLetter]
    then: Phase


TURNS: Mapping[Phase, Turn] = {
    Phase.ANNOUNCE: Turn(None, Announcement, Phase.SHARE),
    Phase.SHARE: Turn(Roster, Shares, Phase.UPLOAD),
    Phase.UPLOAD: Turn(Delivery, Upload, Phase.CONSENT),
    Phase.CONSENT: Turn(Survivors, Consent, Phase.RELEASE),
    Phase.RELEASE: Turn(Proof, Release, Phase.OVER),
}
"""The whole protocol, the same for both sides; a device or coordinator only ever moves forward."""


class Threshold(StrEnum):
    """How many of n devices must work together to undo a mask."""

    MAJORITY = "majority"
    """Holds against a curious coordinator; tolerates nearly half dropping out."""
    TWO_THIRDS = "two thirds"
    """Holds against a lying coordinator too; tolerates a third dropping out."""

    def of(self, count: int) -> int:
        """The least number that is more than this share of `count`."""
        return count // 2 + 1 if self is Threshold.MAJORITY else 2 * count // 3 + 1


class _Statement(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class MaskClass(_Statement):
    """Blocks that the same devices hold.

    Its vector: one word that counts devices, a weight per block, then the blocks' numbers.
    """

    holders: Indices
    blocks: Annotated[tuple[int, ...], Field(min_length=1)]
    """Places of the blocks in the full layout, increasing."""
    sizes: tuple[Annotated[int, Field(gt=0)], ...]
    """Numbers per block."""

    @cached_property
    def members(self) -> frozenset[int]:
        """The holders, as a set."""
        return frozenset(self.holders)

    @property
    def num_words(self) -> int:
        """Length of its vector."""
        return 1 + len(self.blocks) + sum(self.sizes)


class Terms(_Statement):
    """What an attempt is about, the same bytes for all; their digest starts the transcript.

    Devices and blocks are numbers everywhere else: places in `devices` and in the full layout.
    """

    run: str = Field(max_length=128)
    round: int = Field(ge=0)
    attempt: int = Field(ge=0)
    """Attempts of a round are numbered; each has fresh keys."""
    base: Digest
    layout: Digest
    """Of the full adapter."""
    devices: tuple[DeviceName, ...] = Field(min_length=2, max_length=MAX_DEVICES)
    """Sorted and distinct."""
    classes: tuple[MaskClass, ...] = Field(min_length=1)
    threshold: Threshold = Threshold.TWO_THIRDS
    smallest_cohort: int = Field(ge=2)
    """Fewest devices that must be left after every phase."""
    smallest_class: int = Field(ge=2)
    """Fewest devices among whose updates one may hide; a smaller class is never unmasked."""
    clip_norm: float = Field(gt=0)
    value_range: float = Field(gt=0)
    word_bits: WordBits = 24

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if list(self.devices) != sorted(set(self.devices)):
            raise ValueError("devices must be sorted and distinct")
        blocks = [block for found in self.classes for block in found.blocks]
        if len(set(blocks)) != len(blocks) or min(blocks) < 0:
            raise ValueError("a block is in exactly one class")
        if len({found.holders for found in self.classes}) != len(self.classes):
            raise ValueError("blocks with the same holders are one class")
        for found in self.classes:
            if len(found.blocks) != len(found.sizes) or list(found.blocks) != sorted(found.blocks):
                raise ValueError("a class lists its blocks in order, each with its size")
            if not self.smallest_class <= len(found.holders) or found.holders[-1] >= self.size:
                raise ValueError("a class has at least smallest_class holders, all of them devices")
            if found.num_words > MAX_CLASS_WORDS:
                raise ValueError(f"a class has at most {MAX_CLASS_WORDS} words")
        return self

    @property
    def size(self) -> int:
        """Number of devices that may take part."""
        return len(self.devices)

    @cached_property
    def encoding(self) -> FixedPoint:
        """How numbers become words; narrow words have levels enough for `MAX_DEVICES`."""
        return FixedPoint(self.word_bits, self.size, self.value_range)

    @cached_property
    def content(self) -> bytes:
        """The terms as bytes that `parse_terms` reads."""
        return canonical_json(self.model_dump(mode="json"))

    @cached_property
    def transcript(self) -> str:
        """Where every attempt's transcript starts; names run, round and attempt among the rest."""
        return digest_of(b"proxymoe terms 1\n", self.content)

    def needed(self, roster: Iterable[int]) -> int:
        """Fewest devices that must be left of a roster after every phase."""
        return max(self.smallest_cohort, self.threshold.of(len(frozenset(roster))))

    def class_threshold(self, number: int, roster: Iterable[int]) -> int:
        """How many holders must release shares of a seed before it can be found."""
        return self.threshold.of(len(self.classes[number].members.intersection(roster)))

    def live(self, roster: Iterable[int], left: Iterable[int]) -> tuple[int, ...]:
        """The classes of a roster that may still be unmasked when these devices are left of it."""
        roster, left = frozenset(roster), frozenset(left)
        return tuple(
            number
            for number, found in enumerate(self.classes)
            if len(found.members & left)
            >= max(self.smallest_class, self.class_threshold(number, roster))
        )

    def held(self, live: Iterable[int], *devices: int) -> list[int]:
        """The live classes that all of these devices are in."""
        return [n for n in live if self.classes[n].members.issuperset(devices)]

    def sealed_bytes(self, live: Iterable[int], one: int, other: int) -> int:
        """Length of the shares that two devices seal for each other: of a key, and of seeds."""
        return SHARE_BYTES * (1 + len(self.held(live, one, other)))

    def due(
        self, live: Iterable[int], senders: Iterable[int], survivors: frozenset[int], device: int
    ) -> list[tuple[int, int | None]]:
        """What a device releases, in order: (peer, class of the seed), or (peer, None) for its key.

        Of a survivor its seeds in the live classes that both are in; of any other its key, if it
        masked anything in a live class. Never both: that is the point of the protocol.
        """
        found: list[tuple[int, int | None]] = []
        for peer in senders:
            if peer in survivors:
                found += [(peer, number) for number in self.held(live, device, peer)]
            elif self.held(live, peer):
                found.append((peer, None))
        return found


def parse_terms(content: bytes) -> Terms:
    """The terms that bytes from anywhere stand for.

    Raises:
        ProtocolError: too large, not terms, or terms that contradict themselves.
    """
    if len(content) > MAX_TERMS_BYTES:
        raise ProtocolError(f"terms of {len(content)} bytes, the limit is {MAX_TERMS_BYTES}")
    try:
        return Terms.model_validate_json(content)
    except ValidationError as error:
        found = [(".".join(map(str, e["loc"])), e["msg"]) for e in error.errors()[:3]]
        raise ProtocolError(f"terms of secure aggregation refused: {found}") from None


def continued(transcript: str, *parts: bytes) -> str:
    """The transcript after more has been agreed on; the parts are of one letter."""
    return digest_of(bytes.fromhex(transcript), *parts)


def introduced(terms: Terms, roster: Roster, directory: Directory) -> dict[int, Introduction]:
    """{device: its keys}, if everybody in the roster is who it says it is.

    Raises:
        ProtocolError: a device twice or unknown, too few, a key twice, or a signature that is not
            of the device's pinned identity key.
    """
    numbers = [member.device for member in roster.members]
    if numbers != sorted(set(numbers)) or numbers[-1:] >= [terms.size]:
        raise ProtocolError("a roster lists devices of the terms, in order, each once")
    if len(numbers) < terms.smallest_cohort:
        raise ProtocolError(f"roster of {len(numbers)}, the least is {terms.smallest_cohort}")
    keys = [key for member in roster.members for key in (member.share_key, member.mask_key)]
    if len(set(keys)) != len(keys):
        raise ProtocolError("two keys of the roster are the same")
    for member in roster.members:
        signed = statement(member.announcement(terms.transcript))
        name = terms.devices[member.device]
        directory.check(name, signed, bytes.fromhex(member.signature))
    return {member.device: member for member in roster.members}
