"""What a device needs before it can work is waited for, unless somebody refuses it."""

import pytest

import proxymoe.client.prepare as preparing
from proxymoe.client import proxy
from proxymoe.client.home import Home
from proxymoe.client.prepare import PATIENCE, Wish, prepare
from proxymoe.client.proxy import GatesClosed, PolicyRefused
from proxymoe.client.retry import TransferError, TransferRefused
from proxymoe.common.assignment import Application
from proxymoe.common.errors import ConfigError, DataError
from tests.settled import enrolled, settle, write_policy


@pytest.fixture
def home(tmp_path, qwen):
    home = enrolled(tmp_path)
    settle(home, qwen)
    return home


class Coordinator:
    """What the network would do, in the place of `client/proxy.py`."""

    def __init__(self, home, monkeypatch):
        self.home = home
        self.applications = []
        self.failures = []
        for name in ("apply", "describe_data", "fetch_proxy", "fetch_table"):
            monkeypatch.setattr(proxy, name, getattr(self, name))
        monkeypatch.setattr(preparing, "require_reachable", lambda home: None)

    def apply(self, home, application):
        self.applications.append(application)
        if self.failures:
            raise self.failures.pop(0)
        return home.assignment()

    def fetch_proxy(self, home, assignment, progress=None):
        if self.failures:
            raise self.failures.pop(0)

    def fetch_table(self, home, assignment):
        return "table"

    def describe_data(self, home, table):
        return {"banking": 0.75, "travel": 0.25}


@pytest.fixture
def coordinator(home, monkeypatch):
    return Coordinator(home, monkeypatch)


NOTHING = Wish()


def prepared(home, wish=NOTHING):
    """What `prepare` returned, what it told, and how long it would have waited each time."""
    told: list[str] = []
    pauses: list[float] = []
    found = prepare(home, wish, told.append, pause=pauses.append, draw=lambda: 0.0)
    return found, told, pauses


def test_what_is_assigned_already_is_not_applied_for_again(home, coordinator):
    assert prepared(home) == (home.assignment(), [], [])
    assert coordinator.applications == []


@pytest.mark.parametrize(
    ("wish", "applications"),
    [
        (Wish(refresh=True), [{}]),
        (Wish(domain="banking"), [{"domain": "banking"}]),
        (Wish(budget_bytes=9), [{"budget_bytes": 9}]),
        (Wish(mixture=True), [{"mixture": {"banking": 0.75, "travel": 0.25}}]),
        (
            Wish(mixture=True, refresh=True),
            [{}, {"mixture": {"banking": 0.75, "travel": 0.25}}],
        ),
    ],
)
def test_the_coordinator_is_told_what_the_owner_says(home, coordinator, wish, applications):
    prepared(home, wish)
    assert coordinator.applications == [Application(**fields) for fields in applications]


def test_a_coordinator_that_is_away_is_waited_for_ever_longer_and_told_of_ever_more_rarely(
    home, coordinator
):
    coordinator.failures = [TransferError("away")] * 19 + [GatesClosed([])]
    _, told, pauses = prepared(home, Wish(refresh=True))
    assert [line.partition(";")[0] for line in told] == ["away"] * 5, "at 1, 2, 4, 8, 16"
    assert pauses[:3] == [1.0, 2.0, 4.0]
    assert max(pauses) == PATIENCE.cap_seconds / 2
    assert len(pauses) == 20


def test_one_that_cannot_be_reached_costs_no_entry_in_the_ledger(home):
    class Enough(Exception):
        pass

    def enough(_):
        raise Enough

    told: list[str] = []
    with pytest.raises(Enough):
        prepare(home, Wish(refresh=True), told.append, pause=enough)
    assert "the coordinator at 127.0.0.1:9 is away" in told[0]
    assert home.ledger().totals().num_entries == 0


@pytest.mark.parametrize("refusal", [TransferRefused("unknown"), PolicyRefused([])])
def test_a_refusal_is_not_waited_for(home, coordinator, refusal):
    coordinator.failures = [refusal]
    with pytest.raises(type(refusal)):
        prepared(home, Wish(refresh=True))


def test_what_asks_for_more_than_the_policy_is_refused_and_the_key_is_named(home):
    write_policy(home, data={"folder": home.path.parent / "data"}, training={"largest_steps": 1})
    with pytest.raises(PolicyRefused, match=r"4 steps.*1 steps.*training\.largest_steps"):
        prepared(home)


def test_what_is_missing_is_named(tmp_path, home):
    with pytest.raises(ConfigError, match="enrol first"):
        prepared(Home.create(tmp_path / "new"))
    with home.alone(), pytest.raises(ConfigError, match="second client"):
        prepared(Home(home.path))
    write_policy(home)
    with pytest.raises(DataError, match=r"data\.folder"):
        prepared(home)
    home.policy_file.write_text("[when]\nwindows = 1")
    with pytest.raises(ConfigError, match=r"unknown key; the nearest is when\.window"):
        prepared(home)
