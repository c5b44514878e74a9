"""What a device sealed for this attempt is opened and counts once; anything else is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.errors import Equivocation, ProtocolError
from proxymoe.common.identity import new_signing_key, verifying_key
from proxymoe.common.round_keys import RoundKeys, verify_offer
from proxymoe.common.sealing import seal
from proxymoe.server import audit
from proxymoe.server.engine import Receipt, RoundEngine, Rules
from proxymoe.server.envelopes import Envelopes
from proxymoe.server.round import tasks_of
from proxymoe.server.store import Phase, RoundStore
from proxymoe.simulations.faults.cohort import InMemory, honest, plain, small_federation
from proxymoe.simulations.faults.law import other
from proxymoe.simulations.faults.sealed import SECONDS, SealingDevices
from tests.clock import Clock
from tests.laws import tried

FEDERATION = small_federation(rounds=3, momentum=0.5)
SIZE = FEDERATION.layout.size
RULES = Rules(quorum=1.0)
SIGNING = new_signing_key()
COORDINATOR = verifying_key(SIGNING)


class Killed(BaseException):
    """Stands for a process that ended here."""


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path):
    store = store_of(tmp_path)
    begin(store, 1)
    yield store
    store.close()


@pytest.fixture
def devices(store, clock):
    return SealingDevices(FEDERATION, store, clock=clock, signing_key=SIGNING)


@pytest.fixture
def mail(devices):
    """The coordinator's side of round 1, after its keys went out."""
    devices.envelopes.offer()
    return devices.envelopes


@pytest.fixture
def sealed(devices, store, clock):
    """What a device would seal to these keys in round 1, if it said these things in the header."""

    def envelope(signed, name="a", content=None, signed_by=None, **said):
        task = task_of(store, name)
        offer = verify_offer(signed, COORDINATOR, clock(), run=FEDERATION.run, number=1)
        plan = FEDERATION.members[name].plan.digest
        address = {"device": name, "base": FEDERATION.base, "plan": plan, "mode": "plain"}
        key = devices.private[signed_by or name]
        return seal(content or honest(task), offer, key, **{**address, **said})

    return envelope


def store_of(folder):
    return RoundStore(folder, FEDERATION.run, SIZE)


def begin(store, number):
    store.begin(number, 0.0)
    store.enter(number, Phase.DISTRIBUTING, 0.0, cohort=["a", "b", "c"])


def task_of(store, name="a"):
    return tasks_of(FEDERATION, store.state(1, 0), [name])[name]


def engine_of(folder, kind=SealingDevices, rules=RULES, passed=None, **arguments):
    """An engine and sealing devices, as in a new process."""
    store, clock = store_of(folder), Clock()
    devices = kind(FEDERATION, store, clock=Clock(), **arguments)
    engine = RoundEngine(
        FEDERATION,
        store,
        devices,
        plain(FEDERATION),
        rules,
        clock=clock,
        pause=clock.wait,
        passed=passed or devices.passed,
        opened=devices.opened,
    )
    return engine, devices, store


def in_process(folder):
    """The end of the same run without envelopes."""
    return RoundEngine(FEDERATION, store_of(folder), InMemory(), plain(FEDERATION), RULES).run()


def refused(mail, content, reason, name="a", number=1, error=ProtocolError):
    with pytest.raises(error, match=reason):
        mail.opened(number, name, content)


# Laws


def test_rounds_in_envelopes_end_in_the_bits_of_rounds_without(tmp_path):
    engine, _, _ = engine_of(tmp_path / "sealed")
    assert torch.equal(engine.run().adapter, in_process(tmp_path / "plain").adapter)


