"""Whatever dies, and wherever: no committed round is lost, and no update counts twice."""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.errors import ConfigError
from proxymoe.server import audit
from proxymoe.server.aggregate import PlainSum
from proxymoe.server.engine import Receipt, RoundEngine, Rules
from proxymoe.server.journal import initial_state
from proxymoe.server.round import Answer, run_round
from proxymoe.server.store import Phase, RoundStore
from proxymoe.simulations.faults.cohort import InMemory, honest, plain, small_federation
from tests.clock import Clock
from tests.laws import tried

SIZE = small_federation().layout.size
RULES = Rules(quorum=1.0)


class Killed(BaseException):
    """Stands for a process that ended here: nothing after it runs, and nothing catches it."""


def engine_of(folder, federation, transport=None, rules=RULES, **arguments):
    clock = arguments.pop("clock", Clock())
    return RoundEngine(
        federation,
        RoundStore(folder, federation.run, federation.layout.size),
        transport or InMemory(),
        plain(federation),
        rules,
        clock=clock,
        pause=clock.wait,
        **arguments,
    )


def in_process(federation, rounds):
    state = initial_state(SIZE)
    for _ in range(rounds):
        state, _ = run_round(federation, state, InMemory(), PlainSum(federation.layout))
    return state


@pytest.mark.parametrize(
    "fields",
    [
        {"strategy": "fedavg", "momentum": 0.9},
        {"strategy": "fedadam", "momentum": 0.9},
        {"strategy": "fedavg", "cohort_size": 2, "server_final_rate": 0.5},
    ],
)
def test_the_engine_ends_in_the_bits_of_the_rounds_in_process(tmp_path, fields):
    federation = small_federation(**fields)
    found, expected = engine_of(tmp_path, federation).run(), in_process(federation, 4)
    assert found.round == expected.round == 4
    assert torch.equal(found.adapter, expected.adapter)
    assert torch.equal(found.strategy.variance, expected.strategy.variance)


@tried(25)
@given(st.lists(st.integers(1, 9), max_size=12))
def test_killed_after_any_phases_it_ends_in_the_same_bits(tmp_path_factory, lives):
    folder, federation = tmp_path_factory.mktemp("run"), small_federation(momentum=0.5)
    for phases in lives:
        count = iter(range(phases))

        def passed(_, count=count):
            if next(count, None) is None:
                raise Killed

        try:
            engine_of(folder, federation, passed=passed).run()
        except Killed:
            continue
    found = engine_of(folder, federation).run()
    assert torch.equal(found.adapter, in_process(federation, 4).adapter)
    store = RoundStore(folder, federation.run, SIZE)
    assert [r.phase for r in store.rounds()] == [Phase.COMMITTED] * 4
    assert [v.number for v in store.versions()] == [1, 2, 3, 4]
    list(audit.entries(store.database))


@pytest.mark.parametrize("answers_before", [0, 1, 2])
def test_killed_between_two_replies_only_the_missing_are_asked_again(tmp_path, answers_before):
    federation = small_federation(rounds=1)
    asked: list[set[str]] = []

    class Dying(InMemory):
        def exchange(self, tasks: Mapping[str, bytes]) -> Iterator[Answer]:
            asked.append(set(tasks))
            for number, answer in enumerate(super().exchange(tasks)):
                if len(asked) == 1 and number == answers_before:
                    raise Killed
                yield answer

    transport = Dying()
    with pytest.raises(Killed):
        engine_of(tmp_path, federation, transport).run()
    found = engine_of(tmp_path, federation, transport).run()
    assert [len(names) for names in asked] == [3, 3 - answers_before]
    assert torch.equal(found.adapter, in_process(federation, 1).adapter)


def test_an_update_whose_row_was_never_written_is_asked_for_again(tmp_path, monkeypatch):
    federation = small_federation(rounds=1)
    change = RoundStore.change

    def dies(self, time, event, **body):
        if event == "update" and body["device"] == "b":
            raise Killed
        return change(self, time, event, **body)

    monkeypatch.setattr(RoundStore, "change", dies)
    with pytest.raises(Killed):
        engine_of(tmp_path, federation).run()
    monkeypatch.undo()
    store = RoundStore(tmp_path, federation.run, SIZE)
    assert set(store.updates(1)) == {"a"}
    assert len(list((tmp_path / "updates" / "000001").iterdir())) == 2
    found = engine_of(tmp_path, federation).run()
    assert torch.equal(found.adapter, in_process(federation, 1).adapter)


