import json
import math
import re
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from flwr.app import ConfigRecord, Error, RecordDict

from proxymoe.client import guard as module
from proxymoe.client.entries import Kind
from proxymoe.client.guard import Guard
from proxymoe.client.outgoing import Job, leaving
from proxymoe.client.policy import Coordinator, Privacy, Resources, Training, When
from proxymoe.common import letters, round_keys
from proxymoe.common.assignment import Assignment, Blob, issue_assignment
from proxymoe.common.config import AdapterSettings, TrainSettings
from proxymoe.common.errors import Diverged, IntegrityError, ProtocolError
from proxymoe.common.files import digest_of
from proxymoe.common.identity import new_signing_key, public_key
from proxymoe.common.messages import (
    CONTENT,
    DESCRIBE,
    LETTER,
    RECORD,
    TICKET,
    TRAIN,
    Refusal,
    Trained,
    TrainReply,
    TrainTask,
    decode,
    encode,
)
from proxymoe.common.privacy import Mode
from proxymoe.common.privacy_settings import Noise
from proxymoe.common.round_keys import RoundKeys
from proxymoe.common.sealing import open_envelope
from proxymoe.common.tickets import Ticket, issue_ticket
from tests.assigner import SIGNING, easy_policy, enrolled_home, set_policy

NOW = time.time()
BASE, PLAN, LAYOUT = "a" * 64, "b" * 64, "c" * 64
ADDRESS = {
    "run": "run",
    "round": 3,
    "device": "kitchen",
    "base": BASE,
    "plan": PLAN,
    "layout": LAYOUT,
}
TRAINING = TrainSettings(steps=4)
VECTOR = np.array([0.6, 0.8], dtype=np.float32)
ASSIGNMENT = Assignment(
    run="run",
    device="kitchen",
    base=BASE,
    plan=PLAN,
    layout=LAYOUT,
    adapter=AdapterSettings(rank=4),
    adapter_seed=0,
    manifest=Blob(digest="d" * 64, num_bytes=10),
    model_bytes=1000,
    memory_bytes=5_000_000,
    train=TRAINING,
    clip_norm=1.0,
    cohort_size=2,
    rounds=9,
)


class Clock:
    """Unix seconds, and a stopwatch, that go when they are told to."""

    def __init__(self):
        self.seconds = NOW

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def home(tmp_path):
    home = enrolled_home(tmp_path / "home", easy_policy(tmp_path))
    home.keep_assignment(issue_assignment(ASSIGNMENT, SIGNING))
    return home


@pytest.fixture
def guard(home, clock):
    return Guard(home, threads=1, clock=clock, stopwatch=clock)


def task_bytes(**changes) -> bytes:
    fields = {**ADDRESS, "train": TRAINING, "clip_norm": 1.0, "seed": 0, **changes}
    return encode(TrainTask(**fields), VECTOR)


def ticket_bytes(content: bytes, key=SIGNING, **changes) -> bytes:
    fields = {
        **ADDRESS,
        "task": digest_of(content),
        "cohort_size": 2,
        "issued": int(NOW),
        "expires": int(NOW) + 600,
    }
    return issue_ticket(Ticket(**{**fields, **changes}), key)


ROUND = RoundKeys.new("run", 3, 0, NOW, NOW + 600)
OFFER = ROUND.signed(SIGNING)


def message(kind=TRAIN, **fields):
    """What the guard looks at of a Flower message, which has to be made in a run."""
    content = RecordDict({RECORD: ConfigRecord(fields)}) if fields else RecordDict()
    return SimpleNamespace(metadata=SimpleNamespace(message_type=kind), content=content)


def training(task=None, ticket=None, keys=OFFER):
    task = task or task_bytes()
    fields = {"content": task, "ticket": ticket or ticket_bytes(task), "round_keys": keys}
    return message(**{name: value for name, value in fields.items() if value is not None})


