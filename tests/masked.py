"""Small cohorts for secure aggregation: real keys, real letters, a handful of numbers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from proxymoe.common.contribution import Contribution, Limits, Record
from proxymoe.common.letters import decode
from proxymoe.common.masking import Device
from proxymoe.common.secagg import MaskClass, Phase, Terms
from proxymoe.common.unmasking import Coordinator
from proxymoe.simulations.secure import SimulatedKeys

KEYS = SimulatedKeys()
"""One identity per name for all tests; making keys is the slow part."""
NAMES = tuple(f"device{number}" for number in range(9))
for _name in NAMES:
    KEYS.signer(_name)
PHASES: list[Phase] = [phase for phase in Phase if phase is not Phase.OVER]
LIMITS = Limits(smallest_cohort=2, smallest_class=2)
NEVER: Callable[[Phase, str], bool] = lambda _phase, _name: False  # noqa: E731


def small_terms(
    count: int = 5, holders: Sequence[Iterable[int]] | None = None, **changes: Any
) -> Terms:
    """Terms for the first `count` devices; class i has blocks 2i and 2i + 1."""
    groups = [tuple(sorted(found)) for found in (holders or [range(count)])]
    classes = tuple(
        MaskClass(holders=found, blocks=(2 * i, 2 * i + 1), sizes=(3 + i, 4))
        for i, found in enumerate(groups)
    )
    settings: dict[str, Any] = {
        "run": "run",
        "round": 3,
        "attempt": 0,
        "base": "ab" * 32,
        "layout": "cd" * 32,
        "devices": NAMES[:count],
        "classes": classes,
        "smallest_cohort": 2,
        "smallest_class": 2,
        "clip_norm": 1.0,
        "value_range": 1.0,
    }
    return Terms.model_validate(settings | changes)


def contribution_to(terms: Terms, device: int, seed: int = 0, weight: float = 1.0) -> Contribution:
    """A device's update under these terms, with one block more that nobody else has."""
    sizes = {1000: 2}
    for found in terms.classes:
        if device in found.members:
            sizes |= dict(zip(found.blocks, found.sizes, strict=True))
    rng = np.random.default_rng([seed, device])
    vector = rng.standard_normal(sum(sizes.values())).astype(np.float32)
    vector *= np.float32(0.9 * terms.clip_norm / np.linalg.norm(vector))
    return Contribution(sizes, vector, np.full(len(sizes), weight, dtype=np.float32))


def device_in(
    terms: Terms,
    number: int,
    given: Contribution | None = None,
    records: Iterable[Record] = (),
    limits: Limits = LIMITS,
) -> Device:
    """Device `number` with its contribution."""
    given = given or contribution_to(terms, number)
    name, rng = terms.devices[number], np.random.default_rng(number)
    return Device(name, KEYS.signer(name), KEYS, terms, limits, given, records, rng)


class Attempt:
    """A coordinator and all devices, brought to any phase and looked at there."""

    def __init__(self, terms: Terms | None = None, seed: int = 0, limits: Limits = LIMITS) -> None:
        self.terms = terms or small_terms()
        self.given = [contribution_to(self.terms, i, seed) for i in range(self.terms.size)]
        self.devices = [
            device_in(self.terms, i, given, limits=limits) for i, given in enumerate(self.given)
        ]
        self.coordinator = Coordinator(self.terms, KEYS)
        self.answers: dict[str, Any] = {
            name: device.announce()
            for name, device in zip(self.terms.devices, self.devices, strict=True)
        }
        self.questions: dict[str, bytes] = {}

    def device(self, name: str) -> Device:
        """The device of that name."""
        return self.devices[self.terms.devices.index(name)]

    def ask(self, phase: Phase, lost: Callable[[Phase, str], bool] = NEVER) -> "Attempt":
        """Goes on until `phase` is what devices are being asked for; nobody has answered yet."""
        while self.coordinator.phase is not phase:
            self.collect(lost)
            self.questions = self.coordinator.close()
            if self.coordinator.phase is phase:
                self.answers = {}
            else:
                self.reply()
        return self

    def reply(self) -> "Attempt":
        """Lets every device that was asked answer."""
        self.answers = {n: self.device(n).answer(asked) for n, asked in self.questions.items()}
        return self

    def collect(self, lost: Callable[[Phase, str], bool] = NEVER) -> None:
        """Gives the coordinator all answers that it has not got."""
        for name, step in self.answers.items():
            if name in self.coordinator.awaited and not lost(self.coordinator.phase, name):
                self.coordinator.receive(step.reply)

    def finish(self, lost: Callable[[Phase, str], bool] = NEVER) -> "Attempt":
        """Answers what is open and goes on to the end."""
        if self.questions and not self.answers:
            self.reply()
        return self.ask(Phase.OVER, lost)

    def expected(self, number: int, devices: Iterable[str]) -> np.ndarray[Any, Any]:
        """The plain sum of a class over these devices."""
        found = self.terms.classes[number]
        total = np.zeros(sum(found.sizes))
        for name in devices:
            place = self.terms.devices.index(name)
            if place in found.members:
                given = self.given[place]
                total += flat(given.sizes, given.vector, found.blocks)
        return total


def flat(
    sizes: Mapping[int, int], vector: np.ndarray[Any, Any], blocks: Iterable[int]
) -> np.ndarray[Any, Any]:
    """The numbers of some blocks of a vector."""
    ends = dict(zip(sizes, np.cumsum(list(sizes.values())), strict=True))
    return np.concatenate([vector[ends[b] - sizes[b] : ends[b]] for b in blocks])


def read(content: bytes) -> Any:
    """A letter of any kind, with its body and signature."""
    return decode(content)


def holds(attempt: Attempt) -> None:
    """The law: what was unmasked is the plain sum over the survivors that hold it."""
    result, terms = attempt.coordinator.result, attempt.terms
    for found in result.sums:
        chosen = terms.classes[found.number]
        holders = [n for n in result.survivors if terms.devices.index(n) in chosen.members]
        assert len(holders) == found.num_devices >= terms.smallest_class
        expected = attempt.expected(found.number, holders)
        error = np.abs(np.concatenate(found.values) - expected).max()
        assert error <= len(holders) * terms.encoding.step
        assert found.weights == pytest.approx([len(holders)] * 2)
    numbers = {found.number for found in result.sums} | result.masked.keys()
    assert numbers == set(range(len(terms.classes)))
