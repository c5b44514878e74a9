"""Masked sums equal plain sums or are refused; no order of letters gives one device away."""

import itertools
from collections import Counter
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from proxymoe.common.contribution import Contribution, Limits
from proxymoe.common.directory import PinnedKeys, signer
from proxymoe.common.errors import ProtocolError
from proxymoe.common.fixed_point import MIN_LEVELS, FixedPoint
from proxymoe.common.identity import new_device_key, public_key
from proxymoe.common.letters import (
    MAX_DEVICES,
    Consent,
    Proof,
    Survivors,
    Vote,
    encode,
    header_of,
    statement,
)
from proxymoe.common.masking import Device
from proxymoe.common.secagg import TURNS, Phase, Terms, Threshold, continued, parse_terms
from proxymoe.common.unmasking import Coordinator
from proxymoe.simulations.secure import aggregate
from tests.laws import tried
from tests.masked import (
    KEYS,
    LIMITS,
    NAMES,
    PHASES,
    Attempt,
    contribution_to,
    device_in,
    flat,
    holds,
    read,
    small_terms,
)

few = tried(15)
groups = st.lists(st.frozensets(st.integers(0, 5), min_size=2), min_size=1, max_size=4, unique=True)


def test_the_masked_sum_is_the_plain_sum():
    attempt = Attempt(small_terms(holders=[range(5), [0, 2, 3], [1, 2, 3, 4]])).finish()
    assert attempt.coordinator.result.survivors == NAMES[:5]
    assert not attempt.coordinator.result.masked
    holds(attempt)


@few
@given(groups, st.lists(st.tuples(st.sampled_from(PHASES), st.sampled_from(NAMES[:6])), max_size=5))
def test_it_is_so_for_any_dropouts_or_the_attempt_is_refused(holders, losses):
    """Whoever is lost in a phase is not asked again; below the threshold nothing comes out."""
    attempt = Attempt(small_terms(6, holders, threshold=Threshold.TWO_THIRDS))
    gone = {name: PHASES.index(phase) for phase, name in reversed(losses)}
    counts = [6 - sum(when <= at for when in gone.values()) for at in range(5)]
    try:
        attempt.finish(lambda phase, name: gone.get(name, 9) <= PHASES.index(phase))
    except ProtocolError:
        roster = frozenset(i for i, n in enumerate(NAMES[:6]) if gone.get(n, 9) > 0)
        left = frozenset(i for i, n in enumerate(NAMES[:6]) if gone.get(n, 9) > 2)
        least = 2 * counts[0] // 3 + 1
        enough = min(counts[1:]) >= max(2, least)
        assert not enough or not attempt.terms.live(roster, left)
        with pytest.raises(AssertionError):
            _ = attempt.coordinator.result
    else:
        assert min(counts) >= 2 * counts[0] // 3 + 1
        holds(attempt)


@pytest.mark.parametrize("threshold", list(Threshold))
def test_every_threshold_counts_exactly(threshold):
    least = threshold.of(6)
    terms = small_terms(6, threshold=threshold)
    lost = set(NAMES[least:6])
    limits = Limits(2, 2, majority_is_enough=True)
    attempt = Attempt(terms, limits=limits).finish(
        lambda phase, name: phase is Phase.UPLOAD and name in lost
    )
    assert attempt.coordinator.result.survivors == NAMES[:least]
    holds(attempt)
    lost.add(NAMES[0])
    with pytest.raises(ProtocolError, match=f"{least - 1} devices answered in the phase 'upload'"):
        Attempt(terms, limits=limits).finish(
            lambda phase, name: phase is Phase.UPLOAD and name in lost
        )


def test_a_small_class_stays_masked_while_others_proceed():
    terms = small_terms(6, [range(6), [0, 1, 2]], smallest_class=3)
    attempt = Attempt(terms).finish(lambda phase, name: (phase, name) == (Phase.UPLOAD, NAMES[1]))
    result = attempt.coordinator.result
    assert [found.number for found in result.sums] == [0]
    assert result.masked == {1: "too few of its holders are left"}
    holds(attempt)


def test_nobody_releases_seeds_of_a_class_that_stays_masked():
    terms = small_terms(6, [range(6), [0, 1, 2]], smallest_class=3)
    attempt = Attempt(terms).ask(
        Phase.RELEASE, lambda phase, name: (phase, name) == (Phase.UPLOAD, NAMES[1])
    )
    attempt.reply()
    live = terms.live(range(6), [0, 2, 3, 4, 5])
    assert live == (0,)
    for name, step in attempt.answers.items():
        due = terms.due(live, range(6), frozenset([0, 2, 3, 4, 5]), NAMES.index(name))
        assert Counter(number for _, number in due) == {0: 5, None: 1}
        assert len(read(step.reply).body) == 33 * len(due)