def reply_bytes(vector=VECTOR, **changes) -> bytes:
    fields = {
        **ADDRESS,
        "num_examples": 5,
        "first_loss": 2.0,
        "last_loss": 1.0,
        "norm": 1.0,
        "seconds": 30.0,
        "peak_rss_mb": 40.0,
    }
    return encode(TrainReply(**{**fields, **changes}), vector)


def answer(**fields) -> RecordDict:
    return RecordDict({RECORD: ConfigRecord(fields)})


def refusals(home) -> list[dict[str, str]]:
    return [json.loads(line) for line in home.refusals.read_text().splitlines()]


def entries(home):
    return [(r.entry, r.is_confirmed) for r in reversed(home.ledger().newest())]


# Before the app sees it


def test_a_job_of_the_coordinator_and_a_question_who_we_are_come_through(guard, home):
    assert guard.check(training()) is None
    assert guard.check(message(DESCRIBE)) is None
    assert not home.refusals.exists()
    assert entries(home) == []


def test_a_refusal_is_a_word_outside_and_a_reason_at_home(guard, home):
    assert guard.check(training(ticket=ticket_bytes(task_bytes(), plan="0" * 64))) == "ticket"
    (line,) = refusals(home)
    when = datetime.fromtimestamp(NOW, UTC)
    assert line == {
        "time": f"{when:%Y-%m-%dT%H:%M:%SZ}",
        "word": "ticket",
        "reason": f"job ticket: for plan {'0' * 16}, and here is {'b' * 16}",
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"key": new_signing_key()}, "not signed by the pinned"),
        ({"device": "tablet"}, "for device tablet"),
        ({"base": "0" * 64}, "for base"),
        ({"layout": "0" * 64}, "for layout"),
        ({"task": "0" * 64}, "for task"),
        ({"round": 4}, "task of another round"),
        ({"run": "other"}, "task of another round"),
        ({"issued": int(NOW) + 900, "expires": int(NOW) + 990}, "not valid for another"),
        ({"issued": int(NOW) - 990, "expires": int(NOW) - 900}, "expired"),
    ],
)
def test_a_ticket_must_be_for_this_task_here_and_now(guard, home, changes, reason):
    assert guard.check(training(ticket=ticket_bytes(task_bytes(), **changes))) == "ticket"
    assert reason in refusals(home)[-1]["reason"]


@pytest.mark.parametrize(
    "asked",
    [
        message(TRAIN),
        message(TRAIN, content=task_bytes()),
        message(TRAIN, ticket=ticket_bytes(task_bytes())),
        message(TRAIN, content="text", ticket="text"),
        training(b"PXM1 but no task"),
        training(reply_bytes()),
    ],
)
def test_a_task_without_a_ticket_is_none_and_neither_is_another_message(guard, asked):
    assert guard.check(asked) == "ticket"


def test_a_message_of_another_kind_is_not_answered(guard, home):
    assert guard.check(message("train")) == "message"
    assert guard.check(message("query.secrets")) == "message"
    assert "'query.secrets'" in refusals(home)[-1]["reason"]


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"privacy": Privacy(smallest_cohort=3)}, "privacy.smallest_cohort"),
        ({"privacy": Privacy(smallest_cohort=2, noise_required=True)}, "privacy.noise_required"),
        ({"privacy": Privacy(smallest_cohort=2, largest_clip_norm=0.5)}, "largest_clip_norm"),
        ({"training": Training(largest_steps=3)}, "training.largest_steps"),
        ({"training": Training(largest_rank=3)}, "training.largest_rank"),
        ({"resources": Resources(memory_mb=4)}, "resources.memory_mb"),
        ({"resources": Resources(network_mb_per_month=0)}, "network_mb_per_month"),
        ({"coordinator": Coordinator(public_key="0" * 64)}, "coordinator.public_key"),
    ],
)
def test_a_job_beyond_the_policy_is_refused(guard, home, tmp_path, sections, key):
    set_policy(home, easy_policy(tmp_path, **sections))
    assert guard.check(training()) == "policy"
    assert key in refusals(home)[-1]["reason"]