def test_a_duplicate_is_acknowledged_a_conflict_refused_and_both_count_once(tmp_path):
    federation, receipts = small_federation(rounds=1), list[Receipt]()

    class Echo(InMemory):
        def exchange(self, tasks: Mapping[str, bytes]) -> Iterator[Answer]:
            good, later = honest(tasks["a"]), honest(tasks["a"], seconds=9.0)
            other = honest(tasks["a"], lambda update: -update)
            receipts.extend(
                engine.receive(now(), "a", content) for content in (good, good, later, other)
            )
            yield from super().exchange(tasks)

    engine = engine_of(tmp_path, federation, Echo())
    store = RoundStore(tmp_path, federation.run, SIZE)

    def now():
        return store.latest()

    found = engine.run()
    assert receipts == [Receipt.ACCEPTED, Receipt.DUPLICATE, Receipt.DUPLICATE, Receipt.CONFLICT]
    assert torch.equal(found.adapter, in_process(federation, 1).adapter)
    reasons = [e.body["reason"] for e in audit.entries(store.database) if e.event == "conflict"]
    assert reasons == ["another update than the one that was accepted"]


def test_a_late_reply_is_acknowledged_and_not_applied(tmp_path):
    federation = small_federation(rounds=2, cohort_size=2)
    late, receipts = dict[str, bytes](), list[Receipt]()

    class Late(InMemory):
        def exchange(self, tasks: Mapping[str, bytes]) -> Iterator[Answer]:
            for name, reply in late.items():
                receipts.append(engine.receive(store.latest(), name, reply))
            missed = sorted(tasks)[0]
            late[missed] = honest(tasks[missed])
            yield from InMemory(answers={missed: None}).exchange(tasks)
            yield None
            clock.wait(1e6)
            yield None

    clock = Clock()
    rules = Rules(quorum=0.5)
    engine = engine_of(tmp_path, federation, Late(), rules, clock=clock)
    store = RoundStore(tmp_path, federation.run, SIZE)
    engine.run()
    assert receipts == [Receipt.LATE]
    assert [len(store.updates(number)) for number in (1, 2)] == [1, 1]


def slow_grid(clock, delays):
    """A transport whose devices answer after so many seconds; None never."""

    class Slow(InMemory):
        def exchange(self, tasks: Mapping[str, bytes]) -> Iterator[Answer]:
            begin = clock.now
            for name, delay in sorted(delays.items(), key=lambda item: item[1] or math.inf):
                if name not in tasks:
                    continue
                while delay is None or clock.now < begin + delay:
                    clock.wait(1.0)
                    yield None
                yield name, honest(tasks[name])

    return Slow()


def test_stragglers_get_as_long_as_the_quorum_took(tmp_path):
    clock, federation = Clock(), small_federation(rounds=1)
    transport = slow_grid(clock, {"a": 5, "b": 10, "c": None})
    rules = Rules(quorum=0.6, patience=0.5)
    engine_of(tmp_path, federation, transport, rules, clock=clock).run()
    assert clock.now == 15.0
    store = RoundStore(tmp_path, federation.run, SIZE)
    assert set(store.updates(1)) == {"a", "b"}
    assert store.rounds()[0].phase is Phase.COMMITTED


def test_a_round_without_a_quorum_is_abandoned_at_the_deadline_and_the_model_stays(tmp_path):
    clock, federation = Clock(), small_federation(rounds=1)
    transport = slow_grid(clock, {"a": 5, "b": None, "c": None})
    rules = Rules(quorum=0.6, deadline_seconds=60.0)
    state = engine_of(tmp_path, federation, transport, rules, clock=clock).run()
    assert clock.now == 60.0
    (only,) = RoundStore(tmp_path, federation.run, SIZE).rounds()
    assert only.phase is Phase.ABANDONED
    assert only.reason == "1 updates of 3 devices, 2 needed"
    assert state.adapter.eq(0).all()


def test_a_round_is_not_waited_for_when_everybody_has_spoken(tmp_path):
    clock, federation = Clock(), small_federation(rounds=1)
    nan = {"b": lambda task: honest(task, lambda update: update * np.float32(np.nan))}
    engine_of(tmp_path, federation, InMemory(answers=nan), Rules(quorum=1.0), clock=clock).run()
    assert clock.now == 0.0
    (only,) = RoundStore(tmp_path, federation.run, SIZE).rounds()
    assert only.phase is Phase.ABANDONED


def test_a_bad_candidate_is_rolled_back_and_the_next_round_starts_from_before(tmp_path):
    losses = iter([1.0, math.nan, 9.0, 1.0])
    federation = small_federation(canary=lambda _: next(losses))
    engine_of(tmp_path, federation).run()
    store = RoundStore(tmp_path, federation.run, SIZE)
    ended = [(r.phase, r.version) for r in store.rounds()]
    back, done = Phase.ROLLED_BACK, Phase.COMMITTED
    assert ended == [(done, 0), (back, 1), (back, 1), (done, 1)]
    assert store.rounds()[2].reason == "canary 9.000, limit 2.000"
    assert [(v.version, v.parent, v.number) for v in store.versions()] == [(1, 0, 1), (2, 1, 4)]


