"""What a device sealed for this attempt is opened and counts once; anything else is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.errors import Equivocation, ProtocolError
from proxymoe.common.round_keys import RoundKeys, verify_offer
from proxymoe.server import audit
from proxymoe.server.engine import Receipt, RoundEngine, Rules
from proxymoe.server.round import tasks_of
from proxymoe.server.store import Phase, RoundStore
from proxymoe.simulations.faults.cohort import InMemory, honest, plain, small_federation
from proxymoe.simulations.faults.law import other
from tests import clock as monotonic
from tests.laws import tried
from tests.sealed import COORDINATOR, PUBLIC, SIGNING, Clock, Sealed, envelope, opener

FEDERATION = small_federation(rounds=3, momentum=0.5)
SIZE = FEDERATION.layout.size
RULES = Rules(quorum=1.0)


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
def mail(store, clock):
    """The coordinator's side of round 1, after its keys went out."""
    mail = opener(FEDERATION, store, clock)
    mail.offer()
    return mail


def store_of(folder):
    return RoundStore(folder, FEDERATION.run, SIZE)


def begin(store, number):
    store.begin(number, 0.0)
    store.enter(number, Phase.DISTRIBUTING, 0.0, cohort=["a", "b", "c"])


def task(store, name="a", number=1):
    return tasks_of(FEDERATION, store.state(number, 0), [name])[name]


def engine_of(folder, clock=None, transport=None, **arguments):
    """An engine and a transport to sealing devices, in a new process as it were."""
    store, clock = store_of(folder), clock or Clock()
    mail, seconds = opener(FEDERATION, store, clock), monotonic.Clock()
    devices = transport or Sealed(mail, clock)
    devices.opener = mail
    given = {"passed": mail.passed, "opened": mail.opened, **arguments}
    sums, times = plain(FEDERATION), {"clock": seconds, "pause": seconds.wait}
    return RoundEngine(FEDERATION, store, devices, sums, RULES, **times, **given), devices, store


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
        engine, devices, _ = engine_of(folder / "sealed")

        def passed(now, count=count, mail=devices.opener):
            mail.passed(now)
            if next(count, None) is None:
                raise Killed

        engine._passed = passed
        try:
            engine.run()
        except Killed:
            continue
    engine, _, store = engine_of(folder / "sealed")
    assert torch.equal(engine.run().adapter, in_process(folder / "plain").adapter)
    assert [found.phase for found in store.rounds()] == [Phase.COMMITTED] * 3


def test_a_coordinator_killed_in_a_round_goes_on_in_a_new_attempt_with_who_is_missing(tmp_path):
    class Dying(Sealed):
        def exchange(self, tasks):
            for count, answer in enumerate(super().exchange(tasks)):
                if len(self.asked) == 1 and count == 1:
                    raise Killed
                yield answer

    clock = Clock()
    devices = Dying(None, clock)
    engine, _, _ = engine_of(tmp_path / "sealed", clock, devices)
    with pytest.raises(Killed):
        engine.run()
    engine, devices, store = engine_of(tmp_path / "sealed", clock, devices)
    found = engine.run()
    assert devices.asked[:2] == [["a", "b", "c"], ["b", "c"]]
    attempts = [e.body["attempt"] for e in audit.entries(store.database) if e.event == "attempt"]
    assert attempts == [0, 1, 0, 0]
    assert torch.equal(found.adapter, in_process(tmp_path / "plain").adapter)


def test_round_keys_are_one_for_all_who_are_asked_in_a_round_and_new_in_the_next(store, clock):
    mail = opener(FEDERATION, store, clock)
    first = mail.offer()
    assert mail.offer() == first
    begin(store, 2)
    second = mail.offer()
    found = [
        verify_offer(signed, COORDINATOR, clock(), run=FEDERATION.run, number=number)
        for number, signed in ((1, first), (2, second))
    ]
    assert [(offer.round, offer.attempt) for offer in found] == [(1, 0), (2, 0)]
    assert found[0].digest != found[1].digest


def test_round_keys_that_have_expired_make_room_for_a_new_attempt(mail, store, clock):
    first = mail.offer()
    clock.now += 601
    signed = mail.offer()
    assert signed != first
    offer = verify_offer(signed, COORDINATOR, clock(), run=FEDERATION.run, number=1)
    assert offer.attempt == 1
    assert mail.opened(1, "a", envelope(task(store), signed, clock)) == honest(task(store))


def test_round_keys_are_never_on_disk_and_gone_when_nothing_is_collected(tmp_path):
    seen = {}

    def passed(now):
        if devices.opener._keys is not None:
            private = devices.opener._keys._private[1].private_bytes_raw()
            files = [path for path in tmp_path.rglob("*") if path.is_file()]
            assert files
            assert not any(private in path.read_bytes() for path in files)
            seen[now.phase] = devices.opener._keys
        devices.opener.passed(now)

    engine, devices, _ = engine_of(tmp_path, passed=passed)
    engine.run()
    assert Phase.COLLECTING in seen
    assert devices.opener._keys is None
    assert all(keys._private == {} for keys in seen.values())


