"""A device at work: kept at work by a small process, never twice, and gone when told."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import cast

import numpy as np
import psutil
import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict

from proxymoe.client import node, service
from proxymoe.client.app import client_app, withheld
from proxymoe.client.service import (
    FEDERATED,
    FORSAKEN_SECONDS,
    LINGER_SECONDS,
    MAIN,
    supervise,
)
from proxymoe.client.submodel import open_device
from proxymoe.common.messages import (
    CONTENT,
    DESCRIBE,
    LETTER,
    RECORD,
    TRAIN,
    Refusal,
    Trained,
    TrainTask,
    decode,
    encode,
)
from proxymoe.common.supervise import ChildFailed
from proxymoe.simulations.faults.cohort import honest
from tests.doors import AUTHORITY
from tests.grid import identify
from tests.settled import enrolled, settle
from tests.waiting import is_running, until

flower = pytest.mark.flower
SECONDS = 300.0
"""For what takes a moment on an idle machine."""
IDLE_BYTES = 260e6
"""What supervisor, SuperNode and runner may take together."""


@pytest.fixture
def home(tmp_path, qwen):
    home = enrolled(tmp_path)
    settle(home, qwen)
    return home


def test_the_exit_codes_are_those_of_the_node():
    assert (service.REFUSED, service.MISCONFIGURED) == (node.REFUSED, node.MISCONFIGURED)
    assert vars(service)["LOOPBACK"] == vars(node)["LOOPBACK"]


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (node.REFUSED, r"coordinator at c:1 does not want this device.*node\.log"),
        (node.MISCONFIGURED, r"cannot start with these settings.*node\.log"),
    ],
)
def test_a_node_that_ends_for_good_ends_all_and_the_reason_is_told(home, code, told):
    stand_in = ("/bin/sh", "-c", f"exit {code}")
    with pytest.raises(ChildFailed, match=told):
        supervise(home.path, once=False, coordinator="c:1", port=9, node=stand_in)
    with home.alone():
        pass  # the home is free again


@contextlib.contextmanager
def ended(process):
    """A process that does not outlive the block, whatever fails in it."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def supervisor(home, *node_command):
    words = ["supervise", str(home.path), "always", "c:1", "9", *node_command]
    command = [sys.executable, "-c", MAIN, *words]
    return ended(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))


def node_pid(home):
    with contextlib.suppress(OSError, ValueError):
        return json.loads((home.log / "children.json").read_bytes())["node"]["pid"]
    return None


def test_the_supervisor_is_small_keeps_others_away_and_stops_all_when_told(home):
    with supervisor(home, "/bin/sh", "-c", "exec sleep 60") as first:
        child = until(lambda: node_pid(home), SECONDS)
        with supervisor(home, "/bin/true") as second:
            assert second.wait(SECONDS) == service.FAILED
            assert second.stderr is not None
            assert "second client" in second.stderr.read()
        assert psutil.Process(first.pid).memory_info().rss < 30e6
        first.send_signal(signal.SIGTERM)
        assert first.wait(SECONDS) == service.DONE
    assert not is_running(child)


def test_the_supervisor_imports_nothing_heavy():
    heavy = "{'flwr', 'torch', 'numpy', 'pydantic', 'cryptography', 'grpc', 'httpx', 'rich'}"
    code = f"import sys, proxymoe.client.service; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout == "[]\n"


def test_the_app_is_found_by_name_and_opens_the_device_of_the_environment(home, monkeypatch):
    monkeypatch.setenv(service.HOME, str(home.path))
    assert service.load.__module__ == "proxymoe.client.service"
    message, task = asked(home, 1)
    reply = service.load()(message, _context())
    refusal, _ = decode(reply.content[RECORD][CONTENT])
    assert isinstance(refusal, Refusal)
    mine, _ = decode(task)
    assert (refusal.device, refusal.plan, refusal.reason) == (mine.device, mine.plan, "mismatch")


SAYS = """
import sys
from flwr.app import Context, Message, RecordDict
from proxymoe.client.service import load
from proxymoe.common.messages import DESCRIBE, RECORD
from tests.grid import identify

identify(7)
before = set(sys.modules)
context = Context(run_id=7, node_id=5, node_config={}, state=RecordDict(), run_config={})
answer = load()(Message(RecordDict(), 5, DESCRIBE), context)
print(answer.error.reason if answer.has_error() else dict(answer.content[RECORD]))
print(sorted({"torch", "transformers", "peft"} & set(sys.modules)))
"""