def test_nobody_releases_a_key_that_unmasks_nothing():
    """Device 3 is in class 1 only, which stays masked without it."""
    terms = small_terms(6, [[0, 1, 2, 4, 5], [1, 2, 3]], smallest_class=3)
    attempt = Attempt(terms).ask(Phase.RELEASE, lambda p, n: (p, n) == (Phase.UPLOAD, NAMES[3]))
    attempt.reply()
    for step in attempt.answers.values():
        assert len(read(step.reply).body) == 33 * 5
    result = attempt.finish().coordinator.result
    assert (len(result.sums), list(result.masked)) == (1, [1])
    holds(attempt)


def test_the_narrowest_words_serve_the_largest_cohort():
    assert FixedPoint(24, MAX_DEVICES, 1.0).levels >= MIN_LEVELS


def test_an_upload_that_comes_late_is_not_in_the_sum_and_stays_masked():
    attempt = Attempt(small_terms(6)).ask(Phase.UPLOAD).reply()
    late = attempt.answers.pop(NAMES[3]).reply
    attempt.collect()
    attempt.questions, attempt.answers = attempt.coordinator.close(), {}
    with pytest.raises(ProtocolError, match="Upload in the phase 'consent'"):
        attempt.coordinator.receive(late)
    attempt.finish()
    assert NAMES[3] not in attempt.coordinator.result.survivors
    holds(attempt)


def test_weights_are_summed_under_the_masks():
    terms = small_terms(3, threshold=Threshold.MAJORITY)
    limits = Limits(2, 2, majority_is_enough=True)
    given = [contribution_to(terms, i, weight=w) for i, w in enumerate((1.0, 0.5, 0.25))]
    devices = {n: device_in(terms, i, given[i], limits=limits) for i, n in enumerate(terms.devices)}
    coordinator = Coordinator(terms, KEYS)
    aggregate(coordinator, devices)
    (found,) = coordinator.result.sums
    assert found.weights == pytest.approx([1.75, 1.75], abs=1e-5)
    expected = sum(
        float(g.weights[0]) * flat(g.sizes, g.vector, (0, 1)).astype(np.float64) for g in given
    )
    assert np.concatenate(found.values) == pytest.approx(expected, abs=3 * terms.encoding.step)


def test_it_works_with_the_identities_of_real_devices():
    terms = small_terms(4)
    keys = {name: new_device_key() for name in terms.devices}
    directory = PinnedKeys({name: public_key(key) for name, key in keys.items()})
    devices = {
        name: Device(
            name,
            signer(keys[name]),
            directory,
            terms,
            LIMITS,
            contribution_to(terms, number),
            [],
            np.random.default_rng(number),
        )
        for number, name in enumerate(terms.devices)
    }
    coordinator = Coordinator(terms, directory)
    aggregate(coordinator, devices)
    assert coordinator.result.survivors == terms.devices
    with pytest.raises(ProtocolError, match="not in the pinned directory"):
        directory.check("stranger", b"", b"")
    with pytest.raises(ProtocolError, match="the signature is not its own"):
        directory.check(NAMES[0], b"", signer(keys[NAMES[1]])(b""))


def test_an_upload_looks_like_noise_and_never_twice_the_same():
    terms = small_terms(3, [range(3)])
    wide = {0: 4000, 1: 4000}
    chosen = terms.classes[0].model_copy(update={"sizes": (4000, 4000)})
    terms = Terms.model_validate(terms.model_dump() | {"classes": (chosen.model_dump(),)})
    bodies = []
    for _ in range(2):
        attempt = Attempt(terms)
        attempt.given = [Contribution(wide, np.zeros(8000, np.float32), np.ones(2, np.float32))] * 3
        attempt.devices = [device_in(terms, i, given) for i, given in enumerate(attempt.given)]
        attempt.answers = {n: attempt.device(n).announce() for n in terms.devices}
        attempt.ask(Phase.UPLOAD).reply()
        bodies += [bytes(read(step.reply).body) for step in attempt.answers.values()]
    for body in bodies:
        counts = np.bincount(np.frombuffer(body, np.uint8), minlength=256)
        expected = len(body) / 256
        assert ((counts - expected) ** 2 / expected).sum() < 400  # 255 ± 23 for even bytes
    for one, other in itertools.combinations(bodies, 2):
        same = np.frombuffer(one, np.uint8) == np.frombuffer(other, np.uint8)
        assert same.mean() < 0.01


