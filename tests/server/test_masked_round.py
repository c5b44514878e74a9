"""A masked sum over letters: the plain sum of those who stayed, or none, and no update twice."""

import itertools
from dataclasses import replace

import pytest
import torch

from proxymoe.common.errors import ConfigError, PrivacySpent, ProtocolError, Unsummed
from proxymoe.common.messages import TrainReply, TrainTask, decode, encode
from proxymoe.common.privacy_settings import Noise
from proxymoe.common.secagg import Phase
from proxymoe.server import masked_round
from proxymoe.server.aggregate import PlainSum
from proxymoe.server.engine import RoundEngine, Rules
from proxymoe.server.journal import initial_state
from proxymoe.server.masked_round import MaskedRound, MaskRules
from proxymoe.server.round import tasks_of
from proxymoe.server.store import Phase as RoundPhase
from proxymoe.server.store import RoundStore
from proxymoe.simulations.faults.cohort import InMemory, honest, plain, small_federation, small_plan
from tests.clock import Clock
from tests.fleet import RULES, Fleet

FEDERATION = small_federation(masked=True)
NOTHING = torch.zeros(0)
ANNOUNCE, SHARE, UPLOAD, CONSENT, RELEASE = range(5)


@pytest.fixture
def fleet(tmp_path):
    fleet = Fleet(tmp_path, FEDERATION)
    fleet.train(FEDERATION)
    return fleet


def round_of(fleet, rules=RULES, names="abc", clock=None, **changes):
    clock, attempts = clock or Clock(), itertools.count()
    given = {"exchange": fleet.exchange_letters, "keys": fleet.keys, **changes}
    summation = MaskedRound(
        FEDERATION,
        1,
        rules,
        given["exchange"],
        given["keys"],
        lambda _: next(attempts),
        clock=clock,
        pause=clock.wait,
    )
    for name in names:
        summation.add(name, FEDERATION.members[name].layout, NOTHING, 1.0)
    return summation


def plainly(names="abc"):
    """The sum of the same updates in the clear."""
    summation = PlainSum(FEDERATION.layout)
    tasks = tasks_of(FEDERATION, initial_state(FEDERATION.layout.size), names)
    for name, task in tasks.items():
        update = torch.from_numpy(decode(honest(task))[1])
        summation.add(name, FEDERATION.members[name].layout, update, 1.0)
    return summation.sum()


def require_same(found, expected, atol=2e-4):
    """Equal, but for blocks that only one device holds."""
    assert found.num_devices == expected.num_devices
    known = expected.weight >= RULES.smallest_class
    assert torch.equal(found.weight, expected.weight * known)
    numbers = known.repeat_interleave(torch.tensor(FEDERATION.layout.sizes))
    assert torch.allclose(found.total, expected.total * numbers, atol=atol)


def test_the_sum_over_letters_is_the_plain_sum(fleet):
    require_same(round_of(fleet).sum(), plainly())


def test_blocks_that_few_hold_are_left_out(fleet):
    found = round_of(fleet, MaskRules(smallest_cohort=3, smallest_class=3)).sum()
    expected = plainly()
    held_by_all = expected.weight == 3
    assert torch.equal(found.weight, expected.weight * held_by_all)
    assert 0 < int(held_by_all.sum()) < len(held_by_all)


def test_who_is_away_from_the_beginning_is_missing_from_the_sum(fleet):
    without = {name: key for name, key in fleet.keys.items() if name != "c"}
    require_same(round_of(fleet, keys=without).sum(), plainly("ab"))


def test_who_has_lost_its_update_does_not_hold_the_others_up(fleet):
    fleet.restart("c")
    require_same(round_of(fleet).sum(), plainly("ab"))
    assert fleet.asked.count({"c"}) == 1, "asked once more, and not again"


@pytest.mark.parametrize("phase", range(5))
@pytest.mark.parametrize("lost", ["b", "abc"])
def test_answers_that_are_lost_are_asked_for_again(fleet, phase, lost):
    fleet.lost = [(phase, name) for name in lost]
    clock = Clock()
    require_same(round_of(fleet, clock=clock).sum(), plainly())
    assert not fleet.lost
    assert clock.pauses == [RULES.asking_seconds]


