"""Level 5: clocks that jump, at the coordinator and on the device."""

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

from proxymoe.client.entries import Entry, Kind
from proxymoe.client.ledger import Ledger
from proxymoe.common.certificates import check_device_certificate
from proxymoe.common.errors import ProtocolError
from proxymoe.common.files import digest_of
from proxymoe.common.identity import new_signing_key, verifying_key
from proxymoe.common.tickets import (
    SKEW_SECONDS,
    Ticket,
    issue_ticket,
    new_token,
    parse_token,
    verify_ticket,
)
from proxymoe.server.engine import RoundEngine
from proxymoe.server.store import Phase, RoundStore
from proxymoe.simulations.faults.cohort import InMemory, plain
from proxymoe.simulations.faults.law import Law
from proxymoe.simulations.faults.messages import RULES, Clock, rounds_of
from proxymoe.simulations.faults.report import Ground, Scenario
from proxymoe.simulations.faults.rounds import federation_of, undisturbed
from proxymoe.simulations.loopback import Loopback

LEVEL = "clocks"
HOUR, DAY, YEAR = 3600.0, 86_400.0, 31_557_600.0
NOW = 1_800_000_000
DIGEST = "ab" * 32


class Jumping(Clock):
    """A clock that jumps by so much at every n-th look."""

    def __init__(self, seconds: float, every: int) -> None:
        super().__init__()
        self._seconds, self._every, self._looks = seconds, every, 0

    def __call__(self) -> float:
        self._looks += 1
        if self._looks % self._every == 0:
            self.now += self._seconds
        return super().__call__()


def deadlines(ground: Ground) -> Iterator[str]:
    """The clock of the deadlines jumps in every round: it ends sooner, or as it would have."""
    for seconds in (YEAR, -YEAR):
        for every in (2, 3):
            federation, folder = federation_of(), ground.folder()
            law, clock = Law(federation, folder), Jumping(seconds, every)
            store = RoundStore(folder, federation.run, federation.layout.size)
            summation = plain(federation)
            engine = RoundEngine(
                federation, store, InMemory(), summation, RULES, clock=clock, pause=clock.wait
            )
            for now in rounds_of(engine, store, federation.settings.rounds):
                clear = now.phase is Phase.COMMITTED or now.reason
                yield law.broken() if clear else f"round {now.number} ended without a reason"
            store.close()


def wall_clock(ground: Ground) -> Iterator[str]:
    """The time of day jumps to and fro at every entry of the audit log."""
    expected = undisturbed(ground.folder())
    for seconds in (-YEAR, DAY, 50 * YEAR):
        federation, folder = federation_of(), ground.folder()
        law, clock = Law(federation, folder), Clock()
        store = RoundStore(folder, federation.run, federation.layout.size)
        summation = plain(federation)
        engine = RoundEngine(
            federation, store, InMemory(), summation, RULES, clock=clock, pause=clock.wait
        )
        jumps = (NOW + seconds * (n % 2) for n in itertools.count())
        with mock.patch("proxymoe.server.engine.time.time", lambda jumps=jumps: next(jumps)):
            engine.run()
        store.close()
        yield law.unfinished(expected)


def promises(_: Ground) -> Iterator[str]:
    """A device's clock is wrong when it looks at a ticket, a token or a certificate."""
    key, task = new_signing_key(), b"task"
    ticket = issue_ticket(
        Ticket(
            run="run",
            round=1,
            device="device",
            base=DIGEST,
            plan=DIGEST,
            layout=DIGEST,
            task=digest_of(task),
            cohort_size=2,
            issued=NOW,
            expires=NOW + 3600,
        ),
        key,
    )
    look = partial(
        verify_ticket,
        ticket,
        verifying_key(key),
        device="device",
        base=DIGEST,
        plan=DIGEST,
        layout=DIGEST,
        task=task,
    )
    for offset in (-SKEW_SECONDS + 1, HOUR + SKEW_SECONDS - 1):
        yield _judged(partial(look, NOW + offset), valid=True)
    for offset in (-YEAR, -SKEW_SECONDS - 1, HOUR + SKEW_SECONDS + 1, YEAR):
        yield _judged(partial(look, NOW + offset), valid=False)
    loopback = Loopback.new()
    token = new_token("host:1", loopback.authority, "device", NOW + HOUR).text
    for offset, valid in ((-YEAR, True), (HOUR + 1, False), (YEAR, False)):
        yield _judged(partial(parse_token, token, NOW + offset), valid)
    check = partial(check_device_certificate, loopback.device.certificate, loopback.authority)
    for offset, valid in ((-2 * DAY, False), (-HOUR, True), (DAY, True), (2 * YEAR, False)):
        yield _judged(partial(check, time.time() + offset), valid)


def _judged(look: Callable[[], object], valid: bool) -> str:
    try:
        look()
    except ProtocolError as error:
        return f"refused: {error}" if valid else ""
    return "" if valid else "believed, at a time when it is not valid"


def budgets(ground: Ground) -> Iterator[str]:
    """A device's clock is set back and forth between entries: no budget comes back by that."""
    now = float(NOW)
    ledger = Ledger.create(ground.folder() / "ledger.db", lambda: now)
    entry = Entry(kind=Kind.UPDATE, receiver="host:1", num_bytes=100, digest=DIGEST, epsilon=0.5)
    for count, offset in enumerate((40 * DAY, -40 * DAY, YEAR, -YEAR, -HOUR), start=1):
        now = NOW + offset
        ledger.write(entry)
        ledger.verify()
        spent = ledger.totals()
        now = NOW - YEAR
        this_month = ledger.totals(since=ledger.month())
        whole = (spent.num_entries, spent.sent_bytes, spent.epsilon) == (
            count,
            100 * count,
            count / 2,
        )
        yield "" if whole and this_month == spent else f"{spent}, this month {this_month}"


SCENARIOS = (
    Scenario(LEVEL, "deadline clock jumps a year", "a clear end; commit is the mean", deadlines),
    Scenario(LEVEL, "time of day jumps", "chain verifies, undisturbed bits", wall_clock),
    Scenario(LEVEL, "wrong time for tickets, tokens, certificates", "refused outside", promises),
    Scenario(LEVEL, "ledger's clock set back and forth", "no budget comes back", budgets),
)