def test_a_job_may_not_ask_more_than_the_assignment_did(guard, home):
    assert guard.check(training(task_bytes(train=TrainSettings(steps=201)))) == "policy"
    assert guard.check(training(task_bytes(clip_norm=31.0))) == "policy"
    small = ticket_bytes(task_bytes(), cohort_size=1)
    assert guard.check(training(ticket=small)) == "policy"


def test_who_could_not_train_does_not_offer_to(guard, home):
    set_policy(home, easy_policy(None))
    assert guard.check(message(DESCRIBE)) == "policy"


def test_an_edited_policy_counts_at_once(guard, home, tmp_path):
    assert guard.check(training()) is None
    set_policy(home, easy_policy(tmp_path, privacy=Privacy(smallest_cohort=9)))
    assert guard.check(training()) == "policy"


@pytest.mark.parametrize(
    ("sections", "gate"),
    [
        ({"resources": Resources(spare_memory_mb=10**9, spare_disk_mb=0)}, "memory"),
        ({"resources": Resources(spare_memory_mb=0, spare_disk_mb=10**9)}, "disk"),
    ],
)
def test_a_closed_gate_is_named(guard, home, tmp_path, sections, gate):
    set_policy(home, easy_policy(tmp_path, **sections))
    for asked in (training(), message(DESCRIBE)):
        assert guard.check(asked) == f"gate: {gate}"
    assert f"{gate}: closed; " in refusals(home)[-1]["reason"]


def test_time_that_is_used_up_is_used_up_until_tomorrow(guard, home, clock, tmp_path):
    resources = Resources(seconds_per_day=59, spare_memory_mb=0, spare_disk_mb=0)
    set_policy(home, easy_policy(tmp_path, resources=resources))
    for _ in range(2):
        assert guard.check(training()) is None
        with guard.sending(training(), answer(content=reply_bytes())):
            pass
    assert home.usage(clock()).seconds == 60.0
    assert guard.check(training()) == "policy"
    clock.seconds += 86_400
    task = task_bytes()
    now = int(clock())
    fresh = ticket_bytes(task, issued=now, expires=now + 60)
    keys = RoundKeys.new("run", 3, 1, clock(), clock() + 60).signed(SIGNING)
    assert guard.check(training(task, fresh, keys)) is None