def test_after_a_consent_there_is_no_other_attempt(fleet):
    fleet.lost = [(CONSENT, "a")] * 99 + [(CONSENT, "b")] * 99
    with pytest.raises(Unsummed, match=r"attempt 0: 1 devices answered in the phase 'consent'"):
        round_of(fleet).sum()
    assert fleet.asked.count({"a", "b"}) == RULES.letter_seconds / RULES.asking_seconds
    with pytest.raises(Unsummed):  # not by another coordinator process either
        round_of(fleet).sum()


def test_an_update_goes_into_one_sum_only(fleet):
    summation = round_of(fleet)
    summation.sum()
    with pytest.raises(Unsummed, match="0 devices answered in the phase 'announce'"):
        summation.sum()


def test_attempts_are_as_many_as_are_allowed(fleet):
    for name in "abc":
        fleet.restart(name)
    clock = Clock()
    rules = MaskRules(2, 2, attempts=2, asking_seconds=7.0)
    with pytest.raises(Unsummed, match="attempt 1"):
        round_of(fleet, rules, clock=clock).sum()
    assert clock.pauses == [7.0]


def test_nobody_is_waited_for_beyond_the_deadline(fleet):
    def silent_c(letters):
        yield from fleet.exchange_letters({n: x for n, x in letters.items() if n != "c"})
        while True:
            yield None

    require_same(round_of(fleet, exchange=silent_c, clock=Clock(per_look=1.0)).sum(), plainly("ab"))


def test_letters_of_liars_are_not_counted(fleet):
    def with_nonsense(letters):
        yield "c", b"nonsense"
        yield "c", next(iter(letters.values()))
        yield from fleet.exchange_letters(letters)

    require_same(round_of(fleet, exchange=with_nonsense).sum(), plainly())


@pytest.mark.parametrize("names", ["a", ""])
def test_too_few_are_not_asked(fleet, names):
    with pytest.raises(Unsummed, match=f"{len(names)} devices, from 2"):
        round_of(fleet, names=names).sum()
    assert fleet.asked == []


def test_updates_and_weights_have_no_place_here(fleet):
    layout = FEDERATION.members["a"].layout
    summation = round_of(fleet, names="a")
    with pytest.raises(ConfigError, match="an update, or a weight"):
        summation.add("b", layout, torch.zeros(layout.size), 1.0)
    with pytest.raises(ConfigError, match="an update, or a weight"):
        summation.add("b", layout, NOTHING, 0.5)
    with pytest.raises(ProtocolError, match="second update"):
        summation.add("a", layout, NOTHING, 1.0)


# Within rounds

RUN = small_federation(
    {name: small_plan(0, 1) for name in "abcd"}, masked=True, strategy="fedavg", rounds=3
)


def engine_of(folder, fleet, transport=None, clock=None, **rules):
    store = RoundStore(folder, RUN.run, RUN.layout.size)

    def summation_of(number):
        def begin(names):
            return store.begin_attempt(number, names, 0.0)

        clock, letters = Clock(), fleet.exchange_letters
        masks = replace(RULES, letter_seconds=30.0)
        return MaskedRound(
            RUN, number, masks, letters, fleet.keys, begin, clock=clock, pause=clock.wait
        )

    clock, waits = clock or Clock(), Rules(**{"quorum": 1.0, **rules})
    return store, RoundEngine(
        RUN, store, transport or fleet, summation_of, waits, clock=clock, pause=clock.wait
    )


def test_rounds_under_masks_end_near_rounds_in_the_clear(tmp_path):
    openly = small_federation({n: m.plan for n, m in RUN.members.items()}, rounds=3)
    store = RoundStore(tmp_path / "plain", openly.run, openly.layout.size)
    expected = RoundEngine(openly, store, InMemory("abcd"), plain(openly), Rules()).run()
    _, engine = engine_of(tmp_path / "masked", Fleet(tmp_path, RUN))
    found = engine.run()
    assert float((found.adapter - expected.adapter).norm() / expected.adapter.norm()) < 1e-3
    assert not torch.equal(found.adapter, expected.adapter)


