"""A device refuses what it must not answer, is as before, and never lives twice."""

from typing import Any

import numpy as np
import pytest

from proxymoe.common.contribution import Contribution, Limits
from proxymoe.common.errors import ProtocolError
from proxymoe.common.letters import (
    Consent,
    Vote,
    encode,
)
from proxymoe.common.masking import Device
from proxymoe.common.secagg import TURNS, Phase, Threshold
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


def refused(attempt, name, question, match):
    """The device refuses; its phase is as before, and the honest question is still answered."""
    device = attempt.device(name)
    before = device.phase
    with pytest.raises(ProtocolError, match=match):
        device.answer(question)
    assert device.phase is before


def changed(content, body=None, **fields):
    """A letter with other fields or another body, unsigned."""
    received = read(content)
    letter = received.letter.model_copy(update=fields)
    return encode(letter, bytes(received.body) if body is None else body)


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        (Limits(smallest_cohort=3, smallest_class=2), "smallest_cohort 2; this device's policy"),
        (Limits(smallest_cohort=2, smallest_class=3), "smallest_class 2; this device's policy"),
    ],
)
def test_terms_below_the_owners_limits_are_refused(limits, match):
    with pytest.raises(ProtocolError, match=match):
        device_in(small_terms(), 0, limits=limits)


def test_a_majority_threshold_needs_the_owners_consent():
    terms = small_terms(threshold=Threshold.MAJORITY)
    with pytest.raises(ProtocolError, match="wants two thirds"):
        device_in(terms, 0)


def test_terms_without_this_device_are_refused():
    given = contribution_to(small_terms(), 0)
    with pytest.raises(ProtocolError, match="terms without device 'stranger'"):
        Device(
            "stranger",
            KEYS.signer(NAMES[0]),
            KEYS,
            small_terms(),
            LIMITS,
            given,
            [],
            np.random.default_rng(0),
        )


def zeros(sizes):
    weights = np.ones(len(sizes), dtype=np.float32)
    return Contribution(sizes, np.zeros(sum(sizes.values()), dtype=np.float32), weights)


def with_vector(given, vector, weights=None):
    weights = given.weights if weights is None else np.array(weights, dtype=np.float32)
    return Contribution(given.sizes, vector, weights)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda g: with_vector(g, g.vector * np.float32(1.2)), "update of norm 1.08, the limit"),
        (lambda g: with_vector(g, g.vector * np.float32(np.nan)), "update of norm nan"),
        (lambda g: with_vector(g, g.vector * np.float32(np.inf)), "update of norm"),
        (lambda g: with_vector(g, g.vector[:-1]), "does not fit its blocks"),
        (lambda g: with_vector(g, g.vector, [2.0] * 3), "must be from 0 to 1"),
        (lambda g: with_vector(g, g.vector, [np.nan] * 3), "weights must be from 0 to 1"),
        (
            lambda g: Contribution(
                {1000: 2, 0: 3, 1: 5}, np.zeros(10, np.float32), np.ones(3, np.float32)
            ),
            "terms say 4",
        ),
        (
            lambda g: Contribution(
                {1000: 2, 0: 3}, np.zeros(5, np.float32), np.ones(2, np.float32)
            ),
            "there are none",
        ),
    ],
)
def test_an_update_that_must_not_be_masked_is_refused(change, match):
    terms = small_terms()
    with pytest.raises(ProtocolError, match=match):
        device_in(terms, 0, change(contribution_to(terms, 0)))


def test_blocks_that_the_terms_do_not_know_of_are_refused():
    terms = small_terms(5, [[0, 1, 2], [1, 2, 3]])
    given = contribution_to(small_terms(5, [range(5), range(1, 4)]), 4)
    with pytest.raises(ProtocolError, match="terms say no numbers of block 0 are here"):
        device_in(terms, 4, given)


def test_blocks_that_too_few_hold_are_reported():
    assert device_in(small_terms(), 0).skipped == [1000]


