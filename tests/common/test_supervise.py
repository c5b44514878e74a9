"""Real children of a real supervisor: in order, back again, all gone at the end."""

import contextlib
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.supervise import Backoff, Child, ChildFailed, Supervisor, listening
from tests.waiting import is_running, text_of, until

SOON = Backoff(first_seconds=0.02, cap_seconds=0.05, healthy_seconds=60.0)


def shell(name, script, **fields):
    return Child(name, ("/bin/sh", "-c", script), **fields)


def forever(name, **fields):
    return shell(name, "exec sleep 60", **fields)


@contextlib.contextmanager
def running(tmp_path, *children, backoff=SOON, **kwargs):
    """A supervisor at work in a thread; the block's end stops it."""
    given = {"pause": lambda seconds: time.sleep(seconds / 20), **kwargs}
    supervisor = Supervisor(children, tmp_path, backoff, **given)
    raised = []

    def run():
        try:
            supervisor.run()
        except ChildFailed as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield supervisor
    finally:
        supervisor.stop()
        thread.join()
    if raised:
        raise raised[0]


def printed(tmp_path, name):
    return text_of(tmp_path / f"{name}.log")


def state(tmp_path):
    return json.loads(text_of(tmp_path / "children.json") or "{}")


def pid_of(tmp_path, name, other_than=None):
    """The process of a child that is ready."""

    def found():
        child = state(tmp_path).get(name, {})
        return child["pid"] if child.get("ready") and child["pid"] != other_than else None

    return until(found)


def test_children_start_in_order_each_when_those_before_are_ready(tmp_path):
    opened = tmp_path / "opened"
    first = forever("first", ready=opened.exists)
    with running(tmp_path, first, forever("second"), forever("third")):
        until(lambda: state(tmp_path).get("first", {}).get("pid"))
        time.sleep(0.1)
        assert state(tmp_path)["second"] == {"pid": None, "ready": False, "failures": 0}
        opened.touch()
        pids = [pid_of(tmp_path, name) for name in ("first", "second", "third")]
        assert pids == sorted(pids)
        assert all(map(is_running, pids))
    assert not any(map(is_running, pids))
    assert {child["pid"] for child in state(tmp_path).values()} == {None}


def test_a_killed_child_comes_back_and_the_others_stay(tmp_path):
    with running(tmp_path, forever("a"), forever("b"), forever("c")):
        before = {name: pid_of(tmp_path, name) for name in "abc"}
        os.kill(before["b"], signal.SIGKILL)
        after = pid_of(tmp_path, "b", other_than=before["b"])
        assert is_running(after)
        assert not is_running(before["b"])
        assert {name: pid_of(tmp_path, name) for name in "ac"} == {
            name: before[name] for name in "ac"
        }


def test_what_a_dead_child_started_is_gone_before_it_comes_back(tmp_path):
    script = f"sleep 60 & echo $! >> {tmp_path}/started; exec sleep 60"
    started = tmp_path / "started"
    with running(tmp_path, shell("a", script)):
        until(lambda: text_of(started))
        os.kill(pid_of(tmp_path, "a"), signal.SIGKILL)
        first, second = until(lambda: len(found := text_of(started).split()) == 2 and found)
        assert not is_running(int(first))
        assert is_running(int(second))
    assert not is_running(int(second))


def test_a_child_waits_to_come_back_for_all_before_it(tmp_path):
    opened = tmp_path / "opened"
    opened.touch()
    first = forever("first", ready=opened.exists)
    with running(tmp_path, first, forever("second"), forever("third")):
        pids = {name: pid_of(tmp_path, name) for name in ("first", "second", "third")}
        opened.unlink()
        for name in ("first", "third"):
            os.kill(pids[name], signal.SIGKILL)
        until(lambda: state(tmp_path)["first"]["pid"] not in (None, pids["first"]))
        time.sleep(0.1)
        assert state(tmp_path)["third"]["pid"] is None
        opened.touch()
        assert is_running(pid_of(tmp_path, "third", other_than=pids["third"]))
        assert pid_of(tmp_path, "second") == pids["second"]


