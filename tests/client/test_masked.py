"""An update waits until it is asked for under masks, and is given away once."""

import contextlib
from typing import cast

import numpy as np
import pytest
import torch

from proxymoe.client.masked import MaskedUpdates
from proxymoe.client.records import Records
from proxymoe.common.contribution import Limits
from proxymoe.common.errors import DataError, ProtocolError
from proxymoe.common.identity import new_device_key, public_key
from proxymoe.common.letters import Announcement, Consent, Upload
from proxymoe.common.letters import decode as decode_letter
from proxymoe.common.messages import Refusal, Trained, TrainTask, address_of, decode, encode
from proxymoe.common.opening import Opening, opening_bytes, parse_opening
from proxymoe.server.journal import initial_state
from proxymoe.server.masked_round import MaskedRound
from proxymoe.server.round import tasks_of
from proxymoe.simulations.faults.cohort import honest, small_federation
from tests.fleet import RULES, Fleet

FEDERATION = small_federation(masked=True)
TASKS = tasks_of(FEDERATION, initial_state(FEDERATION.layout.size), "abc")
TASK = cast("TrainTask", decode(TASKS["a"])[0])


class Cut(Exception):
    """The wire was cut here."""


class Wire:
    """Plays attempts, and keeps all questions to device a, and its answers."""

    def __init__(self, fleet):
        self.fleet, self.letters, self.replies = fleet, [], []
        self.pending = b""
        """The question that came when the wire was cut."""

    def run(self, attempt=0, until=99):
        """Plays an attempt, until device a has answered so often."""
        self.letters, self.replies = [], []

        def exchange(letters):
            if len(self.replies) == until:
                self.pending = letters["a"]
                raise Cut
            self.letters.append(letters["a"])
            for name, reply in self.fleet.exchange_letters(letters):
                if name == "a":
                    self.replies.append(reply)
                yield name, reply

        keys, number = self.fleet.keys, attempt
        summation = MaskedRound(FEDERATION, 1, RULES, exchange, keys, lambda _: number)
        for name, member in FEDERATION.members.items():
            summation.add(name, member.layout, torch.zeros(0), 1.0)
        with contextlib.suppress(Cut):
            summation.sum()


@pytest.fixture
def fleet(tmp_path):
    fleet = Fleet(tmp_path, FEDERATION)
    fleet.train(FEDERATION)
    return fleet


@pytest.fixture
def wire(fleet):
    return Wire(fleet)


def test_an_answer_loses_its_update_and_all_that_it_says_of_the_data(fleet):
    reply = honest(TASKS["a"])
    told, vector = decode(fleet.holders["a"].withhold(TASK, reply))
    assert isinstance(told, Trained)
    assert vector.size == 0
    assert address_of(told) == address_of(TASK)
    assert set(told.model_dump()) - set(address_of(TASK)) == {"kind", "seconds", "peak_rss_mb"}


def test_a_refusal_passes_as_it_is(fleet):
    refusal = encode(Refusal(**address_of(TASK), reason="data"))
    assert fleet.holders["a"].withhold(TASK, refusal) == refusal


def test_no_number_of_the_update_is_on_the_wire(wire):
    wire.run()
    update = decode(honest(TASKS["a"]))[1]
    sent = b"".join(wire.replies)
    assert not any(number.tobytes() in sent for number in update)


def test_a_question_that_comes_twice_has_the_same_answer(wire, fleet):
    for count in (1, 2, 3):
        wire.run(attempt=count, until=count)
        for _ in range(2):
            assert fleet.holders["a"].answer(wire.letters[-1]) == wire.replies[-1]


def test_no_question_before_the_last_is_answered_again(wire, fleet):
    wire.run(until=3)
    for earlier in wire.letters[:2]:
        with pytest.raises(ProtocolError):
            fleet.holders["a"].answer(earlier)
    assert isinstance(decode_letter(wire.replies[-1]).letter, Upload)


def test_after_its_update_was_given_away_a_device_has_none(wire, fleet):
    holder = fleet.holders["a"]
    assert holder.given_away is None
    wire.run()
    assert holder.given_away == 1
    with pytest.raises(ProtocolError, match="no update waits here"):
        holder.answer(reopened(wire.letters[0], attempt=1))


def reopened(content, **terms):
    """The opening with other terms."""
    opening = parse_opening(content)
    return opening_bytes(
        Opening(
            terms=opening.terms.model_copy(update=terms),
            keys=opening.keys,
            blocks=opening.blocks,
            sizes=opening.sizes,
        )
    )


def test_another_attempt_takes_the_place_of_one_without_consent_only(wire, fleet):
    wire.run(until=3)
    holder = fleet.holders["a"]
    reply = holder.answer(reopened(wire.letters[0], attempt=5))
    assert isinstance(decode_letter(reply).letter, Announcement)
    for number in (4, 5):
        with pytest.raises(ProtocolError, match=f"attempt {number} after attempt 5"):
            holder.answer(reopened(wire.letters[0], attempt=number, round=1, word_bits=32))


