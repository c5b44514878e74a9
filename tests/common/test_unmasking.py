"""A coordinator refuses what does not fit, is as before, and finds out who lied about what."""

import pytest

from proxymoe.common.errors import ProtocolError
from proxymoe.common.letters import (
    encode,
)
from proxymoe.common.secagg import Phase
from tests.masked import (
    KEYS,
    NAMES,
    PHASES,
    Attempt,
    holds,
    read,
    small_terms,
)


def test_answers_are_checked():
    for phase in PHASES:
        attempt = Attempt().ask(phase)
        if phase is not Phase.ANNOUNCE:
            attempt.reply()
        else:
            attempt.answers = {n: attempt.device(n).announce() for n in attempt.terms.devices}
        coordinator, name = attempt.coordinator, NAMES[1]
        content = attempt.answers[name].reply
        received = read(content)
        body, sign = bytes(received.body), KEYS.signer(name)
        stranger = received.letter.model_copy(update={"device": 7})
        somebody = received.letter.model_copy(update={"device": 2})
        other_phase = Attempt().ask(PHASES[(PHASES.index(phase) + 1) % 5])
        if other_phase.coordinator.phase is not Phase.ANNOUNCE:
            other_phase.reply()
        else:
            other_phase.answers = {name: other_phase.device(name).announce()}
        for wrong, match in [
            (other_phase.answers[name].reply, f"in the phase '{phase}'"),
            (encode(received.letter, body + b"x", sign), r"\d+ bytes in the phase"),
            (encode(stranger, body, sign), "of device 7"),
            (encode(somebody, body, sign), "device 'device2': the signature is not its own"),
            (encode(received.letter, body), "the signature is not its own"),
            (content[:-1] + bytes([content[-1] ^ 1]), "signature|refused|canonical|not fit"),
            (
                encode(received.letter.model_copy(update={"transcript": "00" * 32}), body, sign),
                "a letter of another attempt",
            ),
            (attempt.questions.get(name, b""), "in the phase|not a letter"),
        ]:
            with pytest.raises(ProtocolError, match=match):
                coordinator.receive(wrong)
            assert name in coordinator.awaited
        assert coordinator.receive(content) == name
        assert name not in coordinator.awaited
        with pytest.raises(ProtocolError, match="'device1': second answer in one phase"):
            coordinator.receive(content)
        holds(attempt.finish())
        with pytest.raises(ProtocolError, match="this attempt is over"):
            coordinator.receive(content)
        with pytest.raises(ProtocolError, match="this attempt is over"):
            coordinator.close()


def test_a_device_that_announces_anothers_key_is_refused():
    attempt = Attempt()
    first = read(attempt.answers[NAMES[0]].reply).letter
    attempt.coordinator.receive(attempt.answers.pop(NAMES[0]).reply)
    copied = read(attempt.answers[NAMES[1]].reply).letter.model_copy(
        update={"mask_key": first.mask_key}
    )
    with pytest.raises(ProtocolError, match="'device1': a key that exists"):
        attempt.coordinator.receive(encode(copied, sign=KEYS.signer(NAMES[1])))
    attempt.answers[NAMES[0]] = attempt.devices[0].announce()
    holds(attempt.finish())


def test_other_commitments_than_classes_are_refused():
    attempt = Attempt().ask(Phase.SHARE).reply()
    received = read(attempt.answers[NAMES[0]].reply)
    letter = received.letter.model_copy(update={"commitments": ()})
    with pytest.raises(ProtocolError, match="'device0': other commitments"):
        attempt.coordinator.receive(encode(letter, bytes(received.body), KEYS.signer(NAMES[0])))
    holds(attempt.finish())


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_closed_too_early_is_refused_and_goes_on(phase):
    attempt = Attempt().ask(phase)
    with pytest.raises(ProtocolError, match=f"0 devices answered in the phase '{phase}'"):
        attempt.coordinator.close()
    assert attempt.coordinator.phase is phase
    if phase is Phase.ANNOUNCE:
        attempt.answers = {n: attempt.device(n).announce() for n in attempt.terms.devices}
    holds(attempt.finish())


def test_an_attempt_without_a_class_that_can_be_unmasked_is_refused():
    terms = small_terms(6, [[0, 1, 2], [0, 1, 3]], smallest_class=3)
    with pytest.raises(ProtocolError, match="5 devices are left, and too few of them share blocks"):
        Attempt(terms).finish(lambda _, name: name == NAMES[0])


def spoiled(attempt, phase, name, change):
    """Lets one device lie in one phase: `change` of the body, signed by itself."""
    attempt.ask(phase, lambda p, n: (p, n) == (Phase.UPLOAD, NAMES[5])).reply()
    received = read(attempt.answers[name].reply)
    lie = encode(received.letter, change(bytes(received.body)), KEYS.signer(name))
    attempt.coordinator.receive(lie)
    del attempt.answers[name]
    attempt.collect()
    attempt.questions, attempt.answers = attempt.coordinator.close(), {}
    return attempt.finish(lambda p, n: (p, n) == (Phase.UPLOAD, NAMES[5])).coordinator.result


def test_false_shares_are_found_out_and_cost_their_class():
    """Of class 1 device 0 is no holder, so its lies about seeds of class 0 do not touch it."""
    terms = small_terms(6, [range(6), [1, 2, 3]])
    flipped = lambda body: body[:32] + bytes([body[32] ^ 1]) + body[33:]  # noqa: E731
    result = spoiled(Attempt(terms), Phase.RELEASE, NAMES[0], flipped)
    assert result.masked == {0: "shares of the seed of 'device0' are false"}
    assert [found.number for found in result.sums] == [1]
    last = lambda body: body[:-1] + bytes([body[-1] ^ 1])  # noqa: E731  the key of device 5
    result = spoiled(Attempt(terms), Phase.RELEASE, NAMES[0], last)
    assert result.masked == {0: "shares of the key of 'device5' are false"}


def test_an_upload_that_counts_itself_twice_costs_its_class():
    attempt = Attempt(small_terms(6, [range(6), [1, 2, 3]]))
    add_one = lambda body: bytes([(body[0] + 1) % 256]) + body[1:]  # noqa: E731
    result = spoiled(attempt, Phase.UPLOAD, NAMES[0], add_one)
    assert result.masked == {0: "masks did not cancel: an upload was not what it should be"}
    holds(attempt)


def test_too_few_releases_in_a_class_cost_that_class_only():
    attempt = Attempt(small_terms(6, [range(6), [0, 1]]))
    attempt.finish(lambda phase, name: (phase, name) == (Phase.RELEASE, NAMES[0]))
    assert attempt.coordinator.result.masked == {1: "1 shares of a secret, 2 are needed"}
    holds(attempt)