def test_a_cohort_on_the_wire_takes_three_bytes_a_number():
    terms = small_terms(3, [range(3)])
    chosen = terms.classes[0].model_copy(update={"sizes": (5000, 5000)})
    terms = Terms.model_validate(terms.model_dump() | {"classes": (chosen.model_dump(),)})
    attempt = Attempt(terms).ask(Phase.UPLOAD).reply()
    assert all(len(step.reply) < 3.1 * 10_000 for step in attempt.answers.values())


def test_terms_survive_the_wire_and_their_digest_names_everything():
    terms = small_terms(5, [range(5), [0, 1]])
    assert parse_terms(terms.content) == terms
    changed = [small_terms(5, [range(5), [0, 1]], **change) for change in CHANGES]
    assert len({terms.transcript, *(t.transcript for t in changed)}) == 1 + len(CHANGES)


CHANGES: list[dict[str, Any]] = [
    {"run": "other"},
    {"round": 4},
    {"attempt": 1},
    {"base": "00" * 32},
    {"layout": "00" * 32},
    {"devices": NAMES[1:6]},
    {"threshold": Threshold.MAJORITY},
    {"smallest_cohort": 3},
    {"smallest_class": 3, "classes": small_terms(5).classes},
    {"clip_norm": 2.0},
    {"value_range": 2.0},
    {"word_bits": 32},
]


class AnyOrder(RuleBasedStateMachine):
    """A network that delays, repeats, mixes up and invents; what comes out is right or nothing."""

    foreign: ClassVar[list[bytes]] = []

    @initialize()
    def begin(self):
        if not self.foreign:
            other = Attempt(small_terms(4, attempt=1))
            for phase in [*PHASES[1:], Phase.OVER]:
                self.foreign.extend(step.reply for step in other.answers.values())
                other.ask(phase)
                self.foreign.extend(other.questions.values())
                other.answers = other.answers or other.reply().answers
        self.attempt = Attempt(small_terms(4, [range(4), [0, 1, 2]], smallest_cohort=2))
        self.answers = {(Phase.ANNOUNCE, n): s.reply for n, s in self.attempt.answers.items()}
        self.questions = {}

    def letters(self):
        return [*self.answers.values(), *self.questions.values(), *self.foreign]

    @rule(data=st.data())
    def anything_to_the_coordinator(self, data):
        coordinator = self.attempt.coordinator
        before = coordinator.phase, coordinator.awaited
        try:
            name = coordinator.receive(data.draw(st.sampled_from(self.letters())))
        except ProtocolError:
            assert (coordinator.phase, coordinator.awaited) == before
        else:
            assert coordinator.awaited == before[1] - {name}

    @rule(data=st.data(), name=st.sampled_from(NAMES[:4]))
    def anything_to_a_device(self, data, name):
        self.ask(name, data.draw(st.sampled_from(self.letters())))

    @rule(names=st.frozensets(st.sampled_from(NAMES[:4]), min_size=2))
    def what_is_meant_for_them(self, names):
        phase = self.attempt.coordinator.phase
        for name in sorted(names):
            if (phase, name) in self.questions:
                self.ask(name, self.questions[phase, name])
            if (phase, name) in self.answers and name in self.attempt.coordinator.awaited:
                self.attempt.coordinator.receive(self.answers[phase, name])

    @rule()
    def close(self):
        coordinator = self.attempt.coordinator
        before = coordinator.phase
        try:
            questions = coordinator.close()
        except ProtocolError:
            assert coordinator.phase is before
        else:
            self.questions |= {(coordinator.phase, n): asked for n, asked in questions.items()}

    def ask(self, name, question):
        device = self.attempt.device(name)
        before = device.phase
        try:
            answer = device.answer(question)
        except ProtocolError:
            assert device.phase is before
        else:
            assert TURNS[before].then is device.phase
            self.answers[device.phase, name] = answer.reply

    def teardown(self):
        coordinator = self.attempt.coordinator
        for _ in PHASES:
            self.what_is_meant_for_them(frozenset(NAMES[:4]))
            self.close()
        if coordinator.phase is Phase.OVER:
            holds(self.attempt)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = tried(10, stateful_step_count=15)


