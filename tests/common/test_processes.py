"""Real processes: a group ends as a whole, its log stays small and keeps secrets."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.processes import HIDDEN, Group, Guard, hide
from tests.waiting import is_running, text_of, until

FAMILY = "sleep 60 & echo $!; exec sleep 60"
"""A process that starts another, which would outlive it."""


@pytest.fixture
def guard():
    found = Guard()
    yield found
    found.dismiss()


@pytest.fixture
def make(tmp_path, guard):
    """Groups that run a shell script; whatever is left of them ends with the test."""
    groups: list[Group] = []

    def group(script, hidden=(), max_log_bytes=10_000, **environment):
        found = Group(tmp_path / f"{len(groups)}.log", max_log_bytes, hidden)
        groups.append(found)
        command = ["/bin/sh", "-c", script]
        found.start(command, environment, lambda: guard.hold([g.pid for g in groups if g.pid]))
        return found

    yield group
    for found in groups:
        found.kill()
        found.close()


def printed(tmp_path, number=0):
    return text_of(tmp_path / f"{number}.log")


def grandchild(tmp_path):
    return int(until(lambda: printed(tmp_path).strip()))


def test_a_process_is_announced_before_it_becomes_its_command(tmp_path):
    group = Group(tmp_path / "log", 1000, ())

    def announce():
        assert is_running(group.pid)
        time.sleep(0.05)
        assert not (tmp_path / "ran").exists()

    group.start(["touch", str(tmp_path / "ran")], {}, announce)
    assert until(lambda: group.code() is not None)
    assert group.code() == 0
    assert (tmp_path / "ran").exists()
    group.kill()


def test_a_process_that_cannot_be_announced_never_runs(tmp_path):
    group = Group(tmp_path / "log", 1000, ())
    pids = []

    def announce():
        pids.append(group.pid)
        raise BrokenPipeError("no guard")

    with pytest.raises(BrokenPipeError, match="no guard"):
        group.start(["touch", str(tmp_path / "ran")], {}, announce)
    assert group.pid is None
    assert not is_running(pids[0])
    assert not (tmp_path / "ran").exists()


def test_all_that_was_printed_is_kept_before_a_killed_group_is_forgotten(make, tmp_path):
    group = make("for i in $(seq 2000); do echo line $i; done")
    until(lambda: group.code() is not None)
    group.kill()
    assert printed(tmp_path).endswith("line 2000\n")


def test_a_process_has_its_environment_and_nothing_to_read(make, tmp_path):
    group = make('echo "$GREETING"; cat; echo end', GREETING="good day")
    until(lambda: group.code() == 0)
    until(lambda: printed(tmp_path) == "good day\nend\n")


def test_what_it_ended_with_is_told(make):
    failed, killed, missing = make("exit 3"), make("kill -9 $$"), make("exec no-such-command")
    assert until(failed.code) == 3
    assert until(killed.code) == -9
    assert until(missing.code) == 127


def test_a_signal_reaches_what_a_process_started(make, tmp_path):
    group = make(FAMILY)
    pid = grandchild(tmp_path)
    group.signal(signal.SIGTERM)
    until(lambda: not is_running(pid))
    until(lambda: not group.is_alive())


def test_a_group_lives_until_its_last_process_ends(make, tmp_path):
    group = make("sleep 60 & echo $!")
    pid = grandchild(tmp_path)
    until(lambda: group.code() == 0)
    assert group.is_alive()
    group.kill()
    until(lambda: not is_running(pid))
    assert not group.is_alive()
    assert group.pid is None


def test_standard_error_and_lines_without_end_are_kept(make, tmp_path):
    make("echo out; echo err >&2; printf unfinished")
    until(lambda: printed(tmp_path) == "out\nerr\nunfinished\n")


def test_bytes_that_are_no_text_are_kept_as_well_as_can_be(make, tmp_path):
    make(r"printf 'a\377b\n'")
    until(lambda: printed(tmp_path) == "a\N{REPLACEMENT CHARACTER}b\n")


def test_logs_stay_small_and_end_with_the_newest(make, tmp_path):
    group = make("for i in $(seq 2000); do echo line $i; done", max_log_bytes=2000)
    until(lambda: printed(tmp_path).endswith("line 2000\n"))
    assert group.code() == 0
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["0.log", "0.log.1"]
    assert all((tmp_path / name).stat().st_size <= 2000 for name in files)


def test_a_log_that_cannot_be_written_does_not_hold_the_process_up(make, tmp_path):
    (tmp_path / "0.log").mkdir()
    group = make("for i in $(seq 5000); do echo a line that fills the pipe; done")
    assert until(lambda: group.code() is not None)
    assert group.code() == 0


def test_secrets_are_blotted_out_of_what_is_printed(make, tmp_path):
    make("echo token=sesame; echo open sesame-street", hidden=["sesame", "sesame-street"])
    until(lambda: printed(tmp_path) == f"token={HIDDEN}\nopen {HIDDEN}\n")


@given(parts=st.lists(st.text("ab-", max_size=4), max_size=5), secret=st.text("ab", min_size=1))
def test_no_secret_is_left_in_a_text(parts, secret):
    assert secret not in hide(secret.join(parts), [secret, ""])


def test_a_text_without_secrets_stays_as_it_is():
    assert hide("nothing to hide", ["", "secret"]) == "nothing to hide"


SUPERVISOR = """
import sys, time
from pathlib import Path
from proxymoe.common.processes import Group, Guard

folder, guard = Path(sys.argv[1]), Guard()
groups = [Group(folder / f"{number}.log", 1000, ()) for number in range(2)]


def announce():
    guard.hold([each.pid for each in groups if each.pid])
    if sys.argv[2] == "held" and groups[1].pid:
        wait()


def wait():
    print(*[group.pid for group in groups], flush=True)
    time.sleep(60)


for group in groups:
    command = ["/bin/sh", "-c", "trap '' TERM; sleep 60 & echo $!; exec sleep 60"]
    group.start(command, {}, announce)
wait()
"""


@pytest.mark.parametrize("second", ["running", "held"])
def test_nothing_outlives_a_killed_supervisor(tmp_path, second):
    with subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, tmp_path, second], stdout=subprocess.PIPE
    ) as supervisor:
        assert supervisor.stdout is not None
        pids = [int(pid) for pid in supervisor.stdout.readline().split()]
        pids.append(grandchild(tmp_path))
        assert all(map(is_running, pids))
        supervisor.kill()
    until(lambda: not any(map(is_running, pids)))


def shells(parent=None):
    """Guards among the children of this process."""
    return [
        child
        for child in psutil.Process(parent).children()
        if any("trap ''" in part for part in child.cmdline())
    ]


def test_a_guard_ignores_what_ends_others_and_is_replaced_when_killed(guard, make, tmp_path):
    group = make(FAMILY)
    pid = grandchild(tmp_path)
    (first,) = shells()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(first.pid, number)
    time.sleep(0.05)
    assert [found.pid for found in shells()] == [first.pid]
    first.kill()
    until(lambda: first.status() == psutil.STATUS_ZOMBIE)
    guard.hold([group.pid])
    (second,) = shells()
    assert second.pid != first.pid
    assert is_running(pid)


def test_a_dismissed_guard_leaves_everything_alone(guard, make):
    group = make("sleep 60")
    guard.dismiss()
    assert shells() == []
    time.sleep(0.02)
    assert group.is_alive()
