"""One round: good updates count, bad ones are refused, a bad candidate is rolled back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.errors import ProtocolError
from proxymoe.common.messages import Refusal, TrainTask, decode, encode
from proxymoe.server.aggregate import PlainSum
from proxymoe.server.journal import initial_state
from proxymoe.server.round import NORM_SLACK, run_round
from proxymoe.server.schedule import sample_cohort, server_rate, task_seed
from proxymoe.simulations.faults.cohort import (
    InMemory,
    honest,
    small_federation,
    small_layout,
    small_plan,
)
from tests.tiny import assert_near


def one_round(federation, transport, state=None):
    state = state or initial_state(federation.layout.size)
    return run_round(federation, state, transport, PlainSum(federation.layout))


def refuse(content, reason="data"):
    task, _ = decode(content)
    address = task.model_dump(include={"run", "round", "device", "base", "plan", "layout"})
    return encode(Refusal(**address, reason=reason))


def with_value(value):
    def change(update):
        changed = update.copy()
        changed[-1] = value
        return changed

    return lambda task: honest(task, change)


def scaled(factor):
    return lambda task: honest(task, lambda update: update * np.float32(factor))


FAULTS = {
    "not a number": (with_value(np.nan), r"update of norm nan, the limit is 1\.0"),
    "infinite": (with_value(np.inf), r"update of norm inf"),
    "overflowing when squared": (with_value(1e38), r"update of norm 1e\+38"),
    "too long": (scaled(1.01 * NORM_SLACK), r"update of norm .*, the limit is 1\.0"),
    "another round": (lambda t: honest(t, round=9), "another run, round, base model or plan"),
    "another run": (lambda t: honest(t, run="old"), "another run, round, base model or plan"),
    "another device": (lambda t: honest(t, device="a"), "another run, round"),
    "another base": (lambda t: honest(t, base="cd" * 32), "another run, round, base model"),
    "another plan": (lambda t: honest(t, plan="cd" * 32), "another run, round, base model or plan"),
    "another layout": (lambda t: honest(t, layout="cd" * 32), "another run, round"),
    "a number missing": (
        lambda t: honest(t, lambda u: u[:-1]),
        r"update of \d+ numbers, expected \d+",
    ),
    "a number more": (lambda t: honest(t, lambda u: np.append(u, u[:1])), r"vector of \d+ bytes"),
    "no vector": (lambda t: honest(t, lambda u: u[:0]), "update of 0 numbers"),
    "half a message": (lambda t: honest(t)[:40], "does not fit the message"),
    "no message": (lambda _: b"\x00" * 99, "not a ProxyMoE message"),
    "nothing": (lambda _: b"", "not a ProxyMoE message"),
    "the task itself": (lambda t: t, "a 'train' message is no reply"),
    "a refusal": (refuse, "the device refused: data"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_update_is_refused_with_a_reason_and_the_others_count(fault):
    answer, reason = FAULTS[fault]
    federation = small_federation()
    state, report = one_round(federation, InMemory(answers={"b": answer}))
    without, expected = one_round(federation, InMemory(answers={"b": None}))
    assert torch.equal(state.adapter, without.adapter)
    assert report.num_updates == expected.num_updates == 2
    assert set(report.norms) == set(report.losses) == {"a", "c"}
    assert list(report.refused) == ["b"]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.refused["b"])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_round_of_bad_updates_only_raises_and_names_the_reasons(fault):
    answer, _ = FAULTS[fault]
    federation = small_federation(plans={"x": small_plan(0, 1)})
    state = initial_state(federation.layout.size)
    with pytest.raises(ProtocolError, match=r"round 1: no usable update of 1 devices: {'x': "):
        one_round(federation, InMemory("x", {"x": answer}), state)
    assert state.round == 0
    assert state.adapter.eq(0).all()


def test_a_round_without_any_answer_raises():
    federation = small_federation()
    with pytest.raises(ProtocolError, match=r"no usable update of 3 devices: {}"):
        one_round(federation, InMemory(answers=dict.fromkeys("abc")))
    with pytest.raises(ProtocolError, match="no usable update of 0 devices"):
        one_round(federation, InMemory(""))


def test_a_second_reply_of_a_device_is_refused_and_its_first_counts():
    def again(tasks):
        return [("b", honest(tasks["b"], lambda update: -update))]

    federation = small_federation()
    state, report = one_round(federation, InMemory(extra=again))
    expected, _ = one_round(federation, InMemory())
    assert torch.equal(state.adapter, expected.adapter)
    assert report.num_updates == 3
    assert "the device has answered before" in report.refused["b"]


def test_a_reply_of_a_device_that_was_not_asked_is_refused():
    def stranger(tasks):
        return [("mallory", honest(tasks["a"], device="mallory"))]

    federation = small_federation()
    state, report = one_round(federation, InMemory(extra=stranger))
    expected, _ = one_round(federation, InMemory())
    assert torch.equal(state.adapter, expected.adapter)
    assert "not asked" in report.refused["mallory"]


def test_a_member_that_was_not_drawn_for_this_round_is_refused():
    federation = small_federation(cohort_size=2)
    (absent,) = set("abc") - set(sample_cohort(list("abc"), 2, federation.seed, 1))

    def late(tasks):
        content = next(iter(tasks.values()))
        return [(absent, honest(content, device=absent))]

    _, report = one_round(federation, InMemory(extra=late))
    assert report.num_updates == 2
    assert "not asked" in report.refused[absent]


def test_devices_that_the_server_does_not_know_get_no_task():
    asked = []

    class Watched(InMemory):
        def exchange(self, tasks):
            asked.extend(tasks)
            return super().exchange(tasks)

    one_round(small_federation(), Watched("axbyc"))
    assert sorted(asked) == ["a", "b", "c"]


def test_the_result_does_not_depend_on_who_answers_first():
    federation = small_federation()
    states = [one_round(federation, InMemory(order))[0] for order in ("abc", "cab", "bca")]
    assert all(torch.equal(state.adapter, states[0].adapter) for state in states)


def test_fedavg_with_rate_one_and_one_device_returns_its_update_exactly():
    plan = small_plan(0, 3)
    federation = small_federation({"x": plan}, server_learning_rate=1.0)
    sent = []

    def answer(task):
        sent.append(honest(task))
        return sent[-1]

    state, report = one_round(federation, InMemory("x", {"x": answer}))
    layout = federation.layout.held_under(plan)
    _, update = decode(sent[0])
    assert torch.equal(layout.take_from(federation.layout, state.adapter), torch.from_numpy(update))
    assert report.committed


def test_what_nobody_holds_stays_bit_identical_and_is_counted():
    plans = {"a": small_plan(0, 1), "b": small_plan(1)}
    federation = small_federation(plans)
    start = initial_state(federation.layout.size)
    noise = torch.randn(federation.layout.size, generator=torch.Generator().manual_seed(1))
    start = type(start)(0, noise, start.strategy)
    state, report = one_round(federation, InMemory("ab"), start)
    before, after = (federation.layout.trained_factors(v) for v in (noise, state.adapter))
    for block, old, new in zip(federation.layout.blocks, before, after, strict=True):
        assert torch.equal(old, new) == (block.expert in (2, 3))
    assert report.skipped_blocks == 2 * 2 * 2


def test_each_device_is_sent_its_own_part_of_the_adapter_and_its_own_seed():
    federation = small_federation()
    size = federation.layout.size
    state = type(initial_state(size))(2, torch.arange(float(size)), initial_state(size).strategy)
    tasks = {}

    class Watched(InMemory):
        def exchange(self, sent):
            tasks.update(sent)
            return super().exchange(sent)

    one_round(federation, Watched(), state)
    seeds = set()
    for name, member in federation.members.items():
        task, vector = decode(tasks[name])
        assert isinstance(task, TrainTask)
        assert (task.round, task.device, task.plan) == (3, name, member.plan.digest)
        assert torch.equal(
            torch.from_numpy(vector), member.layout.take_from(federation.layout, state.adapter)
        )
        seeds.add(task.seed)
    assert len(seeds) == 3


@pytest.mark.parametrize("loss", [2.01, float("inf"), float("nan"), -float("inf")])
def test_a_candidate_that_fails_the_canary_is_rolled_back_but_the_round_counts(loss):
    federation = small_federation(momentum=0.5)
    state, _ = one_round(federation, InMemory())
    bad = small_federation(canary=lambda _: loss, momentum=0.5)
    after, report = one_round(bad, InMemory(), state)
    assert not report.committed
    assert (after.round, report.round) == (2, 2)
    assert torch.equal(after.adapter, state.adapter)
    assert torch.equal(after.strategy.momentum, state.strategy.momentum)


def test_the_canary_judges_the_candidate_and_not_the_old_adapter():
    seen = []

    def canary(vector):
        seen.append(vector)
        return 1.0

    federation = small_federation(canary=canary)
    state, report = one_round(federation, InMemory())
    assert torch.equal(seen[0], state.adapter)
    assert seen[0].abs().max() > 0
    assert report.canary_loss == 1.0


def test_the_report_says_what_was_sent_and_clipped():
    federation = small_federation(clip_norm=0.01)
    _, report = one_round(federation, InMemory(answers={"b": refuse}))
    sizes = {name: 4 * member.layout.size for name, member in federation.members.items()}
    assert report.clipped == 2
    assert report.uplink_bytes > sizes["a"] + sizes["c"]
    assert report.downlink_bytes > sum(sizes.values())
    assert report.losses == {"a": (2.0, 1.0), "c": (2.0, 1.0)}


@given(st.integers(0, 2**31), st.integers(1, 1000), st.text(max_size=20))
def test_seeds_belong_to_run_round_and_device(seed, number, device):
    own = task_seed(seed, number, device)
    assert own == task_seed(seed, number, device)
    others = {task_seed(seed + 1, number, device), task_seed(seed, number + 1, device)}
    assert own not in others


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 5))
def test_cohorts_are_of_the_asked_size_and_use_devices_equally_often(count, size, seed):
    names = [f"device{i}" for i in range(count)]
    rounds = [sample_cohort(names, size, seed, number) for number in range(1, 3 * count + 1)]
    assert all(len(set(cohort)) == len(cohort) == min(size, count) for cohort in rounds)
    assert rounds == [sample_cohort(names, size, seed, n) for n in range(1, 3 * count + 1)]
    used = [sum(name in cohort for cohort in rounds) for name in names]
    assert max(used) - min(used) == 0


def test_without_a_size_everybody_is_asked():
    assert sample_cohort(["b", "a"], None, 0, 7) == ["a", "b"]


def test_learning_rates_warm_up_and_decay_over_the_rounds():
    settings = small_federation(
        rounds=5, server_warmup_rounds=1, server_final_rate=0.5, final_rate=0.2
    ).settings
    rates = [server_rate(settings, number) for number in (1, 2, 3, 4, 5, 6)]
    assert_near(torch.tensor(rates), torch.tensor([0.5, 0.875, 0.75, 0.625, 0.5, 0.5]))
    federation = small_federation(rounds=5, final_rate=0.2)
    sent = []

    class Watched(InMemory):
        def exchange(self, tasks):
            task, _ = decode(tasks["a"])
            assert isinstance(task, TrainTask)
            sent.append(task.train.learning_rate)
            return super().exchange(tasks)

    state = initial_state(federation.layout.size)
    for _ in range(5):
        state, _ = one_round(federation, Watched(), state)
    expected = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2]) * federation.train.learning_rate
    assert_near(torch.tensor(sent), expected)


def test_the_small_layout_is_what_these_tests_think():
    assert len(small_layout().blocks) == 2 * (1 + 2 * 4)


def test_a_failed_check_undoes_every_round_since_the_last_one_that_passed():
    losses = iter([1.0, 99.0])
    federation = small_federation(canary=lambda _: next(losses), canary_every=2, momentum=0.5)
    states, reports = [], []
    state = None
    for _ in range(4):
        state, report = one_round(federation, InMemory(), state)
        states.append(state)
        reports.append(report)
    assert [report.canary_loss for report in reports] == [None, 1.0, None, 99.0]
    assert [report.committed for report in reports] == [True, True, True, False]
    assert not torch.equal(states[2].adapter, states[1].adapter)
    assert states[3].round == 4
    assert torch.equal(states[3].adapter, states[1].adapter)
    assert torch.equal(states[3].strategy.momentum, states[1].strategy.momentum)


def test_the_last_round_is_always_checked():
    federation = small_federation(canary_every=3, rounds=1)
    _, report = one_round(federation, InMemory())
    assert report.canary_loss == 1.0