def test_the_load_of_our_own_job_is_not_held_against_the_next(guard, home, tmp_path, monkeypatch):
    when = When(
        largest_load=0.1, only_charging=False, battery_floor_percent=0, only_unmetered=False
    )
    set_policy(home, easy_policy(tmp_path, when=when))
    load = -math.expm1(-0.5)  # of one thread, after 30 s
    monkeypatch.setattr(psutil, "cpu_count", lambda: 1)
    monkeypatch.setattr(psutil, "getloadavg", lambda: (load, 0.0, 0.0))
    assert guard.check(training()) == "gate: load"
    monkeypatch.setattr(psutil, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert guard.check(training()) is None
    with guard.sending(training(), answer(content=reply_bytes())):
        pass
    monkeypatch.setattr(psutil, "getloadavg", lambda: (load, 0.0, 0.0))
    assert guard.check(training()) is None


def test_a_device_with_something_wrong_says_no_more_than_that(guard, home):
    home.policy_file.write_text("nonsense = 1\n")
    assert guard.check(training()) == "device"
    assert "unknown key" in refusals(home)[-1]["reason"]
    home.policy_file.unlink()
    home.assignment_file.unlink()
    assert guard.check(training()) == "device"
    assert "no plan is assigned" in refusals(home)[-1]["reason"]


def test_the_log_of_refusals_is_bounded(guard, home, monkeypatch):
    monkeypatch.setattr(module, "MAX_LOG_BYTES", 1000)
    for _ in range(40):
        guard.check(message("query.secrets"))
    sizes = [path.stat().st_size for path in home.log.iterdir()]
    assert len(sizes) == 2
    assert max(sizes) < 1300


def test_a_log_that_cannot_be_written_changes_no_answer(guard, home):
    home.refusals.mkdir()
    assert guard.check(message("query.secrets")) == "message"


# Before an answer leaves


def test_an_update_is_on_record_before_it_leaves_and_confirmed_after(guard, home):
    task = task_bytes()
    assert guard.check(training(task)) is None
    with guard.sending(training(task), answer(content=reply_bytes())) as envelope:
        ((entry, confirmed),) = entries(home)
        assert not confirmed
    ((entry, confirmed),) = entries(home)
    assert confirmed
    assert entry.kind is Kind.UPDATE
    assert entry.receiver == home.enrolled().coordinator
    assert (entry.num_bytes, entry.digest) == (len(envelope), digest_of(envelope))
    assert (entry.run, entry.round, entry.clip_norm) == ("run", 3, 1.0)
    assert entry.fetched_bytes == len(task)
    assert home.usage(NOW).seconds == 30.0
    assert home.peak() == 40_000_000


def test_what_could_not_be_sent_is_not_confirmed(guard, home):
    guard.check(training())
    with pytest.raises(ConnectionError), guard.sending(training(), answer(content=reply_bytes())):
        raise ConnectionError
    assert [confirmed for _, confirmed in entries(home)] == [False]


def test_descriptions_refusals_and_errors_are_on_record_too(guard, home):
    guard.check(message(DESCRIBE))
    with guard.sending(message(DESCRIBE), answer(device="kitchen", plan=PLAN)) as in_its_place:
        assert in_its_place is None
    guard.check(training())
    refusal = encode(Refusal(**ADDRESS, reason="data"))
    with guard.sending(training(), answer(content=refusal)) as envelope:
        assert refusal not in envelope
    with guard.sending(training(), Error(6, "gate: battery")):
        pass
    found = [entry for entry, _ in entries(home)]
    assert [entry.kind for entry in found] == [Kind.DESCRIPTION, Kind.REFUSAL, Kind.REFUSAL]
    assert found[1].digest == digest_of(envelope)
    assert (found[2].num_bytes, found[2].digest) == (13, digest_of(b"gate: battery"))


def test_a_job_that_failed_used_its_time_all_the_same(guard, home, clock):
    guard.check(training())
    clock.seconds += 12.0
    with guard.sending(training(), Error(8, "the job process was killed")):
        pass
    assert home.usage(NOW).seconds == 12.0
    with guard.sending(training(), Error(6, "ticket")):
        pass
    assert home.usage(NOW).seconds == 12.0


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (answer(content=reply_bytes(np.array([np.nan, 0.0], dtype=np.float32))), Diverged),
        (answer(content=reply_bytes(np.array([np.inf, 0.0], dtype=np.float32))), Diverged),
        (answer(content=reply_bytes(2.0 * VECTOR)), ProtocolError),
        (answer(content=reply_bytes(round=4)), ProtocolError),
        (answer(content=reply_bytes(plan="0" * 64)), ProtocolError),
        (answer(content=task_bytes()), ProtocolError),
        (answer(content=b"private rows"), ProtocolError),
        (answer(content=reply_bytes(), rows="private"), ProtocolError),
        (answer(device="kitchen", plan=PLAN, rows="private"), ProtocolError),
        (answer(), ProtocolError),
        (RecordDict(), ProtocolError),
        (
            RecordDict({RECORD: ConfigRecord({CONTENT: b""}), TICKET: ConfigRecord()}),
            ProtocolError,
        ),
    ],
)
def test_what_is_no_answer_stays_here(guard, home, content, error):
    assert guard.check(training()) is None
    with pytest.raises(error), guard.sending(training(), content):
        raise AssertionError("it was let out")
    assert entries(home) == []
    assert "an answer is not sent" in refusals(home)[-1]["reason"]


def test_an_update_needs_a_job_that_was_let_in(guard, home):
    with pytest.raises(ProtocolError), guard.sending(training(), answer(content=reply_bytes())):
        raise AssertionError("it was let out")
    guard.check(training())
    guard.check(message("query.secrets"))
    with pytest.raises(ProtocolError), guard.sending(training(), answer(content=reply_bytes())):
        raise AssertionError("it was let out")