def test_a_version_that_an_operator_rolls_back_to_is_where_the_next_round_starts(tmp_path):
    federation = small_federation(rounds=2)
    engine_of(tmp_path, federation).run()
    store = RoundStore(tmp_path, federation.run, SIZE)
    store.roll_back(1, 0.0)
    longer = small_federation(rounds=3)
    engine_of(tmp_path, longer).run()
    assert [(v.version, v.parent) for v in store.versions()] == [(1, 0), (2, 1), (3, 1)]


def test_too_few_devices_are_waited_for_and_no_round_is_wasted(tmp_path):
    clock, federation = Clock(), small_federation(rounds=1)

    class Arriving(InMemory):
        def devices(self) -> list[str]:
            return list("abc")[: int(clock.now // 60)]

    engine_of(tmp_path, federation, Arriving(), Rules(quorum=1.0), clock=clock).run()
    assert clock.now == 180.0
    (only,) = RoundStore(tmp_path, federation.run, SIZE).rounds()
    assert only.phase is Phase.COMMITTED


def test_over_selection_asks_more_devices_than_it_needs(tmp_path):
    federation = small_federation(rounds=1, cohort_size=2)
    rules = Rules(quorum=1.0, over_selection=1.5)
    engine_of(tmp_path, federation, InMemory(answers={"a": None}), rules).run()
    store = RoundStore(tmp_path, federation.run, SIZE)
    assert store.rounds()[0].cohort == ("a", "b", "c")
    assert store.rounds()[0].phase is Phase.COMMITTED


def test_vectors_of_a_round_that_is_over_are_deleted_and_digests_stay(tmp_path):
    federation = small_federation(rounds=3)
    engine_of(tmp_path, federation).run()
    store = RoundStore(tmp_path, federation.run, SIZE)
    assert list((tmp_path / "updates").iterdir()) == []
    assert all(len(store.updates(number)) == 3 for number in (1, 2, 3))


def test_checks_now_and_then_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"canary_every is 2; .* set it to 1"):
        engine_of(tmp_path, small_federation(canary_every=2))


@pytest.mark.parametrize("lost", [1, 2, 5])
def test_whose_answer_is_lost_is_asked_again_with_the_same_task(tmp_path, lost):
    clock, federation, sent = Clock(), small_federation(rounds=2), list[bytes]()

    class Lossy(InMemory):
        def exchange(self, tasks: Mapping[str, bytes]) -> Iterator[Answer]:
            for answer in super().exchange(tasks):
                if answer is not None and answer[0] == "b" and len(sent) < lost:
                    sent.append(tasks["b"])
                else:
                    yield answer

    rules = Rules(quorum=1.0, asking_seconds=7.0)
    found = engine_of(tmp_path, federation, Lossy(), rules, clock=clock).run()
    assert torch.equal(found.adapter, in_process(federation, 2).adapter)
    assert len(sent) == lost
    assert len(set(sent)) == 1
    assert clock.now == 7.0 * lost


def test_a_restarted_coordinator_asks_who_is_there_before_it_asks_again(tmp_path):
    federation = small_federation(rounds=1)

    class Unmet(InMemory):
        """Like a grid: only devices that were met can be reached."""

        met: tuple[str, ...] = ()

        def devices(self) -> list[str]:
            self.met = tuple(super().devices())
            return list(self.met)

        def exchange(self, tasks: Mapping[str, bytes]) -> Iterator[Answer]:
            reached = {name: task for name, task in tasks.items() if name in self.met}
            yield from super().exchange(reached)

    def dies(now):
        if now.phase is Phase.TRAINING:
            raise Killed

    with pytest.raises(Killed):
        engine_of(tmp_path, federation, Unmet(), passed=dies).run()
    clock = Clock()
    found = engine_of(tmp_path, federation, Unmet(), clock=clock).run()
    assert clock.now == 0.0
    assert torch.equal(found.adapter, in_process(federation, 1).adapter)


def test_who_never_answers_is_asked_until_the_deadline_and_not_after(tmp_path):
    clock, federation = Clock(), small_federation(rounds=1)
    rules = Rules(quorum=1.0, asking_seconds=25.0, deadline_seconds=60.0)
    engine_of(tmp_path, federation, InMemory(answers={"a": None}), rules, clock=clock).run()
    assert clock.now == 60.0
    (only,) = RoundStore(tmp_path, federation.run, SIZE).rounds()
    assert only.phase is Phase.ABANDONED


def test_a_duplicate_of_the_round_before_does_not_stand_for_an_answer(tmp_path):
    federation, before = small_federation(rounds=3), dict[str, bytes]()

    class Echo(InMemory):
        def exchange(self, tasks: Mapping[str, bytes]) -> Iterator[Answer]:
            yield from before.items()
            before.update({name: honest(task) for name, task in tasks.items()})
            yield from super().exchange(tasks)

    found = engine_of(tmp_path, federation, Echo()).run()
    assert torch.equal(found.adapter, in_process(federation, 3).adapter)
