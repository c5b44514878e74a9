"""What the conductor decides: state in, action out; and that it acts on it."""

import pytest

from proxymoe.common.supervise import Backoff
from proxymoe.server.conductor import (
    BEGIN_SECONDS,
    Conductor,
    Scene,
    Step,
    Watch,
    begun,
    next_step,
)

BACKOFF = Backoff(first_seconds=2.0, factor=2.0, cap_seconds=60.0, healthy_seconds=60.0)
IDLE = Scene(finished=False, alive=False, run=None)
RUNNING = Scene(finished=False, alive=True, run=7)
DIED = Scene(finished=False, alive=False, run=7)
NOW = 1000.0
FRESH = Watch()


def decided(scene, watch=FRESH, now=NOW):
    return next_step(scene, watch, now, BACKOFF)


@pytest.mark.parametrize("scene", [IDLE, DIED])
def test_without_anything_to_remember_it_starts_a_run(scene):
    assert decided(scene) is Step.START


def test_while_a_process_runs_the_rounds_it_waits():
    assert decided(RUNNING) is Step.WAIT
    assert decided(RUNNING, Watch(6, NOW - 9999, 1)) is Step.WAIT


@pytest.mark.parametrize("alive", [False, True])
def test_when_all_rounds_are_over_it_only_waits(alive):
    assert decided(Scene(True, alive, 7)) is Step.WAIT
    assert decided(Scene(True, alive, 7), Watch(7, NOW - 9999, 1)) is Step.WAIT


def test_a_new_run_has_time_to_begin():
    watch = Watch(8, NOW, 1)
    assert decided(DIED, watch, NOW + BEGIN_SECONDS - 1) is Step.WAIT
    assert decided(DIED, watch, NOW + BEGIN_SECONDS) is Step.START


def test_a_run_that_died_after_a_while_is_followed_at_once():
    assert decided(DIED, Watch(7, NOW - 30, 1)) is Step.START


def test_runs_that_keep_dying_follow_each_other_ever_slower_up_to_a_limit():
    watch, delays = Watch(), []
    now = NOW
    for _ in range(8):
        watch = begun(watch, 7, now, BACKOFF)
        died = now
        while decided(DIED, watch, now) is Step.WAIT:
            now += 0.5
        delays.append(now - died)
    assert delays == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_a_run_that_lasted_makes_the_next_failure_the_first():
    watch = begun(Watch(6, NOW - 100, failures=5), 7, NOW, BACKOFF)
    assert watch == Watch(7, NOW, 1)


def test_when_no_run_could_be_started_it_tries_again_later():
    watch = begun(Watch(), None, NOW, BACKOFF)
    assert decided(DIED, watch, NOW + 0.9) is Step.WAIT
    assert decided(DIED, watch, NOW + 1.0) is Step.START


class Runs:
    """Flower's runs as they were told."""

    def __init__(self, unfinished=()):
        self.unfinished = list(unfinished)
        self.told = []
        self.away = False

    def start_run(self):
        if self.away:
            raise ConnectionError("away")
        self.told.append("start")
        return 100 + self.told.count("start")

    def stop_run(self, number):
        self.told.append(number)

    def unfinished_runs(self):
        if self.away:
            raise ConnectionError("away")
        return self.unfinished


def conducted(runs, scenes):
    """A conductor that sees these scenes, a minute and a half apart."""
    times = iter(range(0, 10**6, 90))
    now = [0.0]

    def look():
        now[0] = float(next(times))
        return scenes.pop(0)

    return Conductor(runs, look, lambda: now[0], BACKOFF)


def test_what_is_left_of_an_earlier_service_is_ended_before_it_starts_a_run():
    runs = Runs(unfinished=[5, 6])
    conducted(runs, [IDLE]).step()
    assert runs.told == [5, 6, "start"]


def test_a_dead_run_of_its_own_is_ended_by_number():
    runs = Runs()
    scenes = [IDLE, Scene(False, True, 101), Scene(False, False, 101)]
    conductor = conducted(runs, scenes)
    assert [conductor.step() for _ in range(3)] == [Step.START, Step.WAIT, Step.START]
    assert runs.told == ["start", 101, "start"]


def test_it_outlives_a_superlink_that_is_away():
    runs = Runs()
    runs.away = True
    conductor = conducted(runs, [IDLE, IDLE])
    assert conductor.step() is Step.START
    runs.away = False
    assert conductor.step() is Step.START
    assert runs.told == ["start"]


def test_it_ends_when_it_is_told_to():
    pauses = iter([False, False, True])
    runs = Runs()
    conducted(runs, [IDLE, RUNNING]).run(lambda _: next(pauses))
    assert runs.told == ["start"]