def test_once_consented_an_update_is_spent(wire, fleet):
    wire.run(until=4)
    assert isinstance(decode_letter(wire.replies[-1]).letter, Consent)
    with pytest.raises(ProtocolError, match="consented to in round 1, attempt 0; train anew"):
        fleet.holders["a"].answer(reopened(wire.letters[0], attempt=1))
    fleet.restart("a")
    fleet.holders["a"].withhold(TASK, honest(TASKS["a"]))
    with pytest.raises(ProtocolError, match="consented to"):
        fleet.holders["a"].answer(reopened(wire.letters[0], attempt=1))
    with pytest.raises(ProtocolError, match="attempt 0 of round 1 is on record"):
        fleet.holders["a"].answer(wire.letters[0])


def test_the_same_task_again_changes_nothing_and_another_update_begins_anew(wire, fleet):
    wire.run(until=2)
    holder, reply = fleet.holders["a"], honest(TASKS["a"])
    holder.withhold(TASK, reply)
    assert holder.answer(wire.letters[-1]) == wire.replies[-1]
    holder.withhold(TASK, honest(TASKS["a"], lambda update: update * np.float32(0.5)))
    with pytest.raises(ProtocolError, match="an attempt that this device has no part in"):
        holder.answer(wire.letters[-1])


@pytest.mark.parametrize(
    ("terms", "reason"),
    [
        ({"round": 2}, "terms for round 2; what waits is of 1"),
        ({"run": "other"}, "terms for round 1"),
        ({"base": "c" * 64}, "terms for round 1"),
        ({"smallest_cohort": 1}, "smallest_cohort"),
        ({"clip_norm": 1e-3}, "update of norm"),
    ],
)
def test_terms_that_do_not_suit_are_refused_and_the_update_waits_on(wire, fleet, terms, reason):
    wire.run(until=1)
    fleet.restart("a")
    holder = fleet.holders["a"]
    holder.withhold(TASK, honest(TASKS["a"]))
    content = wire.letters[0]
    for key, value in terms.items():
        before = f'"{key}":'.encode()
        start = content.index(before) + len(before)
        stop = min(content.index(end, start) for end in (b",", b"}") if end in content[start:])
        written = f'"{value}"' if isinstance(value, str) else f"{value}"
        content = content[:start] + written.encode() + content[stop:]
    with pytest.raises(ProtocolError, match=reason):
        holder.answer(content)
    assert isinstance(decode_letter(holder.answer(wire.letters[0])).letter, Announcement)


def test_the_owners_limits_hold_as_they_are_now(tmp_path, wire):
    wire.run(until=1)
    limits = [Limits(smallest_cohort=9, smallest_class=2)]
    records, private = Records(tmp_path / "own.db"), wire.fleet._private["a"]
    holder = MaskedUpdates("a", private, records, lambda: limits[0])
    holder.withhold(TASK, honest(TASKS["a"]))
    with pytest.raises(ProtocolError, match="this device's policy says 9"):
        holder.answer(wire.letters[0])
    limits[0] = Limits(smallest_cohort=2, smallest_class=2)
    holder.answer(wire.letters[0])


def test_a_stranger_in_its_own_name_is_refused(wire, fleet):
    wire.run(until=1)
    fleet.restart("a")
    holder = fleet.holders["a"]
    holder.withhold(TASK, honest(TASKS["a"]))
    opening = parse_opening(wire.letters[0])
    stranger = public_key(new_device_key()).decode()
    for name, reason in {"a": "another key than its own", "b": "pinned was"}.items():
        forged = opening.model_copy(update={"keys": {**opening.keys, name: stranger}})
        with pytest.raises(ProtocolError, match=reason):
            holder.answer(opening_bytes(forged))


def test_what_cannot_be_put_on_record_is_not_said(wire, fleet, tmp_path):
    wire.run(until=3)
    (tmp_path / "a.db").unlink()
    (tmp_path / "a.db").mkdir()
    with pytest.raises(DataError, match=r"a\.db: cannot be used now"):
        fleet.holders["a"].answer(wire.pending)
    (tmp_path / "a.db").rmdir()
    with pytest.raises(ProtocolError, match="no part in"):
        fleet.holders["a"].answer(wire.pending)


def test_letters_without_an_update_or_an_opening_are_refused(wire, fleet):
    wire.run(until=2)
    fleet.restart("a")
    with pytest.raises(ProtocolError, match="no update waits here"):
        fleet.holders["a"].answer(wire.letters[0])
    with pytest.raises(ProtocolError, match="no part in"):
        fleet.holders["a"].answer(wire.letters[1])


def test_what_is_no_answer_is_not_withheld(fleet):
    with pytest.raises(ProtocolError):
        fleet.holders["a"].withhold(TASK, b"nonsense")
