"""One process at a time, and nobody after a death has to tidy up."""

import subprocess
import sys

import pytest

from proxymoe.common.errors import ConfigError
from proxymoe.server.lock import held, is_held
from tests.waiting import until

HOLDER = """
import sys, time
from pathlib import Path
from proxymoe.server.lock import held
with held(Path(sys.argv[1]), "held"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_it_is_held_while_the_block_runs(tmp_path):
    path = tmp_path / "lock"
    assert not is_held(path)
    with held(path, "taken"):
        assert is_held(path)
    assert not is_held(path)


def test_a_second_holder_is_refused_in_the_words_of_who_asks(tmp_path):
    with (
        held(tmp_path / "lock", "taken"),
        pytest.raises(ConfigError, match="another serve"),
        held(tmp_path / "lock", "another serve"),
    ):
        raise AssertionError("never here")


def test_a_glance_at_the_lock_keeps_nobody_out(tmp_path):
    path = tmp_path / "lock"
    path.touch()
    for _ in range(20):
        assert not is_held(path)
        with held(path, "taken"):
            pass


def test_a_killed_holder_holds_nothing(tmp_path):
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert is_held(path)
        holder.kill()
    until(lambda: not is_held(path))
