"""Waiting for what real processes and servers do, in tests."""

import time

import psutil


def until(holds, seconds=5.0):
    """What `holds` returned when it first was true; a test that waits for nothing fails."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := holds():
            return found
        time.sleep(0.005)
    raise AssertionError("it never came")


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