def test_without_a_ledger_nothing_leaves(guard, home):
    guard.check(training())
    home.ledger_file.write_bytes(b"damaged" * 1000)
    with pytest.raises(IntegrityError, match="ledger"):
        guard.sending(training(), answer(content=reply_bytes())).__enter__()


# Masked sums


def letter_bytes(kind=letters.Announcement, body=b"", **fields) -> bytes:
    letter = kind(transcript="e" * 64, device=0, **fields)
    return letters.encode(letter, body, lambda _: b"signature")


KEYS = {"share_key": "1" * 64, "mask_key": "2" * 64}
TRAINED = encode(Trained(**ADDRESS, seconds=30.0, peak_rss_mb=40.0))


def test_a_masked_job_tells_that_it_is_done_and_keeps_its_update(guard, home):
    masked = task_bytes(masked=True)
    assert guard.check(training(masked)) is None
    with guard.sending(training(masked), answer(content=TRAINED)):
        pass
    ((entry, _),) = entries(home)
    assert (entry.kind, entry.round, entry.clip_norm) == (Kind.NOTICE, 3, None)
    assert (home.usage(NOW).seconds, home.peak()) == (30.0, 40_000_000)


@pytest.mark.parametrize(
    ("masked", "content"),
    [
        (True, reply_bytes()),
        (True, encode(Trained(**ADDRESS, seconds=1.0, peak_rss_mb=1.0), VECTOR)),
        (False, TRAINED),
    ],
)
def test_an_update_in_the_clear_stays_if_the_task_is_masked(guard, home, masked, content):
    guard.check(training(task_bytes(masked=masked)))
    with (
        pytest.raises(ProtocolError, match="against the task; it stays here"),
        guard.sending(training(), answer(content=content)),
    ):
        raise AssertionError("it was let out")
    assert entries(home) == []


def test_an_owner_may_want_masks(guard, home, tmp_path):
    wanted = Privacy(smallest_cohort=1, masks_required=True)
    set_policy(home, easy_policy(tmp_path, privacy=wanted))
    assert guard.check(training()) == "policy"
    assert "asked: an update in the clear" in refusals(home)[-1]["reason"]
    assert guard.check(training(task_bytes(masked=True))) is None
    assert guard.check(message(DESCRIBE)) == "policy", "nor will there be a job that suits"


def letter(content=None, ticket=None):
    content = content or letter_bytes(**KEYS)
    return message(LETTER, content=content, ticket=ticket or ticket_bytes(content))


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (letter_bytes(**KEYS), Kind.SHARES),
        (letter_bytes(letters.Consent), Kind.SHARES),
    ],
)
def test_letters_are_on_record_by_what_is_in_them(guard, home, reply, kind):
    asked = letter()
    assert guard.check(asked) is None
    with guard.sending(asked, answer(content=reply)):
        pass
    ((entry, confirmed),) = entries(home)
    assert confirmed
    assert (entry.kind, entry.run, entry.round) == (kind, "run", 3)
    assert (entry.num_bytes, entry.digest) == (len(reply), digest_of(reply))
    assert home.usage(NOW).seconds == 0


@pytest.mark.parametrize(
    "reply",
    [
        reply_bytes(),
        TRAINED,
        b"nonsense",
        letters.encode(letters.Survivors(transcript="e" * 64, survivors=(0, 1))),
    ],
)
def test_what_is_no_letter_of_a_device_stays(guard, home, reply):
    asked = letter()
    guard.check(asked)
    with pytest.raises(ProtocolError), guard.sending(asked, answer(content=reply)):
        raise AssertionError("it was let out")
    assert entries(home) == []


def test_a_letter_needs_a_ticket_and_gates_that_are_open(guard, home, tmp_path):
    content = letter_bytes(**KEYS)
    assert guard.check(letter(ticket=ticket_bytes(content, key=new_signing_key()))) == "ticket"
    assert guard.check(letter(ticket=ticket_bytes(b"another"))) == "ticket"
    assert guard.check(message(LETTER)) == "ticket"
    none = Resources(network_mb_per_month=0, spare_memory_mb=0, spare_disk_mb=0)
    set_policy(home, easy_policy(tmp_path, resources=none))
    assert guard.check(letter()) == "policy"


