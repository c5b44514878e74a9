"""Level 2: replies that are lost, doubled, late, damaged or lies, and devices that vanish.

In every round one device's reply goes through a fault. Every reply that is delivered comes with
the receipt that is due for it, and every round with the end that it must have.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from proxymoe.common.messages import Refusal, decode, encode
from proxymoe.server.engine import Receipt, RoundEngine, Rules
from proxymoe.server.round import Answer
from proxymoe.server.store import Phase, Round, RoundStore
from proxymoe.simulations.faults.cohort import DevicesOf, InMemory, honest, in_memory, plain
from proxymoe.simulations.faults.law import Law, other
from proxymoe.simulations.faults.report import Ground, Scenario
from proxymoe.simulations.faults.rounds import federation_of, undisturbed

LEVEL = "messages"
RULES = Rules(quorum=0.6, patience=1000.0)
"""Two of three devices are enough, and the third is waited for."""
FOREIGN = "00" * 32
ACCEPTED, REFUSED = Receipt.ACCEPTED, Receipt.REFUSED


class Clock:
    """Seconds that pass with every look and every pause."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now

    def wait(self, seconds: float) -> None:
        """Lets so much time pass."""
        self.now += seconds


@dataclass(frozen=True, slots=True)
class Sight:
    """What a fault sees when it strikes."""

    name: str
    task: bytes
    reply: bytes
    """The honest one, as it is sent."""
    before: tuple[str, bytes] | None
    """The device that was struck in the round before, and its honest reply then."""
    rng: np.random.Generator
    devices: InMemory
    """Who send it."""

    def sent(self, content: bytes) -> bytes:
        """Another answer of this device, as it would be sent."""
        return self.devices.sent(self.task, content)


Delivered = tuple[str, bytes, Receipt]
"""Who a reply is said to come from, its bytes, and the receipt that is due for it."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What comes in place of one device's honest reply; the others answer after it."""

    deliver: Callable[[Sight], Sequence[Delivered]]
    lossless: bool = False
    """Whether the run must end in the undisturbed bits."""
    alone: bool = False
    """Whether the others are silent, and the round has no quorum."""


class Faulty:
    """A transport under which a fault strikes one device per round, by turns."""

    def __init__(self, fault: Fault, rng: np.random.Generator, devices: InMemory) -> None:
        self.due: list[Receipt] = []
        """For all replies that were delivered."""
        self._fault, self._rng, self._devices = fault, rng, devices
        self._struck: dict[int, tuple[str, bytes]] = {}
        """By round; what is lost is asked for again."""

    def devices(self) -> list[str]:
        """See `server.round.Transport`."""
        return ["a", "b", "c"]

    def exchange(self, tasks: Mapping[str, bytes]) -> Iterator[Answer]:
        """See `server.round.Transport`."""
        number = decode(next(iter(tasks.values())))[0].round
        struck = sorted(tasks)[number % len(tasks)]
        sent = {name: self._devices.sent(task, honest(task)) for name, task in tasks.items()}
        reply, before = sent[struck], self._struck.get(number - 1)
        sight = Sight(struck, tasks[struck], reply, before, self._rng, self._devices)
        self._struck[number] = struck, reply
        # Never in the order of names, in which the engine adds.
        others = [] if self._fault.alone else sorted(tasks.keys() - {struck}, reverse=True)
        honestly = [(name, sent[name], ACCEPTED) for name in others]
        for name, content, receipt in [*self._fault.deliver(sight), *honestly]:
            self.due.append(receipt)
            yield name, content


class WatchedEngine(RoundEngine):
    """An engine that notes the receipts it gives."""

    receipts: list[Receipt]

    def receive(self, now: Round, name: str, content: bytes) -> Receipt:
        """See `RoundEngine.receive`."""
        self.receipts.append(receipt := super().receive(now, name, content))
        return receipt


def strike(
    faults: Sequence[Fault], ground: Ground, devices_of: DevicesOf = in_memory
) -> Iterator[str]:
    """A run for each fault, which strikes in every round; judged after each of them."""
    expected = undisturbed(ground.folder())
    for fault in faults:
        federation, folder = federation_of(), ground.folder()
        store = RoundStore(folder, federation.run, federation.layout.size)
        devices = devices_of(federation, store)
        law, transport = Law(federation, folder), Faulty(fault, ground.rng, devices)
        clock = Clock()
        engine = WatchedEngine(
            federation,
            store,
            transport,
            plain(federation),
            RULES,
            clock=clock,
            pause=clock.wait,
            passed=devices.passed,
            opened=devices.opened,
        )
        engine.receipts = []
        end = Phase.ABANDONED if fault.alone else Phase.COMMITTED
        for now in rounds_of(engine, store, federation.settings.rounds):
            complaint = law.broken()
            if now.phase is not end:
                complaint = f"round {now.number} is {now.phase}, expected {end}; {now.reason}"
            if engine.receipts != transport.due:
                complaint = f"receipts {engine.receipts}, expected {transport.due}"
            if now.number == federation.settings.rounds:
                complaint = complaint or law.unfinished(expected if fault.lossless else None)
            yield complaint
        store.close()


