"""A job process stays warm, dies without harm, and does not outlive who asked."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from proxymoe.client.job import JobDied, JobProcess

SECONDS = 120.0
"""For what takes a moment on an idle machine."""
INSTALLED = """
import os, time

count = 0

def work(job):
    global count
    count += 1
    verb, content = job
    if verb == b"killed by":
        os.kill(os.getpid(), int(content))
    elif verb == b"exit":
        os._exit(int(content))
    elif verb == b"raise":
        raise ValueError("a private word")
    elif verb == b"sleep":
        time.sleep(3600)
    return b"%d, %d" % (os.getpid(), count), content
"""
ORPHAN = """
import time
from installed import work
from proxymoe.client.job import JobProcess

jobs = JobProcess(work)
jobs.ask((b"", b""))
while not jobs.poll(1.0):
    pass
jobs.ask((b"sleep", b""))
print(jobs.pid, flush=True)
time.sleep(3600)
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    (tmp_path / "installed.py").write_text(INSTALLED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    import installed  # type: ignore[import-not-found]

    with contextlib.closing(JobProcess(installed.work)) as jobs:
        yield jobs
    del sys.modules["installed"]


def answer(jobs, verb=b"", content=b""):
    jobs.ask((verb, content))
    soon(lambda: jobs.poll(0.05))
    return jobs.answer()


def soon(holds):
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_jobs_are_answered_by_one_warm_process(jobs):
    content = os.urandom(3 << 20)  # more than a pipe holds
    first, same = answer(jobs, b"", content)
    assert same == content
    assert first == f"{jobs.pid}, 1".encode()
    assert answer(jobs) == (f"{jobs.pid}, 2".encode(), b"")


@pytest.mark.parametrize(
    ("verb", "content", "told"),
    [
        (b"killed by", b"9", "was killed, perhaps for want of memory"),
        (b"killed by", b"11", "was ended by SIGSEGV"),
        (b"exit", b"3", "ended with exit code 3"),
        (b"raise", b"", "ended with exit code 1"),
    ],
)
def test_a_job_that_ends_its_process_is_an_error_and_the_next_one_is_answered(
    jobs, verb, content, told
):
    with pytest.raises(JobDied, match=f"^the job process {told}$"):
        answer(jobs, verb, content)
    assert jobs.pid is None
    assert answer(jobs) == (f"{jobs.pid}, 1".encode(), b"")


def test_a_process_that_died_idle_is_replaced_unnoticed(jobs):
    answer(jobs)
    pid = jobs.pid
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # all its threads are gone
    assert answer(jobs) == (f"{jobs.pid}, 1".encode(), b"")
    assert jobs.pid != pid


def test_an_interrupt_is_not_for_the_job_process(jobs):
    answer(jobs)
    os.kill(jobs.pid, signal.SIGINT)
    assert answer(jobs) == (f"{jobs.pid}, 2".encode(), b"")


def test_closing_ends_a_busy_process_and_a_new_one_can_follow(jobs):
    answer(jobs)
    process = psutil.Process(jobs.pid)
    jobs.ask((b"sleep", b""))
    assert not jobs.poll(0.05)
    jobs.close()
    jobs.close()
    assert not process.is_running()
    assert answer(jobs) == (f"{jobs.pid}, 1".encode(), b"")


def test_a_busy_process_goes_when_who_asked_is_killed(jobs):
    script = [sys.executable, "-c", ORPHAN]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.kill()
    soon(lambda: not psutil.pid_exists(pid))


def test_work_that_the_process_cannot_import_is_an_error(jobs, monkeypatch):
    monkeypatch.delenv("PYTHONPATH")
    with pytest.raises(JobDied, match="ended with exit code 1"):
        answer(jobs)


def test_idle_time_starts_again_with_every_job(jobs):
    time.sleep(0.05)
    assert jobs.idle_seconds >= 0.05
    asked = time.monotonic()
    jobs.ask((b"", b""))
    assert jobs.idle_seconds <= time.monotonic() - asked
    soon(lambda: jobs.poll(0.05))
    answered = time.monotonic()
    jobs.answer()
    assert jobs.idle_seconds <= time.monotonic() - answered
