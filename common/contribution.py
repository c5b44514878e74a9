"""What goes into secure aggregation, and what comes out: an update per device, a sum per class.

A device brings its update, its owner's limits and its past, and agrees to terms only if all three
allow it; see `secagg` for what the terms are.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from proxymoe.common.discrete_gaussian import Steps
from proxymoe.common.errors import ProtocolError
from proxymoe.common.fixed_point import Floats, Numbers, Words
from proxymoe.common.secagg import Phase, Terms, Threshold

NORM_SLACK = 1.001
"""An update may exceed the clip norm by this factor, for rounding."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a device's owner insists on, whatever the terms say."""

    smallest_cohort: int = 8
    smallest_class: int = 5
    majority_is_enough: bool = False
    """Whether to trust the coordinator to follow the protocol; see `Threshold`."""

    def check(self, terms: Terms) -> None:
        """Raises ProtocolError if the terms ask for more than the owner gives."""
        for what in ("smallest_cohort", "smallest_class"):
            asked, least = getattr(terms, what), getattr(self, what)
            if asked < least:
                raise ProtocolError(f"terms with {what} {asked}; this device's policy says {least}")
        if terms.threshold is Threshold.MAJORITY and not self.majority_is_enough:
            raise ProtocolError("terms with a majority threshold; this device wants two thirds")


@dataclass(frozen=True, slots=True)
class Contribution:
    """One device's update, as it goes into the sum."""

    sizes: Mapping[int, int]
    """{block of the full layout: numbers}, in the order of the vector."""
    vector: Floats | Numbers
    """(P,) clipped."""
    weights: Floats
    """(blocks,) from 0 to 1; the sum is of weight · numbers, and of weights."""
    noise: Callable[[int, int], Steps] | None = None
    """(size, holders) → what this device adds to so many numbers of a block with so many holders.
    With it, numbers are whole, and so is their sum; it may refuse with a ProtocolError."""

    @property
    def digest(self) -> str:
        """Names the update, so that it is released once."""
        return hashlib.sha256(self.vector.tobytes() + self.weights.tobytes()).hexdigest()

    def check(self, terms: Terms) -> None:
        """Raises ProtocolError if the update must not be masked under these terms."""
        if (self.vector.size, self.weights.size) != (sum(self.sizes.values()), len(self.sizes)):
            raise ProtocolError(f"an update of {self.vector.size} numbers does not fit its blocks")
        norm = float(np.linalg.norm(self.vector.astype(np.float64)))
        if not norm <= NORM_SLACK * terms.clip_norm:  # NaN is refused, too
            raise ProtocolError(f"update of norm {norm:.4g}, the limit is {terms.clip_norm}")
        if not bool(((self.weights >= 0) & (self.weights <= 1)).all()):
            raise ProtocolError("weights must be from 0 to 1")
        if self.noise is not None and terms.encoding.step != 1.0:
            raise ProtocolError(
                f"noise on whole numbers, in words with steps of {terms.encoding.step:.4g}"
            )

    def check_blocks(self, terms: Terms, device: int) -> None:
        """Raises ProtocolError if the terms think that this device holds other blocks."""
        for found in terms.classes:
            for block, size in zip(found.blocks, found.sizes, strict=True):
                holds, said = self.sizes.get(block), device in found.members
                if said != (holds is not None) or (said and holds != size):
                    raise ProtocolError(
                        f"terms say {size if said else 'no'} numbers of block {block} are here; "
                        f"there are {holds or 'none'}"
                    )

    def words_of(
        self, terms: Terms, number: int, holders: int, rng: np.random.Generator
    ) -> tuple[Words, int]:
        """The vector of a class with so many holders, not masked yet, and how much saturated."""
        ends = dict(zip(self.sizes, accumulate(self.sizes.values()), strict=True))
        place = {block: i for i, block in enumerate(self.sizes)}
        blocks, encoding = terms.classes[number].blocks, terms.encoding
        weights = self.weights[[place[block] for block in blocks]]
        parts = [np.ones(1, dtype=np.uint32), encoding.encode_weights(weights)]
        saturated = 0
        for block, weight in zip(blocks, weights, strict=True):
            values = self.vector[ends[block] - self.sizes[block] : ends[block]]
            if self.noise is not None:
                values = values + self.noise(values.size, holders)
            words, lost = encoding.encode(values, float(weight), rng)
            parts.append(words)
            saturated += lost
        return np.concatenate(parts), saturated


@dataclass(frozen=True, slots=True)
class Record:
    """What a device must never forget, made durable before the answer it comes with is sent."""

    run: str
    round: int
    attempt: int
    phase: Phase
    transcript: str
    """Fixes the survivors, and with them which share of each peer may be released."""
    update: str
    """Digest of the update, which from now on is spent."""


def check_records(terms: Terms, update: str, records: Iterable[Record]) -> None:
    """Raises ProtocolError if the attempt has been lived through, or the update was released."""
    for record in records:
        if (record.run, record.round, record.attempt) == (terms.run, terms.round, terms.attempt):
            raise ProtocolError(
                f"attempt {terms.attempt} of round {terms.round} is on record; a device answers "
                "once, and needs another attempt"
            )
        if record.update == update:
            raise ProtocolError(
                f"this update was consented to in round {record.round}, attempt {record.attempt}; "
                "train anew"
            )


@dataclass(frozen=True, slots=True)
class ClassSum:
    """What is known of one class: sums over its surviving holders."""

    number: int
    num_devices: int
    weights: Numbers
    """(blocks,) Σ weight."""
    values: tuple[Numbers, ...]
    """Per block Σ weight · numbers."""


def decoded(terms: Terms, number: int, total: Words, num_devices: int) -> ClassSum:
    """What the summed vectors of a class, unmasked, say about this many devices.

    Raises:
        ProtocolError: they count another number of devices, so masks are left, or somebody lied.
    """
    found, encoding = terms.classes[number], terms.encoding
    if encoding.signed(total[:1])[0] != num_devices:
        raise ProtocolError("masks did not cancel: an upload was not what it should be")
    count = len(found.blocks)
    weights = encoding.decode_weights(total[1 : 1 + count])
    ends = np.cumsum(found.sizes)[:-1]
    values = encoding.decode(total[1 + count :])
    return ClassSum(number, num_devices, weights, tuple(np.split(values, ends)))
