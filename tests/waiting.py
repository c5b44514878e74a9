"""Waiting for what real processes and servers do, in tests."""

import time

import psutil


def until(holds, seconds=60.0):
    """What `holds` returned when it first was true; a test that waits for nothing fails."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := holds():
            return found
        time.sleep(0.005)
    raise AssertionError("it never came")


def text_of(path):
    """What a file says now; nothing while it is missing, as in the midst of a log's rotation."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