class LyingCoordinator(RuleBasedStateMachine):
    """Tells each device what it likes, uses every signature it ever got, and owns device 0."""

    everybody = range(6)
    honest = (1, 2, 3, 4, 5)

    @initialize()
    def begin(self):
        # Two holders are enough for seeds of class 1, the other four for a key: only the proof
        # that all speak of the same survivors keeps them from giving device 1 away.
        terms = small_terms(6, [range(6), [1, 2]], threshold=Threshold.MAJORITY)
        self.attempt = Attempt(terms, limits=Limits(2, 2, True)).ask(Phase.CONSENT)
        self.terms = self.attempt.terms
        self.at = read(next(iter(self.attempt.questions.values()))).letter.transcript
        self.votes = {}
        self.released = Counter[tuple[int, int | None]]()

    @rule(
        devices=st.sampled_from([(1, 2, 3, 4, 5), (1, 2), (3, 4, 5), (2, 3)]),
        missing=st.sampled_from([(), (1,)]),
    )
    def claim_survivors(self, devices, missing):
        chosen = frozenset(self.everybody) - frozenset(missing)
        letter = Survivors(transcript=self.at, survivors=tuple(sorted(chosen)))
        forged = Consent(transcript=continued(self.at, header_of(letter)), device=0)
        for device in devices:
            answer = self.try_to_ask(device, encode(letter))
            if answer is not None:
                votes = self.votes.setdefault((chosen, forged.transcript), {})
                votes[device] = read(answer.reply).signature
                votes[0] = KEYS.signer(NAMES[0])(statement(forged))

    @rule(data=st.data(), mixed=st.booleans())
    def claim_consent(self, data, mixed):
        if not self.votes:
            return
        survivors, transcript = data.draw(st.sampled_from(sorted(self.votes, key=str)))
        found = dict(self.votes[survivors, transcript])
        if mixed:
            found |= {d: v for votes in self.votes.values() for d, v in votes.items()}
        votes = tuple(Vote(device=d, signature=v.hex()) for d, v in found.items())
        for device in self.honest:
            answer = self.try_to_ask(device, encode(Proof(transcript=transcript, votes=votes)))
            if answer is not None:
                live = self.terms.live(self.everybody, survivors)
                due = self.terms.due(live, self.everybody, survivors, device)
                assert len(read(answer.reply).body) == 33 * len(due)
                self.released.update(due)
                keys = {peer for peer, number in due if number is None}
                assert not keys & {peer for peer, number in due if number is not None}
                event("released")

    def try_to_ask(self, device, question):
        before = self.attempt.devices[device].phase
        try:
            return self.attempt.devices[device].answer(question)
        except ProtocolError:
            assert self.attempt.devices[device].phase is before
            return None

    @invariant()
    def no_device_is_given_away(self):
        if not hasattr(self, "released"):
            return
        terms = self.terms
        for peer in self.honest:
            # Device 0 adds its own shares of both.
            has_key = self.released[peer, None] + 1 >= terms.threshold.of(terms.size)
            for number in terms.held(range(len(terms.classes)), peer):
                least = terms.class_threshold(number, self.everybody)
                more = int(0 in terms.classes[number].members)
                assert not (has_key and self.released[peer, number] + more >= least)


TestLyingCoordinator = LyingCoordinator.TestCase
TestLyingCoordinator.settings = tried(20, stateful_step_count=8)


def test_two_sets_of_survivors_cannot_both_be_proven():
    """Flower's SecAgg+ answers any two lists (`_unmask` does not check that they are disjoint)."""
    attempt = Attempt(small_terms(6)).ask(Phase.CONSENT)
    at = read(attempt.questions[NAMES[0]]).letter.transcript
    with_five, without_five = (
        Survivors(transcript=at, survivors=tuple(found)) for found in (range(6), range(5))
    )
    votes = []
    for number, device in enumerate(attempt.devices[:5]):
        asked = with_five if number < 3 else without_five
        votes.append(read(device.answer(encode(asked)).reply))
        with pytest.raises(ProtocolError, match="Survivors where Proof comes next"):
            device.answer(encode(without_five if number < 3 else with_five))
    proof = Proof(
        transcript=votes[0].letter.transcript,
        votes=tuple(Vote(device=i, signature=v.signature.hex()) for i, v in enumerate(votes)),
    )
    with pytest.raises(ProtocolError, match="the signature is not its own"):
        attempt.devices[0].answer(encode(proof))