def test_a_coordinator_that_was_killed_asks_in_a_new_attempt(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(self, coordinator, questions):
        if coordinator.phase is Phase.UPLOAD:
            raise Killed
        ask(self, coordinator, questions)

    ask = masked_round.MaskedRound._gather
    fleet = Fleet(tmp_path, RUN)
    monkeypatch.setattr(masked_round.MaskedRound, "_gather", killed)
    _, engine = engine_of(tmp_path / "run", fleet)
    with pytest.raises(Killed):
        engine.run()
    monkeypatch.setattr(masked_round.MaskedRound, "_gather", ask)
    store, engine = engine_of(tmp_path / "run", fleet)
    engine.run()
    assert [found.phase for found in store.rounds()] == [RoundPhase.COMMITTED] * 3
    assert store.begin_attempt(1, [], 0.0) == 2, "two attempts before"
    assert store.begin_attempt(2, [], 0.0) == 1


def test_a_round_that_cannot_be_summed_is_abandoned_and_the_next_one_is_not(tmp_path):
    fleet = Fleet(tmp_path, RUN)
    fleet.lost = [(CONSENT, name) for name in "abcd"] * 4
    store, engine = engine_of(tmp_path / "run", fleet)
    engine.run()
    found = store.rounds()
    assert [each.phase for each in found] == [
        RoundPhase.ABANDONED,
        RoundPhase.COMMITTED,
        RoundPhase.COMMITTED,
    ]
    assert "masked sum, attempt 0: 0 devices answered in the phase 'consent'" in found[0].reason


def test_nobody_trains_if_no_block_of_the_cohort_could_be_summed(tmp_path):
    class Counting(Fleet):
        def exchange(self, tasks):
            raise AssertionError(f"{sorted(tasks)} were asked to train")

    clock = Clock()
    store, engine = engine_of(
        tmp_path / "run", Counting(tmp_path, RUN), clock=clock, smallest_class=5
    )
    engine.run()
    for found in store.rounds():
        assert found.phase is RoundPhase.ABANDONED
        assert found.cohort == tuple("abcd")
        assert found.reason is not None
        assert "nobody trained: " in found.reason
        assert "no block with 5 holders among 4 devices" in found.reason
        assert "extract.templates" in found.reason
    assert clock.pauses == [Rules().selecting_seconds] * 3, "rounds do not run out at once"


def test_rounds_tell_how_many_blocks_were_skipped(tmp_path):
    store, engine = engine_of(tmp_path / "run", Fleet(tmp_path, RUN))
    engine.run()
    of_experts_that_nobody_has = 2 * 2 * 2
    assert [found.skipped for found in store.rounds()] == [of_experts_that_nobody_has] * 3


def test_an_update_in_the_clear_is_refused_and_not_kept(tmp_path):
    fleet = Fleet(tmp_path, RUN)

    class Leaky(InMemory):
        def exchange(self, tasks):
            for name, reply in fleet.exchange(tasks):
                yield name, honest(tasks[name]) if name == "a" else reply

    store, engine = engine_of(tmp_path / "run", fleet, transport=Leaky("abcd"), quorum=0.75)
    engine.run()
    assert [found.phase for found in store.rounds()] == [RoundPhase.COMMITTED] * 3
    assert list(store.updates(1)) == ["b", "c", "d"]


def test_a_task_tells_that_its_update_waits():
    (task,) = tasks_of(RUN, initial_state(RUN.layout.size), "a").values()
    header, _ = decode(task)
    assert isinstance(header, TrainTask)
    assert header.masked
    in_the_clear, _ = decode(encode(header.model_copy(update={"masked": False})))
    assert not in_the_clear.model_dump()["masked"]
    assert isinstance(decode(honest(task))[0], TrainReply)


# Noise

Z = 0.5


def noisy(mode, z=Z, **changes):
    told = {"tolerated_dropouts": 1 / 3, "delta": 1e-5, "clip_steps": 20_000, **changes}
    noise = Noise.model_validate({"mode": mode, "noise_multiplier": z, **told})
    return replace(FEDERATION, noise=noise)


def with_noise(tmp_path, federation, spend=lambda *_: None):
    fleet = Fleet(tmp_path, federation)
    fleet.train(federation)
    clock = Clock()
    letters = fleet.exchange_letters
    found = MaskedRound(
        federation, 1, RULES, letters, fleet.keys, lambda _: 0, spend, clock, clock.wait
    )
    for name, member in federation.members.items():
        found.add(name, member.layout, NOTHING, 1.0)
    return found, fleet


def deviation(found, holders):
    """Of the noise in the sum of blocks that so many devices hold."""
    expected = plainly()
    mine = (expected.weight == holders).repeat_interleave(torch.tensor(FEDERATION.layout.sizes))
    return float((found.total - expected.total)[mine].std())


@pytest.mark.parametrize(
    ("mode", "factor"),
    # Shares are made so that the noise is whole with two of three, or with both of two.
    [("central", 1.0), ("distributed", (3 / 2) ** 0.5), ("local", 3**0.5)],
)
def test_the_sum_has_the_noise_that_was_told(tmp_path, mode, factor):
    summation, _ = with_noise(tmp_path, noisy(mode))
    assert f"{mode} noise of 0.5 C" in summation.notice
    found = summation.sum()
    known = plainly().weight >= RULES.smallest_class
    assert torch.equal(found.weight, plainly().weight * known)
    clip_norm = FEDERATION.settings.clip_norm
    assert deviation(found, 3) == pytest.approx(Z * clip_norm * factor, rel=0.4)
    unknown = (~known).repeat_interleave(torch.tensor(FEDERATION.layout.sizes))
    assert not found.total[unknown].any()


def test_with_little_noise_the_sum_is_the_plain_sum(tmp_path):
    federation = noisy("distributed", z=1e-3)
    require_same(with_noise(tmp_path, federation)[0].sum(), plainly(), atol=2e-2)


def test_what_a_sum_costs_is_on_record_before_it_is_read(tmp_path):
    spent = []
    summation, fleet = with_noise(tmp_path, noisy("distributed"), lambda *told: spent.append(told))
    fleet.restart("c")
    summation.sum()
    assert spent == [(0, ["a", "b"])]


def test_a_sum_that_would_cost_too_much_is_not_read(tmp_path):
    def spend(*_):
        raise PrivacySpent("no more")

    summation, _ = with_noise(tmp_path, noisy("distributed"), spend)
    with pytest.raises(PrivacySpent):
        summation.sum()
    federation = replace(RUN, noise=noisy("distributed").noise)
    (tmp_path / "more").mkdir()
    fleet = Fleet(tmp_path / "more", federation)
    store = RoundStore(tmp_path / "run", federation.run, federation.layout.size)

    def summation_of(number):
        clock, letters = Clock(), fleet.exchange_letters
        return MaskedRound(
            federation, number, RULES, letters, fleet.keys, lambda _: 0, spend, clock, clock.wait
        )

    RoundEngine(federation, store, fleet, summation_of, Rules()).run()
    assert {found.phase for found in store.rounds()} == {RoundPhase.ABANDONED}
    assert store.rounds()[0].reason == "no more"


def test_devices_do_not_upload_where_too_little_noise_could_be_left(tmp_path):
    federation = replace(RUN, noise=noisy("distributed", tolerated_dropouts=0.0).noise)
    fleet = Fleet(tmp_path, federation)
    fleet.train(federation)
    clock, attempts = Clock(), itertools.count()
    summation = MaskedRound(
        federation,
        1,
        replace(RULES, attempts=1),
        fleet.exchange_letters,
        fleet.keys,
        lambda _: next(attempts),
        clock=clock,
        pause=clock.wait,
    )
    for name, member in federation.members.items():
        summation.add(name, member.layout, NOTHING, 1.0)
    with pytest.raises(Unsummed, match="0 devices answered in the phase 'upload'"):
        summation.sum()