@tried(10)
@given(st.lists(st.integers(1, 9), max_size=4))
def test_killed_after_any_phases_it_ends_in_the_same_bits(tmp_path_factory, lives):
    folder = tmp_path_factory.mktemp("run")
    for phases in lives:
        count = iter(range(phases))

        def passed(_, count=count):
            if next(count, None) is None:
                raise Killed

        try:
            engine_of(folder / "sealed", passed=passed)[0].run()
        except Killed:
            continue
    engine, _, store = engine_of(folder / "sealed")
    assert torch.equal(engine.run().adapter, in_process(folder / "plain").adapter)
    assert [found.phase for found in store.rounds()] == [Phase.COMMITTED] * 3


class Asked(SealingDevices):
    """Devices that note whom a coordinator asks."""

    asked: list[list[str]]

    def exchange(self, tasks):
        self.asked = [*getattr(self, "asked", []), sorted(tasks)]
        yield from super().exchange(tasks)


def test_a_coordinator_killed_in_a_round_goes_on_in_a_new_attempt_with_who_is_missing(tmp_path):
    class Dying(SealingDevices):
        def exchange(self, tasks):
            yield next(super().exchange(tasks))
            raise Killed

    engine, _, _ = engine_of(tmp_path / "sealed", Dying)
    with pytest.raises(Killed):
        engine.run()
    engine, devices, store = engine_of(tmp_path / "sealed", Asked)
    found = engine.run()
    assert devices.asked == [["b", "c"], ["a", "b", "c"], ["a", "b", "c"]]
    attempts = [e.body["attempt"] for e in audit.entries(store.database) if e.event == "attempt"]
    assert attempts == [0, 1, 0, 0]
    assert torch.equal(found.adapter, in_process(tmp_path / "plain").adapter)


def test_round_keys_are_one_for_all_who_are_asked_in_a_round_and_new_in_the_next(
    mail, store, clock
):
    first = mail.offer()
    assert mail.offer() == first
    begin(store, 2)
    found = [
        verify_offer(signed, COORDINATOR, clock(), run=FEDERATION.run, number=number)
        for number, signed in ((1, first), (2, mail.offer()))
    ]
    assert [(offer.round, offer.attempt) for offer in found] == [(1, 0), (2, 0)]
    assert found[0].digest != found[1].digest


def test_round_keys_that_have_expired_make_room_for_a_new_attempt(mail, store, clock, sealed):
    first = mail.offer()
    clock.now += SECONDS
    signed = mail.offer()
    assert signed != first
    offer = verify_offer(signed, COORDINATOR, clock(), run=FEDERATION.run, number=1)
    assert offer.attempt == 1
    assert mail.opened(1, "a", sealed(signed)) == honest(task_of(store))


def test_round_keys_are_never_on_disk_and_gone_when_nothing_is_collected(tmp_path):
    seen: dict[Phase, RoundKeys] = {}

    def passed(now):
        if keys := made.envelopes._keys:
            private = keys._private[1].private_bytes_raw()
            files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
            assert files
            assert not any(private in content for content in files)
            seen[now.phase] = keys
        made.passed(now)

    engine, made, _ = engine_of(tmp_path, passed=passed)
    engine.run()
    assert Phase.COLLECTING in seen
    assert made.envelopes._keys is None
    assert all(keys._private == {} for keys in seen.values())


@pytest.mark.parametrize("end", [Phase.AGGREGATED, Phase.ABANDONED])
def test_what_was_sealed_in_a_round_stays_closed_when_it_is_collected(mail, store, sealed, end):
    late = sealed(mail.offer())
    store.enter(1, end, 0.0)
    mail.passed(store.latest())
    refused(mail, late, "round 1 has no keys")


# Refusals


def test_an_envelope_is_of_who_it_is_said_to_be_from(mail, sealed):
    refused(mail, sealed(mail.offer(), "b"), "for device b, and here is a")
    refused(mail, sealed(mail.offer(), signed_by="b"), "not made with this device key")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"base": "00" * 32}, "for base 0000"),
        ({"plan": "00" * 32}, "for plan 0000"),
        ({"mode": "secure"}, "for mode secure"),
        ({"part": "shares"}, "for part shares"),
        ({"content": bytes(1 << 20)}, "the limit is"),
    ],
)
def test_an_envelope_for_something_else_is_refused(mail, sealed, said, reason):
    refused(mail, sealed(mail.offer(), **said), reason)