def rounds_of(engine: RoundEngine, store: RoundStore, rounds: int) -> Iterator[Round]:
    """Steps the engine to the end of its run; every round as it stands when it is over."""
    while (now := store.latest()) is None or not (now.phase.over and now.number >= rounds):
        engine.step(now)
        after = store.latest()
        if after is not None and after.phase.over and after != now:
            yield after


def instead(change: Callable[[Sight], bytes]) -> Fault:
    """Another content comes in place of the reply, and must be refused."""
    return Fault(lambda sight: [(sight.name, change(sight), REFUSED)])


def _saying(**header: Any) -> Fault:
    """The reply says something else in its header, and must be refused."""
    return instead(lambda sight: honest(sight.task, **header))


def _sending(change: Callable[[Any], Any]) -> Fault:
    """The reply carries another vector, and must be refused."""
    return instead(lambda sight: honest(sight.task, change))


def _late(sight: Sight) -> list[Delivered]:
    """The reply of the round before comes now, and this one will come in the next."""
    return [(*sight.before, Receipt.LATE)] if sight.before else []


def _again(sight: Sight) -> list[Delivered]:
    """The reply comes now, and that of the round before (at first: this one) once more."""
    again = sight.before or (sight.name, sight.reply)
    own = (sight.name, sight.reply, ACCEPTED)
    return [own, (*again, Receipt.DUPLICATE)]


def impostor(sight: Sight) -> list[Delivered]:
    """The reply comes in another device's name first, which ends the wait for that one."""
    stolen = "a" if sight.name != "a" else "b"
    return [(stolen, sight.reply, REFUSED), (sight.name, sight.reply, ACCEPTED)]


def _stranger(sight: Sight) -> list[Delivered]:
    """A device that nobody asked answers, too."""
    reply = honest(sight.task, device="stranger")
    return [("stranger", reply, REFUSED), (sight.name, sight.reply, ACCEPTED)]


def _refusal(sight: Sight) -> bytes:
    """What a device says that holds another base model."""
    task, _ = decode(sight.task)
    address = task.model_dump(include={"run", "round", "device", "base", "plan", "layout"})
    return encode(Refusal(**address, reason="mismatch"))


def twice(receipt: Receipt, second: Callable[[Sight], bytes]) -> Fault:
    """The honest reply comes, and then another one."""
    return Fault(
        lambda sight: [(sight.name, sight.reply, ACCEPTED), (sight.name, second(sight), receipt)],
        lossless=True,
    )


def _scenario(fault: str, checked: str, *faults: Fault) -> Scenario:
    return Scenario(LEVEL, fault, f"{checked}; commit is the mean", partial(strike, faults))


SCENARIOS = (
    _scenario(
        "reply lost, of one device or of too many",
        "committed with a quorum, else abandoned",
        Fault(lambda _: []),
        Fault(lambda _: [], alone=True),
    ),
    _scenario(
        "duplicated, at once or a round later",
        "acknowledged, counted once",
        twice(Receipt.DUPLICATE, lambda sight: sight.reply),
        twice(Receipt.DUPLICATE, lambda sight: honest(sight.task, seconds=9.0)),
        Fault(_again, lossless=True),
    ),
    _scenario(
        "two different replies of one device",
        "the second refused and on record",
        twice(Receipt.CONFLICT, lambda sight: other(sight.task)),
    ),
    _scenario(
        "reordered",
        "the same bits",
        Fault(lambda sight: [(sight.name, sight.reply, ACCEPTED)], lossless=True),
    ),
    _scenario("a round late", "acknowledged, not applied", Fault(_late)),
    _scenario(
        "of another run, round, base, plan or layout",
        "refused",
        _saying(run="another"),
        _saying(round=99),
        _saying(base=FOREIGN),
        _saying(plan=FOREIGN),
        _saying(layout=FOREIGN),
    ),
    _scenario(
        "truncated, oversized or no reply at all",
        "refused",
        instead(lambda sight: sight.reply[:-6]),
        instead(lambda sight: sight.reply[: len(sight.reply) // 2]),
        instead(lambda _: b""),
        instead(lambda sight: sight.rng.bytes(300)),
        instead(lambda sight: sight.task),
        _sending(lambda update: update[:-1]),
        _sending(lambda update: np.tile(update, 1000)),
    ),
    _scenario(
        "update of NaN, infinity or too great a norm",
        "refused",
        _sending(lambda update: update * np.float32(np.nan)),
        _sending(lambda update: update + np.float32(np.inf)),
        _sending(lambda update: update * np.float32(3.0)),
    ),
    _scenario(
        "device with another base model refuses", "round goes on without it", instead(_refusal)
    ),
    _scenario(
        "under a stolen name, or by a stranger",
        "refused, honest one counts",
        Fault(impostor),
        Fault(_stranger, lossless=True),
    ),
)