def test_rosters_are_checked():
    attempt = Attempt().ask(Phase.SHARE)
    name = NAMES[1]
    question = attempt.questions[name]
    members = read(question).letter.members
    other = read(Attempt().ask(Phase.SHARE).questions[name]).letter.members

    def roster(*found):
        return changed(question, members=tuple(found))

    def forged(at, **fields):
        found = list(members)
        found[at] = found[at].model_copy(update=fields)
        return roster(*found)

    for content, match in [
        (changed(question, b"x"), "has no body"),
        (roster(*members[:1], *members[2:]), "own keys are missing"),
        (roster(*members[:1], other[1], *members[2:]), "own keys are missing"),
        (forged(0, mask_key="11" * 32), "device 'device0': the signature is not its own"),
        (forged(0, share_key="11" * 32), "device 'device0': the signature is not its own"),
        (forged(0, signature=members[2].signature), "the signature is not its own"),
        (forged(0, mask_key=members[2].mask_key), "two keys of the roster are the same"),
        (forged(0, share_key=members[0].mask_key), "two keys of the roster are the same"),
        (roster(*members[::-1]), "lists devices of the terms, in order"),
        (roster(members[0], *members), "lists devices of the terms, in order"),
        (forged(4, device=7), "lists devices of the terms, in order"),
        (roster(members[1]), "roster of 1, the least is 2"),
        (roster(), "roster of 0, the least is 2"),
    ]:
        refused(attempt, name, content, match)
    holds(attempt.finish())


def test_a_key_of_small_order_is_refused_though_its_owner_signed_it():
    attempt = Attempt()
    liar = attempt.devices[0]
    letter = read(liar.announce().reply).letter.model_copy(update={"share_key": "00" * 32})
    attempt.coordinator.receive(encode(letter, sign=KEYS.signer(NAMES[0])))
    del attempt.answers[NAMES[0]]
    attempt.ask(Phase.SHARE)
    refused(attempt, NAMES[1], attempt.questions[NAMES[1]], "of small order")


def test_deliveries_are_checked():
    attempt = Attempt().ask(Phase.UPLOAD)
    name = NAMES[1]
    question = attempt.questions[name]
    body = bytes(read(question).body)
    foreign = bytes(read(attempt.questions[NAMES[2]]).body)
    again = bytes(read(Attempt().ask(Phase.UPLOAD).questions[name]).body)
    size = len(body) // 4
    for content, match in [
        (changed(question, body[:-1] + bytes([body[-1] ^ 1])), "sealed shares were changed"),
        (changed(question, foreign), "sealed shares were changed"),
        (changed(question, again), "sealed shares were changed"),
        (changed(question, body[size:] + body[:size]), "sealed shares were changed"),
        (changed(question, body[:-5]), "sealed shares were changed"),
        (changed(question, body + b"x"), r"delivery of \d+ bytes, expected"),
        (changed(question, senders=(0, 2, 3, 4)), "4 devices are left; this one and at least 4"),
        (changed(question, body[: 2 * size], senders=(0, 1, 2)), "3 devices are left"),
        (changed(question, senders=(0, 1, 2, 3, 8)), "and no others"),
    ]:
        refused(attempt, name, content, match)
    holds(attempt.finish())


def test_lists_of_survivors_are_checked():
    attempt = Attempt().ask(Phase.CONSENT)
    name = NAMES[1]
    question = attempt.questions[name]
    for content, match in [
        (changed(question, b"x"), "has no body"),
        (changed(question, survivors=(0, 2, 3, 4)), "4 devices are left; this one and at least"),
        (changed(question, survivors=(0, 1, 2)), "3 devices are left"),
        (changed(question, survivors=(0, 1, 2, 3, 4, 5)), "and no others"),
    ]:
        refused(attempt, name, content, match)
    holds(attempt.finish())


def test_proofs_are_checked():
    attempt = Attempt().ask(Phase.RELEASE, lambda p, n: (p, n) == (Phase.UPLOAD, NAMES[4]))
    name = NAMES[1]
    question = attempt.questions[name]
    votes = read(question).letter.votes
    # A vote by the device that dropped out, and one for another set of survivors.
    mine = Consent(transcript="00" * 32, device=0)
    elsewhere = read(encode(mine, sign=KEYS.signer(NAMES[0]))).signature.hex()
    for content, match in [
        (changed(question, b"x"), "no body"),
        (changed(question, votes=votes[:3]), "3 votes; at least 4 survivors must consent"),
        (changed(question, votes=()), "0 votes"),
        (changed(question, votes=(*votes, votes[0])), "one vote per device"),
        (
            changed(question, votes=(*votes, Vote(device=4, signature="00"))),
            "5 votes; at least 4 survivors",
        ),
        (
            changed(question, votes=(Vote(device=0, signature=elsewhere), *votes[1:])),
            "the signature is not its own",
        ),
        (
            changed(question, votes=(Vote(device=0, signature=votes[1].signature), *votes[1:])),
            "the signature is not its own",
        ),
    ]:
        refused(attempt, name, content, match)
    holds(attempt.finish())