def test_an_envelope_of_another_attempt_is_refused(mail, store, clock, sealed):
    before = sealed(mail.offer())
    again = Envelopes(FEDERATION, store, SIGNING, SECONDS, mail._device_keys, clock)
    again.offer()
    refused(again, before, "for keys")


def test_an_envelope_of_another_round_is_refused(mail, store, sealed):
    before = sealed(mail.offer())
    begin(store, 2)
    mail.offer()
    refused(mail, before, "for keys", number=2)
    refused(mail, before, "round 1 has no keys")


def test_an_envelope_for_other_keys_of_the_same_attempt_is_refused(mail, clock, sealed):
    keys = RoundKeys.new(FEDERATION.run, 1, 0, clock(), clock() + SECONDS)
    refused(mail, sealed(keys.signed(SIGNING)), "for keys")


@pytest.mark.parametrize("at", [40, -1])
def test_a_tampered_envelope_is_refused(mail, sealed, at):
    damaged = bytearray(sealed(mail.offer()))
    damaged[at] ^= 1
    refused(mail, bytes(damaged), "for base|not made with this device key")


def test_an_expired_envelope_is_refused(mail, clock, sealed):
    late = sealed(mail.offer())
    clock.now += SECONDS
    refused(mail, late, "expired 0 s ago")


def test_an_answer_in_no_envelope_is_refused(mail, store):
    refused(mail, honest(task_of(store)), "without an envelope; update ProxyMoE")
    refused(mail, b"", "not an envelope")


def test_nothing_is_opened_before_keys_went_out(devices):
    refused(devices.envelopes, b"", "round 1 has no keys")


def test_a_revoked_device_and_a_stranger_are_refused(mail, devices, sealed):
    del devices.public["a"]
    devices.public["stranger"] = devices.public["b"]
    refused(mail, sealed(mail.offer()), "not enrolled")
    refused(mail, sealed(mail.offer(), "b", device="stranger"), "not enrolled", name="stranger")


def test_the_same_again_is_the_same_and_another_envelope_is_a_conflict(mail, store, sealed):
    first, second = (sealed(mail.offer()) for _ in range(2))
    assert mail.opened(1, "a", first) == mail.opened(1, "a", first) == honest(task_of(store))
    refused(mail, second, "signed both for one place", error=Equivocation)
    assert mail.opened(1, "a", first) == honest(task_of(store))


# In a round


def test_replays_and_conflicts_are_told_apart_on_record_and_nothing_counts_twice(tmp_path):
    class Insistent(SealingDevices):
        def exchange(self, tasks):
            first = dict(filter(None, super().exchange(tasks)))
            another = self.sent(tasks["a"], other(tasks["a"]))
            yield from [("a", first["a"]), ("a", first["a"]), ("a", another), ("a", b"nonsense")]
            yield from first.items()

    engine, _, store = engine_of(tmp_path / "sealed", Insistent)
    assert torch.equal(engine.run().adapter, in_process(tmp_path / "plain").adapter)
    told = [e for e in audit.entries(store.database) if e.event in tuple(Receipt)]
    assert [entry.event for entry in told] == [Receipt.CONFLICT, Receipt.REFUSED] * 3
    assert "the device signed both for one place" in told[0].body["reason"]


def test_who_sealed_a_lie_is_not_asked_again_and_the_round_goes_on(tmp_path):
    lies = {"b": lambda task: honest(task, round=99)}
    engine, devices, store = engine_of(tmp_path, Asked, replace(RULES, quorum=0.5), answers=lies)
    engine.run()
    assert [sorted(store.updates(number)) for number in (1, 2, 3)] == [["a", "c"]] * 3
    assert devices.asked == [["a", "b", "c"]] * 3