def test_a_letter_takes_no_memory_and_no_training(guard, home, tmp_path):
    small = Resources(memory_mb=0, spare_memory_mb=0, spare_disk_mb=0)
    less = Training(largest_steps=1)
    set_policy(home, easy_policy(tmp_path, resources=small, training=less))
    assert guard.check(training()) == "policy"
    assert guard.check(letter()) is None


NOISE = Noise(
    mode=Mode.DISTRIBUTED, noise_multiplier=2.0, delta=1e-6, tolerated_dropouts=0.5, clip_steps=9
)


def test_noise_is_paid_for_when_the_masked_update_leaves(guard, home):
    masked = task_bytes(masked=True, noise=NOISE)
    for number in range(2):
        assert guard.check(training(masked)) is None
        with guard.sending(training(masked), answer(content=TRAINED)):
            pass
        assert guard.check(letter()) is None
        upload = letter_bytes(letters.Upload, b"words")
        with guard.sending(letter(), answer(content=upload)):
            pass
        (entry, _), (notice, _) = entries(home)[-1:] + entries(home)[-2:-1]
        assert (notice.epsilon, notice.noise) == (None, None)
        assert (entry.kind, entry.clip_norm, entry.noise) == (Kind.MASKED, 1.0, 2.0)
        assert (entry.epsilon, entry.delta) == (NOISE.cost(number * 0.25), 1e-6)
        assert home.usage(NOW).exposure == (number + 1) * 0.25
    assert home.usage(NOW).epsilon == pytest.approx(NOISE.cost(0.0) + NOISE.cost(0.25))


def test_noise_of_the_coordinator_counts_for_an_update_in_the_clear(guard, home):
    central = NOISE.model_copy(update={"mode": Mode.CENTRAL})
    task = task_bytes(noise=central)
    assert guard.check(training(task)) is None
    with guard.sending(training(task), answer(content=reply_bytes())):
        pass
    ((entry, _),) = entries(home)
    assert (entry.kind, entry.epsilon, entry.exposure) == (Kind.UPDATE, NOISE.cost(0.0), 0.25)


def test_an_owner_may_want_noise_and_not_too_little(guard, home, tmp_path):
    for largest, word in ((8.0, None), (1.0, "policy")):
        wanted = Privacy(smallest_cohort=1, noise_required=True, largest_epsilon=largest)
        set_policy(home, easy_policy(tmp_path, privacy=wanted))
        assert guard.check(training(task_bytes(masked=True, noise=NOISE))) == word
        assert guard.check(training()) == "policy"
    assert "asked: an update without noise" in refusals(home)[-1]["reason"]
    loose = NOISE.model_copy(update={"delta": 0.1})
    wanted = Privacy(smallest_cohort=1, largest_epsilon=1000.0)
    set_policy(home, easy_policy(tmp_path, privacy=wanted))
    assert guard.check(training(task_bytes(noise=loose))) == "policy"
    assert "privacy.largest_delta" in refusals(home)[-1]["reason"]


def test_a_promise_in_the_assignment_is_judged_before_there_is_a_task(guard, home, tmp_path):
    wanted = Privacy(smallest_cohort=1, noise_required=True)
    set_policy(home, easy_policy(tmp_path, privacy=wanted))
    assert guard.check(message(DESCRIBE)) == "policy"
    promised = ASSIGNMENT.model_copy(update={"noise": NOISE})
    home.keep_assignment(issue_assignment(promised, SIGNING))
    assert guard.check(message(DESCRIBE)) is None


def test_a_masked_update_of_no_known_task_stays(guard, home):
    assert guard.check(letter()) is None
    with (
        pytest.raises(ProtocolError, match="of no known task"),
        guard.sending(letter(), answer(content=letter_bytes(letters.Upload, b"words"))),
    ):
        raise AssertionError("it was let out")
    assert entries(home) == []


# Envelopes