@pytest.mark.parametrize("end", [Phase.AGGREGATED, Phase.ABANDONED])
def test_what_was_sealed_in_a_round_stays_closed_when_it_is_collected(mail, store, clock, end):
    late = envelope(task(store), mail.offer(), clock)
    store.enter(1, end, 0.0)
    mail.passed(store.latest())
    refused(mail, late, "round 1 has no keys")


# Refusals


def test_an_envelope_is_of_who_it_is_said_to_be_from(mail, store, clock):
    of_b = envelope(task(store, "b"), mail.offer(), clock)
    refused(mail, of_b, "for device b, and here is a")
    forged = envelope(task(store), mail.offer(), clock, signed_by="b")
    refused(mail, forged, "not made with this device key")


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
def test_an_envelope_for_something_else_is_refused(mail, store, clock, said, reason):
    refused(mail, envelope(task(store), mail.offer(), clock, **said), reason)


def test_an_envelope_of_another_attempt_is_refused(mail, store, clock):
    before = envelope(task(store), mail.offer(), clock)
    again = opener(FEDERATION, store, clock)
    again.offer()
    refused(again, before, "for keys")


def test_an_envelope_of_another_round_is_refused(mail, store, clock):
    before = envelope(task(store), mail.offer(), clock)
    begin(store, 2)
    mail.offer()
    refused(mail, before, "for keys", number=2)
    refused(mail, before, "round 1 has no keys", number=1)


def test_an_envelope_for_keys_of_somebody_else_is_refused(mail, store, clock):
    keys = RoundKeys.new(FEDERATION.run, 1, 0, clock(), clock() + 600)
    refused(mail, envelope(task(store), keys.signed(SIGNING), clock), "for keys")


@pytest.mark.parametrize("at", [10, -1])
def test_a_tampered_envelope_is_refused(mail, store, clock, at):
    damaged = bytearray(envelope(task(store), mail.offer(), clock))
    damaged[at] ^= 1
    refused(mail, bytes(damaged), "envelope: header|not made with this device key")


def test_an_expired_envelope_is_refused(mail, store, clock):
    late = envelope(task(store), mail.offer(), clock)
    clock.now += 600
    refused(mail, late, "expired 0 s ago")


def test_an_answer_in_no_envelope_is_refused(mail, store):
    refused(mail, honest(task(store)), "without an envelope; update ProxyMoE")
    refused(mail, b"", "not an envelope")


def test_nothing_is_opened_before_keys_went_out(store, clock):
    refused(opener(FEDERATION, store, clock), b"", "round 1 has no keys")


def test_a_revoked_device_and_a_stranger_are_refused(store, clock):
    mail = opener(FEDERATION, store, clock, {n: PUBLIC[n] for n in "bd"})
    signed = mail.offer()
    refused(mail, envelope(task(store), signed, clock), "not enrolled")
    refused(mail, envelope(task(store), signed, clock, device="d"), "not enrolled", name="d")


def test_the_same_again_is_the_same_and_another_envelope_is_a_conflict(mail, store, clock):
    first, second = (envelope(task(store), mail.offer(), clock) for _ in range(2))
    assert mail.opened(1, "a", first) == mail.opened(1, "a", first) == honest(task(store))
    refused(mail, second, "signed both for one place", error=Equivocation)
    assert mail.opened(1, "a", first) == honest(task(store))


# In a round


def test_receipts_tell_replays_from_conflicts_and_both_count_once(tmp_path):
    clock = Clock()

    class Insistent(Sealed):
        def exchange(self, tasks):
            signed = self.opener.offer()
            found = dict(super().exchange(tasks))
            another = envelope(tasks["a"], signed, clock, other(tasks["a"]))
            yield from [("a", found["a"]), ("a", found["a"]), ("a", another), ("a", b"nonsense")]
            yield from found.items()

    receipts = []
    engine, _, store = engine_of(tmp_path / "sealed", clock, Insistent(None, clock))
    receive = engine.receive
    engine.receive = lambda *reply: receipts.append(receive(*reply)) or receipts[-1]  # type: ignore[method-assign]
    found = engine.run()
    expected = ["accepted", "duplicate", "conflict", "refused", "duplicate", *["accepted"] * 2]
    assert receipts == [Receipt(receipt) for receipt in expected] * 3
    assert torch.equal(found.adapter, in_process(tmp_path / "plain").adapter)
    (entry, *_) = (e for e in audit.entries(store.database) if e.event == "conflict")
    assert "the device signed both for one place" in entry.body["reason"]


def test_a_refusal_in_an_envelope_is_one(tmp_path):
    lies = {"b": lambda task: honest(task, round=99)}
    clock = Clock()
    engine, devices, store = engine_of(
        tmp_path, clock, Sealed(None, clock, answers=lies), passed=lambda _: None
    )
    engine._rules = replace(RULES, quorum=0.5)
    engine.run()
    assert [sorted(store.updates(n)) for n in (1, 2, 3)] == [["a", "c"]] * 3
    assert devices.asked == [["a", "b", "c"]] * 3