def test_a_small_class_is_not_told_another_story_than_the_rest():
    """Two holders could give the seed of device 1, the other four its key, were there no proof."""
    terms = small_terms(6, [range(6), [1, 2]], threshold=Threshold.MAJORITY)
    attempt = Attempt(terms, limits=Limits(2, 2, majority_is_enough=True)).ask(Phase.CONSENT)
    at = read(attempt.questions[NAMES[0]]).letter.transcript

    def releases(told, survivors):
        letter = Survivors(transcript=at, survivors=survivors)
        consent = Consent(transcript=continued(at, header_of(letter)), device=0)
        votes = [Vote(device=0, signature=KEYS.signer(NAMES[0])(statement(consent)).hex())]
        for device in told:
            found = read(attempt.devices[device].answer(encode(letter)).reply)
            votes.append(Vote(device=device, signature=found.signature.hex()))
        proof = encode(Proof(transcript=consent.transcript, votes=tuple(votes)))
        return [attempt.devices[device].answer(proof) for device in told]

    assert len(releases((3, 4, 5), (0, 2, 3, 4, 5))) == 3
    with pytest.raises(ProtocolError, match="3 votes; at least 4 survivors must consent"):
        releases((1, 2), (0, 1, 2, 3, 4, 5))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"devices": (NAMES[1], NAMES[0])}, "devices must be sorted and distinct"),
        ({"devices": NAMES[:1]}, "at least 2 items"),
        ({"devices": (NAMES[0], "../x")}, "devices"),
        ({"smallest_class": 6}, "at least smallest_class holders"),
        ({"smallest_class": 1}, "smallest_class"),
        ({"smallest_cohort": 1}, "smallest_cohort"),
        ({"devices": NAMES[:3]}, "all of them devices"),
        ({"value_range": 0.0}, "value_range"),
        ({"clip_norm": float("nan")}, "clip_norm"),
        ({"word_bits": 16}, "word_bits"),
        ({"classes": ()}, "classes"),
        ({"extra": 1}, "extra"),
    ],
)
def test_terms_that_make_no_sense_are_refused(change, match):
    import json

    content = json.dumps({**json.loads(small_terms().content), **change}).encode()
    with pytest.raises(ProtocolError, match=match):
        parse_terms(content)


@pytest.mark.parametrize(
    ("classes", "match"),
    [
        ([((0, 1), (0,), (3,)), ((0, 2), (0,), (3,))], "a block is in exactly one class"),
        ([((0, 1), (-1,), (3,))], "a block is in exactly one class"),
        ([((0, 1), (0,), (3,)), ((0, 1), (1,), (3,))], "same holders are one class"),
        ([((0, 1), (0,), (3, 4))], "each with its size"),
        ([((0, 1), (1, 0), (3, 4))], "in order"),
        ([((1, 0), (0,), (3,))], "numbers must increase"),
        ([((0, 1), (0,), (0,))], "greater than 0"),
        ([((0, 1), (0,), (1 << 29,))], "at most 268435456 words"),
    ],
)
def test_classes_that_make_no_sense_are_refused(classes, match):
    import json

    found = [{"holders": h, "blocks": b, "sizes": s} for h, b, s in classes]
    content = json.dumps({**json.loads(small_terms().content), "classes": found}).encode()
    with pytest.raises(ProtocolError, match=match):
        parse_terms(content)


def test_terms_that_are_no_terms_are_refused():
    for content in (b"", b"{}", b"[]", b"\xff", b"[" * 100_000):
        with pytest.raises(ProtocolError, match="terms of secure aggregation refused"):
            parse_terms(content)
    with pytest.raises(ProtocolError, match="the limit is 8388608"):
        parse_terms(bytes((8 << 20) + 1))


def test_headroom_is_part_of_the_terms():
    with pytest.raises(ValueError, match="finite number"):
        small_terms(value_range=float("inf"))


def test_thresholds_are_more_than_their_share():
    for count in range(1, 300):
        assert 2 * Threshold.MAJORITY.of(count) > count
        assert 3 * Threshold.TWO_THIRDS.of(count) > 2 * count
        assert 3 * (Threshold.TWO_THIRDS.of(count) - 1) <= 2 * count


def test_transcripts_chain():
    one, other = continued("00" * 32, b"a"), continued("00" * 32, b"b")
    assert len({one, other, continued(one, b"b"), continued(other, b"a")}) == 4


def test_the_table_is_one_path_through_all_phases():
    phase, seen = Phase.ANNOUNCE, []
    while phase is not Phase.OVER:
        seen.append(phase)
        phase = TURNS[phase].then
    assert seen == PHASES