def opened(envelope, home, keys=ROUND):
    """What the coordinator gets."""
    key = public_key(home.key.read_bytes())
    return open_envelope(
        envelope, keys, key, NOW, device="kitchen", base=BASE, plan=PLAN, mode="plain"
    ).content


def test_an_update_in_the_clear_leaves_in_an_envelope_that_the_round_opens(guard, home):
    guard.check(training())
    with guard.sending(training(), answer(content=reply_bytes())) as envelope:
        assert opened(envelope, home) == reply_bytes()
        assert VECTOR.tobytes() not in envelope


def test_the_same_update_asked_for_again_is_in_the_same_envelope(guard, home):
    def sent(reply, keys=OFFER):
        assert guard.check(training(keys=keys)) is None
        with guard.sending(training(), answer(content=reply)) as envelope:
            return envelope

    first = sent(reply_bytes())
    assert sent(reply_bytes(seconds=31.0)) == first
    again = RoundKeys.new("run", 3, 1, NOW, NOW + 600)
    second = sent(reply_bytes(), again.signed(SIGNING))
    assert opened(second, home, again) == reply_bytes()
    assert opened(sent(reply_bytes(-VECTOR)), home) == reply_bytes(-VECTOR)


def offer_bytes(run="run", number=3, since=-1, until=600, key=SIGNING):
    return RoundKeys.new(run, number, 0, NOW + since, NOW + until).signed(key)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (None, "none came with a task in the clear.*the coordinator must be updated"),
        ("text", "none came with a task in the clear"),
        (b"", "not signed by the pinned coordinator; nothing was sealed"),
        (OFFER[:-1], "not signed by the pinned coordinator"),
        (OFFER[:64] + OFFER[64:].replace(b'"attempt":0', b'"attempt":1'), "not signed by"),
        (offer_bytes(key=new_signing_key()), "not signed by the pinned coordinator"),
        (ticket_bytes(task_bytes()), "not signed by the pinned coordinator"),
        (offer_bytes(run="other"), "of another task"),
        (offer_bytes(number=2), "for round 2 of another task, not 3"),
        (offer_bytes(since=-990, until=-400), "the round is over, or the clock is wrong"),
        (offer_bytes(since=400, until=990), "or the clock is wrong"),
    ],
)
def test_without_round_keys_of_the_coordinator_nothing_is_trained(guard, home, keys, reason):
    assert guard.check(training(keys=keys)) == "round keys"
    assert re.search(reason, refusals(home)[-1]["reason"])
    with pytest.raises(ProtocolError), guard.sending(training(), answer(content=reply_bytes())):
        raise AssertionError("it was let out")


def test_round_keys_of_no_suite_that_is_here_are_refused_before_the_work(guard, home, monkeypatch):
    monkeypatch.setattr(round_keys, "offered", lambda: (9,))
    assert guard.check(training()) == "round keys"
    assert "suites [1, 2], and here are (9,)" in refusals(home)[-1]["reason"]


def test_a_masked_task_needs_no_round_keys(guard):
    assert guard.check(training(task_bytes(masked=True), keys=None)) is None


def test_an_owner_may_want_the_hybrid_suite(guard, home, tmp_path):
    wanted = Privacy(smallest_cohort=2, hybrid_required=True)
    set_policy(home, easy_policy(tmp_path, privacy=wanted))
    assert guard.check(message(DESCRIBE)) is None
    assert guard.check(training(task_bytes(masked=True), keys=None)) is None
    assert guard.check(training()) is None
    classical = RoundKeys.new("run", 3, 0, NOW, NOW + 600, suites=[1])
    assert guard.check(training(keys=classical.signed(SIGNING))) == "policy"
    assert "sealed with X25519 only" in refusals(home)[-1]["reason"]


def test_an_answer_in_the_clear_is_never_let_out_as_it_is():
    task, _ = decode(task_bytes())
    assert isinstance(task, TrainTask)
    job = Job(task, 10, 0.0, 0.0, offer=None)
    with pytest.raises(ProtocolError, match="without round keys to seal it; it stays here"):
        leaving(answer(content=reply_bytes()), job, "c:1", lambda *_: b"")