def test_children_stop_in_reverse_order_each_when_those_after_are_gone(tmp_path):
    script = "trap 'echo {0} >> {1}/ended; exit' TERM; echo up; while :; do sleep 0.01; done"
    children = [shell(name, script.format(name, tmp_path)) for name in "abc"]
    with running(tmp_path, *children):
        for name in "abc":
            until(lambda name=name: printed(tmp_path, name))
    assert (tmp_path / "ended").read_text().split() == ["c", "b", "a"]


def test_one_that_does_not_listen_is_killed_after_the_grace_period(tmp_path, caplog):
    deaf = shell("deaf", "trap '' TERM; echo up; while :; do sleep 0.01; done")
    with running(tmp_path, deaf, grace_seconds=0.2):
        until(lambda: printed(tmp_path, "deaf"))
        pid = pid_of(tmp_path, "deaf")
    assert not is_running(pid)
    assert "deaf: killed after" in caplog.text


class Timetable:
    """A clock that moves only when somebody waits, and real time to match, a little."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def pause(self, seconds):
        self.now += seconds
        time.sleep(0.002)


def delays(caplog):
    return [float(r.args[2]) for r in caplog.records if "again in" in r.msg]


def test_failures_in_a_row_wait_longer_until_the_cap_and_then_give_up(tmp_path, caplog):
    clock = Timetable()
    backoff = Backoff(1.0, 2.0, cap_seconds=6.0, max_failures=5)
    draws = itertools.cycle([0.0, 1.0])
    child = shell("bad", "echo why; exit 7", ready=lambda: False, ready_seconds=1e6)
    given = {"clock": clock, "pause": clock.pause, "draw": lambda: next(draws)}
    with (
        pytest.raises(ChildFailed, match=r"bad exited with 7; 6 failures.*limit is 5.*bad\.log"),
        running(tmp_path, child, forever("never"), backoff=backoff, **given),
    ):
        until(lambda: state(tmp_path).get("bad", {}).get("failures") == 6)
    assert delays(caplog) == [0.5, 2.0, 2.0, 6.0, 3.0]
    assert (tmp_path / "bad.log").read_text() == "why\n" * 6
    assert not (tmp_path / "never.log").exists()
    assert state(tmp_path)["bad"]["pid"] is None


def test_a_code_that_gives_up_ends_the_group_at_once_and_says_what_it_means(tmp_path):
    bad = shell("bad", "sleep 0.2; exit 77", gives_up={77: "nobody wants it"})
    supervisor = Supervisor([forever("good"), bad], tmp_path)
    with pytest.raises(ChildFailed, match=r"^bad: nobody wants it; see .*bad\.log$") as raised:
        supervisor.run()
    assert raised.value.code == 77
    assert [child["pid"] for child in state(tmp_path).values()] == [None, None]


def test_other_codes_do_not_give_up(tmp_path):
    with running(tmp_path, shell("a", "echo run; exit 76", gives_up={77: "nobody wants it"})):
        until(lambda: printed(tmp_path, "a").count("run") > 1)


def test_a_healthy_period_forgets_old_failures(tmp_path, caplog):
    clock = Timetable()
    backoff = Backoff(1.0, 4.0, cap_seconds=1e6, healthy_seconds=100.0)
    given = {"clock": clock, "pause": clock.pause, "draw": lambda: 1.0}
    with running(tmp_path, forever("a"), backoff=backoff, **given):
        pid = None
        for healthy in (0, 0, 200, 0):
            pid = pid_of(tmp_path, "a", other_than=pid)
            clock.now += healthy
            os.kill(pid, signal.SIGKILL)
        pid_of(tmp_path, "a", other_than=pid)
    assert delays(caplog) == [1.0, 4.0, 1.0, 4.0]


def test_one_that_is_not_ready_in_time_counts_as_failed(tmp_path, caplog):
    def never():
        raise ConnectionRefusedError

    clock = Timetable()
    slow = forever("slow", ready=never, ready_seconds=5.0)
    with running(tmp_path, slow, clock=clock, pause=clock.pause):
        until(lambda: state(tmp_path).get("slow", {}).get("failures"))
    assert "slow was not ready within 5 s" in caplog.text
    assert clock.now >= 5.0


def test_a_command_that_does_not_exist_is_a_failure_like_any_other(tmp_path):
    absent = Child("absent", ("no-such-command",))
    with (
        pytest.raises(ChildFailed, match="absent exited with 127"),
        running(tmp_path, absent, backoff=Backoff(0.01, max_failures=1)),
    ):
        until(lambda: state(tmp_path).get("absent", {}).get("failures") == 2)
    assert "no-such-command" in (tmp_path / "absent.log").read_text()


def test_secrets_are_in_no_log(tmp_path, caplog):
    child = Child(
        "a",
        ("/bin/sh", "-c", 'echo "$0 and $WORD"; exec sleep 60', "sesame"),
        environment={"WORD": "inherited"},
        secrets=("sesame", "inherited"),
    )
    with caplog.at_level(logging.DEBUG), running(tmp_path, child):
        until(lambda: printed(tmp_path, "a") == "*** and ***\n")
    assert "exec sleep 60' ***" in caplog.text
    assert "sesame" not in caplog.text
    assert "inherited" not in caplog.text + repr(child)


def test_a_state_file_that_cannot_be_written_stops_nobody(tmp_path, caplog):
    (tmp_path / "children.json").mkdir()  # as good as a full disk: no file takes its place
    with running(tmp_path, shell("a", "echo run; exit 1")):
        until(lambda: printed(tmp_path, "a").count("run") > 2)
    assert "cannot be written" in caplog.text


def test_listening_sees_an_open_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert listening("127.0.0.1", port)()
    with pytest.raises(OSError, match="refused"):
        listening("127.0.0.1", port)()


@given(
    failures=st.integers(1, 10**6),
    draw=st.floats(0, 1, exclude_max=True),
    first=st.floats(0.01, 10),
    cap=st.floats(10, 1000),
)
def test_a_delay_is_between_half_and_all_of_what_grows_up_to_the_cap(failures, draw, first, cap):
    backoff = Backoff(first, 2.0, cap)
    delay = backoff.delay(failures, draw)
    full = min(cap, first * 2.0 ** min(failures - 1, 64))
    assert full / 2 <= delay <= full
    assert backoff.delay(failures, 0.0) <= delay
    assert backoff.delay(failures, draw) <= backoff.delay(failures + 1, draw)


COORDINATOR = """
import logging, sys
from pathlib import Path
from proxymoe.common.supervise import Child, Supervisor