def says(home):
    """What a fresh process says when it is asked who the device is, and what it imported for it."""
    done = subprocess.run(
        [sys.executable, "-c", SAYS],
        env={**os.environ, service.HOME: str(home.path), "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=True,
        text=True,
    )
    return done.stdout.splitlines()


def test_who_a_device_is_takes_no_model_code_to_say_and_is_what_the_open_device_says(home):
    told, imported = says(home)
    identify(7)
    app = client_app(lambda _: open_device(home))
    opened = app(Message(RecordDict(), 5, DESCRIBE), _context())
    assert told == str(dict(opened.content[RECORD]))
    assert imported == "[]"


def test_without_its_submodel_a_device_fails_as_the_open_one_does(home):
    shutil.rmtree(home.submodels)
    told, _ = says(home)
    identify(7)
    app = client_app(lambda _: open_device(home))
    failed = app(Message(RecordDict(), 6, DESCRIBE), _context(node=6))
    assert told == failed.error.reason == "the device failed (CheckpointError)"


def _context(node=5):
    return Context(run_id=7, node_id=node, node_config={}, state=RecordDict(), run_config={})


def asked(home, number, kind=TRAIN, **fields):
    """A message with the task of a round."""
    identify(7)
    assignment = home.assignment()
    named = assignment.model_dump(include={"run", "device", "base", "plan", "layout", "clip_norm"})
    task = encode(
        TrainTask(**named, round=number, train=assignment.train, seed=0, **fields),
        np.zeros(3, np.float32),
    )
    return Message(RecordDict({RECORD: ConfigRecord({CONTENT: task})}), 5, kind), task


def test_the_adapter_of_an_answered_task_is_kept(home):
    message, task = asked(home, 1)
    assert service._seconds_left(home, message, RecordDict(), None) is None
    assert (home.adapters / FEDERATED).read_bytes() == task
    later, _ = asked(home, 2)
    service._seconds_left(home, later, Error(2, "no"), None)
    service._seconds_left(home, asked(home, 3, DESCRIBE)[0], RecordDict(), None)
    assert (home.adapters / FEDERATED).read_bytes() == task, "of answered tasks only"


def test_after_the_last_round_a_device_leaves_soon(home):
    left = [service._seconds_left(home, asked(home, n)[0], RecordDict(), 2) for n in (1, 2, 3)]
    assert left == [None, LINGER_SECONDS, LINGER_SECONDS]


@pytest.fixture
def updates(home, monkeypatch):
    """What waits on the device, as its runner has it."""
    monkeypatch.setenv(service.HOME, str(home.path))
    service.masked_updates.cache_clear()
    yield service.masked_updates()
    service.masked_updates.cache_clear()


def test_an_update_of_a_masked_task_waits_and_others_pass(home, updates):
    reply = RecordDict({RECORD: ConfigRecord({CONTENT: honest(asked(home, 1)[1])})})
    openly, _ = asked(home, 1)
    assert withheld(openly, reply, updates.withhold) is reply
    masked, _ = asked(home, 1, masked=True)
    instead = withheld(masked, reply, updates.withhold)
    assert isinstance(instead, RecordDict)
    told, vector = decode(cast("bytes", instead[RECORD][CONTENT]))
    assert isinstance(told, Trained)
    assert vector.size == 0
    failure = Error(2, "no")
    assert withheld(masked, failure, updates.withhold) is failure


def test_a_masked_update_is_waited_with_until_it_is_given_away(home, updates):
    masked, _ = asked(home, 2, masked=True)
    assert service._seconds_left(home, masked, RecordDict(), 2) == FORSAKEN_SECONDS
    letter, _ = asked(home, 2, LETTER)
    assert service._seconds_left(home, letter, RecordDict(), 2) is None
    updates.given_away = 1
    assert service._seconds_left(home, letter, RecordDict(), 2) is None
    updates.given_away = 2
    assert service._seconds_left(home, letter, RecordDict(), 2) == LINGER_SECONDS
    assert service._seconds_left(home, letter, RecordDict(), None) is None


def test_letters_are_answered_by_the_app(home, updates):
    identify(7)
    letter, _ = asked(home, 1, LETTER)
    told = service.load()(letter, _context())
    assert "no part in" in told.error.reason


@flower
@pytest.mark.slow
def test_an_idle_device_is_small_waits_for_its_coordinator_and_leaves_nothing_behind(home):
    code = "import sys; from proxymoe.client.cli import app; app(sys.argv[1:])"
    words = [sys.executable, "-c", code, "join", "--home", str(home.path)]
    home.write_private(home.authority, AUTHORITY.certificate)
    with ended(subprocess.Popen(words)) as device:
        until(lambda: _are_ready(home), SECONDS)
        processes = psutil.Process(device.pid).children(recursive=True)
        sizes = [p.memory_info().rss for p in (psutil.Process(device.pid), *processes)]
        assert sum(sizes) < IDLE_BYTES, sizes
        device.send_signal(signal.SIGTERM)
        assert device.wait(SECONDS) == service.DONE
    assert not any(is_running(process.pid) for process in processes)


def _are_ready(home):
    with contextlib.suppress(OSError, ValueError):
        children = json.loads((home.log / "children.json").read_bytes())
        return all(child["ready"] for child in children.values())
    return False