def asked(phase):
    question = TURNS[phase].question
    assert question is not None
    return question.__name__


@pytest.mark.parametrize("phase", PHASES[1:])
def test_questions_of_other_phases_attempts_and_coordinators_are_refused(phase):
    attempt, other = Attempt().ask(phase), Attempt(small_terms(attempt=1)).ask(phase)
    name = NAMES[2]
    refused(attempt, name, other.questions[name], "another attempt")
    refused(attempt, name, changed(attempt.questions[name], transcript="00" * 32), "another attem")
    refused(attempt, name, attempt.device(name).announce().reply, "where .* comes next")
    refused(attempt, name, b"", "not a letter")
    for later in PHASES[1:]:
        if later is not phase:
            question = Attempt().ask(later).questions[name]
            refused(attempt, name, question, f"where {asked(phase)} comes next")
    holds(attempt.finish())


@pytest.mark.parametrize("phase", PHASES[1:])
def test_a_question_is_answered_once(phase):
    attempt = Attempt().ask(phase)
    question = attempt.questions[NAMES[0]]
    attempt.reply()
    match = "all its answers" if phase is Phase.RELEASE else "comes next"
    refused(attempt, NAMES[0], question, match)
    holds(attempt.finish())


def test_an_announcement_is_the_same_however_often_it_is_asked_for():
    device = device_in(small_terms(), 0)
    assert read(device.announce().reply).letter == read(device.announce().reply).letter


def test_consent_and_release_are_recorded_before_they_are_sent():
    attempt = Attempt()
    seen: dict[Phase, Any] = {}
    for phase in PHASES:
        attempt.ask(phase)
        if phase is not Phase.ANNOUNCE:
            attempt.reply()
        seen[phase] = attempt.answers[NAMES[0]].record if attempt.answers else None
    assert [p for p, record in seen.items() if record] == [Phase.CONSENT, Phase.RELEASE]
    consent, release = seen[Phase.CONSENT], seen[Phase.RELEASE]
    assert (consent.run, consent.round, consent.attempt) == ("run", 3, 0)
    assert consent.transcript == release.transcript
    assert consent.update == release.update == attempt.given[0].digest


def test_an_attempt_on_record_is_not_entered_again():
    attempt = Attempt().ask(Phase.CONSENT).reply()
    record = attempt.answers[NAMES[0]].record
    fresh = contribution_to(attempt.terms, 0, seed=9)
    with pytest.raises(ProtocolError, match="attempt 0 of round 3 is on record"):
        device_in(attempt.terms, 0, fresh, [record])
    device_in(small_terms(attempt=1), 0, fresh, [record])


def test_an_update_that_was_consented_to_is_never_masked_again():
    attempt = Attempt().ask(Phase.CONSENT).reply()
    record = attempt.answers[NAMES[0]].record
    for terms in (small_terms(attempt=1), small_terms(round=4), small_terms(run="other")):
        with pytest.raises(ProtocolError, match="was consented to in round 3, attempt 0"):
            device_in(terms, 0, attempt.given[0], [record])


def test_an_attempt_that_failed_before_consent_may_be_tried_again():
    attempt = Attempt().ask(Phase.UPLOAD).reply()
    assert all(step.record is None for step in attempt.answers.values())
    holds(Attempt(small_terms(attempt=1)).finish())


def test_numbers_that_saturate_are_counted_for_the_owner():
    terms = small_terms(3, value_range=0.01)
    attempt = Attempt(terms).ask(Phase.UPLOAD).reply()
    given = flat(attempt.given[0].sizes, attempt.given[0].vector, (0, 1))
    assert attempt.answers[NAMES[0]].saturated == int((np.abs(given) > 0.01).sum()) > 0