children = [Child(name, ("/bin/sh", "-c", sys.argv[2])) for name in "ab"]
Supervisor(children, Path(sys.argv[1])).run()
print("ended well")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_supervisor_ends_all_its_children(tmp_path, number):
    script = "trap 'echo bye; exit' TERM; sleep 60 & echo $!; while :; do sleep 0.01; done"
    command = [sys.executable, "-c", COORDINATOR, tmp_path, script]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor,
        contextlib.ExitStack() as at_last,
    ):
        at_last.callback(supervisor.kill)  # or a failure here would wait for it for ever
        pids = [pid_of(tmp_path, name) for name in "ab"]
        pids += [int(until(lambda name=name: printed(tmp_path, name))) for name in "ab"]
        supervisor.send_signal(number)
        assert supervisor.stdout is not None
        said = supervisor.stdout.read()
        supervisor.wait()
    until(lambda: not any(map(is_running, pids)))
    gently = number != signal.SIGKILL
    assert (supervisor.returncode, said) == ((0, "ended well\n") if gently else (-9, ""))
    assert [printed(tmp_path, name).endswith("bye\n") for name in "ab"] == [gently] * 2


def test_not_even_a_child_that_kills_its_supervisor_at_once_outlives_it(tmp_path):
    script = f"echo $$ > {tmp_path}/pid; kill -9 $PPID; sleep 60"
    subprocess.run([sys.executable, "-c", COORDINATOR, tmp_path, script], check=False)
    pid = int((tmp_path / "pid").read_text())
    until(lambda: not is_running(pid))
