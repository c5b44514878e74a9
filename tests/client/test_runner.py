"""Only what is installed answers, and whatever happens, there is an answer.

The runner is tried on the API of a SuperNode in this process, and at last on a whole device.
"""

import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict, UserConfig
from flwr.common.serde import run_from_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.inflatable.inflatable_object import get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from proxymoe.client import node, runner, service
from proxymoe.client import supernode as supernode_api
from proxymoe.client.app import enveloped
from proxymoe.client.entries import Kind
from proxymoe.client.guard import Guard
from proxymoe.client.inventory import describe
from proxymoe.client.runner import DIED, FAILED, MAX_REASON, REFUSED, Runner
from proxymoe.common.errors import ConfigError
from proxymoe.common.messages import DESCRIBE, RECORD
from proxymoe.common.offline import flower_environment
from tests.grid import identify
from tests.settled import enrolled, settle, write_policy

flower = pytest.mark.flower
SECRET = b"what SuperNode and runner share"
SECONDS = 180.0
"""For what takes a moment on an idle machine."""
RUN, NODE = 7, 5
INSTALLED = """
import os, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

answered = 0

def load():
    app = ClientApp()

    @app.query("wish")
    def wish(message, context):
        global answered
        answered += 1
        seen = context.state.setdefault("seen", ConfigRecord({"count": 0}))
        seen["count"] += 1
        verb = message.content["asked"]["verb"]
        if verb == "die":
            os.kill(os.getpid(), 9)
        elif verb == "raise":
            raise KeyError("a private word")
        elif verb == "sleep":
            time.sleep(3600)
        told = {"by": "installed", "pid": os.getpid(), "warm": answered, "count": seen["count"]}
        rest = {name: record for name, record in message.content.items() if name != "asked"}
        return Message(RecordDict({"told": ConfigRecord(told), **rest}), reply_to=message)

    return app

def broken():
    raise ImportError("a private path")

def check(message):
    return message.content["asked"]["verb"].partition("refuse ")[2] or None
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The app of a device, as a module that can be imported by name."""
    (tmp_path / "installed_app.py").write_text(INSTALLED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    import installed_app  # type: ignore[import-not-found]

    yield installed_app
    del sys.modules["installed_app"]


@pytest.fixture
def home(tmp_path, qwen):
    """A device that is enrolled, and has its submodel."""
    home = enrolled(tmp_path)
    settle(home, qwen)
    return home


def soon(find):
    """What `find` returns, as soon as that is something."""
    deadline = time.monotonic() + SECONDS
    while not (found := find()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def python(code, **environment):
    script = [sys.executable, "-c", code]
    environment = {**os.environ, **environment}
    return subprocess.run(script, env=environment, capture_output=True, check=False, text=True)


def test_the_runner_imports_no_model_code():
    heavy = "{'torch', 'transformers', 'peft', 'ray', 'fastapi', 'proxymoe.client.app'}"
    code = "import sys, proxymoe.client.runner; print(sorted({} & set(sys.modules)))"
    done = python(code.format(heavy))
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_it_does_not_start_with_another_minor_version_of_flower(tmp_path):
    folder = tmp_path / "flwr-1.42.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: flwr\nVersion: 1.42.0\n")
    done = python("import proxymoe.client.runner", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "ConfigError: flwr 1.42.0 is installed" in done.stderr
    assert "pip install 'flwr==1.41.*'" in done.stderr


class SuperNode:
    """The Runtime API of a SuperNode in this process, on loopback; coordinators are played."""

    def __init__(self, port=0):
        from flwr.supercore.fab import Fab
        from flwr.supercore.object_store import ObjectStoreFactory
        from flwr.supercore.run import Run
        from flwr.supernode.main import create_app
        from flwr.supernode.nodestate import NodeStateFactory
        from uvicorn import Config, Server

        identify(RUN)
        factory = NodeStateFactory(ObjectStoreFactory())
        bundle = b"not even a zip file"
        run = Run.create_empty(RUN)
        run.fab_hash = self._bundle = hashlib.sha256(bundle).hexdigest()
        self.state: Any = factory.state()
        self.state.set_node_id(NODE)
        self.state.store_run(run)
        self.state.store_fab(Fab(run.fab_hash, bundle, {}))
        context = Context(RUN, NODE, UserConfig(), RecordDict(), UserConfig())
        self.state.set_run_series_context(run.series_id, context)
        self._replies = {}
        self._socket = socket.create_server(("127.0.0.1", port))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        settings = Config(create_app(factory, SECRET), log_level="error", ws="none")
        self._server = Server(settings)
        self._thread = threading.Thread(target=self._server.run, args=[[self._socket]])
        self._thread.start()
        soon(lambda: self._server.started or not self._thread.is_alive())
        assert self._thread.is_alive()

    def close(self):
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def task(self):
        return self.state.create_task("flwr-clientapp", RUN, self._bundle)

    def store(self, message):
        from flwr.supernode.start_client_internal import _insert_message

        _insert_message(message, self.state, self.state.object_store)
        return message.metadata.message_id

    def ask(self, verb, **records):
        """The id of a message that has just been received."""
        self.task()
        return self.store(wish(verb, **records))

    def pulled(self, message_id):
        """The id itself, when the runner has got the message."""
        soon(lambda: self.state.msg_store[message_id].is_retrieved)
        return message_id

    def cut_off(self, message):
        """Has a message pulled as Flower leaves it when its run ends while parts are under way."""
        message.metadata.__dict__["_message_id"] = message.object_id
        self.state.object_store.preregister(RUN, get_object_tree(message))
        self.state.store_message(message)
        self.pulled(message.object_id)

    def reply(self, message_id):
        """What the SuperNode would send in reply to a message."""

        def find():
            for found in self.state.get_messages_legacy(is_reply=True):
                self._replies[found.metadata.reply_to_message_id] = found.metadata.message_id
            return self._replies.pop(message_id, None)

        store: Any = self.state.object_store
        name = soon(find)
        parts = [part.object_id for part in iterate_object_tree(store.get_object_tree(name))]
        soon(lambda: all(map(store.get, parts)))
        return inflate_object_from_contents(name, {part: store.get(part) for part in parts})

    def told(self, verb, **records):
        reply = self.reply(self.ask(verb, **records))
        assert not reply.has_error(), reply.error
        return dict(reply.content["told"])

    def error(self, verb, **records):
        error = self.reply(self.ask(verb, **records)).error
        return error.code, error.reason


def wish(verb, ttl=SECONDS, **records):
    content = {"asked": ConfigRecord({"verb": verb}), **records}
    return Message(RecordDict(content), NODE, "query.wish", ttl=ttl)


@pytest.fixture
def supernode():
    with contextlib.closing(SuperNode()) as supernode:
        yield supernode


@contextlib.contextmanager
def running(a_runner):
    """The runner at work; what it raises is raised when the block ends."""
    stop, raised = threading.Event(), []

    def run():
        try:
            a_runner.run(stop)
        except ConfigError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join()
    if raised:
        raise raised[0]


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(supernode_api, "HEARTBEAT_SECONDS", 0.1)


@pytest.fixture
def device(installed, supernode, fast):
    """A SuperNode, its runner, and the pid of the job process when asked for."""
    a_runner = Runner(supernode.address, SECRET, installed.load, installed.check)
    supernode.runner = a_runner
    with running(a_runner):
        yield supernode


@flower
def test_messages_are_answered_by_one_warm_process_and_the_context_is_kept(device):
    first, second = device.told("go"), device.told("go")
    assert first == {"by": "installed", "pid": first["pid"], "warm": 1, "count": 1}
    assert second == {"by": "installed", "pid": first["pid"], "warm": 2, "count": 2}
    assert first["pid"] != os.getpid()


@flower
def test_a_message_and_its_reply_may_be_large_and_hold_the_same_tensor_twice(device):
    numbers = np.arange(3 << 18, dtype=np.float64)  # 6 MiB, more than Flower sends in one piece
    tensors = ArrayRecord({"a": Array(numbers), "b": Array(numbers)})
    message = device.ask("go", tensors=tensors)
    reply = device.reply(message)
    assert device.state.object_store.get(message) is None, "the SuperNode may forget it"
    for tensor in reply.content["tensors"].values():
        assert np.array_equal(tensor.numpy(), numbers)


@flower
def test_an_app_that_dies_or_raises_is_an_error_and_the_next_message_is_answered(device):
    before = device.told("go")
    died = "the job process was killed, perhaps for want of memory"
    assert device.error("die") == (DIED, died)
    after = device.told("go")
    assert after["pid"] != before["pid"]
    assert (after["warm"], after["count"]) == (1, 2), "the context is as before the death"
    assert device.error("raise") == (FAILED, "the device failed (KeyError)")
    assert device.told("go")["pid"] == after["pid"]


@flower
def test_a_refused_message_gets_the_reason_and_the_app_is_not_called(device):
    assert device.error("refuse on battery") == (REFUSED, "on battery")
    assert device.error("refuse " + "x" * 999) == (REFUSED, "x" * MAX_REASON)
    assert device.told("go")["count"] == 1


@flower
def test_a_check_that_fails_refuses(installed, supernode, fast):
    def check(message):
        raise OSError("/home/ada")

    with running(Runner(supernode.address, SECRET, installed.load, check)):
        assert supernode.error("go") == (REFUSED, "the check failed (OSError)")


@flower
def test_an_app_that_cannot_be_made_is_an_error(installed, supernode, fast):
    with running(Runner(supernode.address, SECRET, installed.broken, installed.check)):
        assert supernode.error("go") == (FAILED, "the device failed (ImportError)")


@flower
def test_a_message_that_is_too_large_is_refused(device, monkeypatch):
    monkeypatch.setattr(supernode_api, "MAX_MESSAGE_BYTES", 1 << 20)
    message = device.ask("go", padding=ConfigRecord({"bytes": bytes(1 << 20)}))
    error = device.reply(message).error
    assert (error.code, error.reason) == (REFUSED, "more than 1 MiB of message")
    assert device.told("go")["count"] == 1
    assert device.state.object_store.get(message) is None, "the SuperNode may forget it"


@flower
def test_a_message_that_cannot_be_read_is_refused(device):
    message = wish("go")
    content = message.deflate().replace(b"Message", b"CustomDataClass", 1)
    name = hashlib.sha256(content).hexdigest()
    tree = get_object_tree(message)
    device.state.object_store.preregister(RUN, ObjectTree(object_id=name, children=tree.children))
    for part in (content, message.content["asked"].deflate(), message.content.deflate()):
        device.state.object_store.put(hashlib.sha256(part).hexdigest(), part)
    message.metadata.__dict__["_message_id"] = name
    device.task()
    device.state.store_message(message)
    error = device.reply(name).error
    assert (error.code, error.reason) == (REFUSED, "the message cannot be read")


@flower
def test_a_message_may_come_later_than_its_task_and_its_objects_still_later(device):
    message = wish("go")
    device.task()
    time.sleep(0.3)
    message.metadata.__dict__["_message_id"] = name = message.object_id
    device.state.object_store.preregister(RUN, get_object_tree(message))
    device.state.store_message(message)
    time.sleep(0.3)
    for part in (message.content["asked"], message.content, message):
        device.state.object_store.put(part.object_id, part.deflate())
    assert device.reply(name).content["told"]["count"] == 1


@flower
@pytest.mark.parametrize("is_listed", [False, True])
def test_a_message_that_never_comes_whole_is_given_up_when_another_comes(device, is_listed):
    message = wish("go")
    device.task()
    if is_listed:
        device.cut_off(message)
    time.sleep(0.3)
    assert [device.told("go")["count"] for _ in range(2)] == [1, 2]


@flower
def test_a_message_that_is_given_up_leaves_nothing_that_would_pass_for_the_next_answer(device):
    task = device.task()
    device.cut_off(wish("go"))
    answered = device.ask("go")
    assert device.reply(answered).content["told"]["count"] == 1
    assert device.state.get_tasks(task_ids=[task])[0].status.sub_status == "failed"
    soon(lambda: not device.state.task_token_store)  # or it would lapse, with an error for answer


@flower
def test_a_runner_can_be_stopped_while_it_waits_for_a_message(installed, supernode, fast):
    with running(Runner(supernode.address, SECRET, installed.load, installed.check)):
        task = supernode.task()
        soon(lambda: supernode.state.get_tasks(task_ids=[task])[0].status.status == "running")
    assert supernode.state.get_tasks(task_ids=[task])[0].status.sub_status == "failed"


@flower
def test_a_task_that_the_supernode_gives_up_ends_the_work_on_it(device):
    pid = device.told("go")["pid"]
    task = device.task()
    device.pulled(device.store(wish("sleep")))
    assert device.state.finish_task(task, "failed", "given up")
    soon(lambda: not psutil.pid_exists(pid))
    assert device.told("go")["warm"] == 1


@flower
def test_a_message_is_worked_on_no_longer_than_it_lives(device):
    device.told("go")
    device.task()
    error = device.reply(device.store(wish("sleep", ttl=0.5))).error
    assert (error.code, error.reason) == (DIED, "the device took longer than the message lives")


@flower
def test_a_runner_that_is_stopped_says_so_and_leaves_no_process(installed, supernode, fast):
    with running(Runner(supernode.address, SECRET, installed.load, installed.check)):
        pid = supernode.told("go")["pid"]
        message = supernode.pulled(supernode.ask("sleep"))
    assert not psutil.pid_exists(pid)
    error = supernode.reply(message).error
    assert (error.code, error.reason) == (DIED, "the device was stopped")


@flower
def test_the_job_process_ends_when_it_is_idle_and_comes_back(installed, supernode, fast):
    a_runner = Runner(supernode.address, SECRET, installed.load, installed.check, idle_seconds=0.2)
    with running(a_runner):
        first = supernode.told("go")
        soon(lambda: not psutil.pid_exists(first["pid"]))
        second = supernode.told("go")
        assert (second["warm"], second["count"]) == (1, 2)


@flower
def test_what_is_light_is_answered_without_a_job_process(installed, supernode, fast):
    checks = Runner(
        supernode.address, SECRET, installed.load, installed.check, light={"query.wish"}
    )
    with running(checks):
        assert supernode.told("go") == {
            "by": "installed",
            "pid": os.getpid(),
            "warm": 1,
            "count": 1,
        }
        assert supernode.error("refuse on battery") == (REFUSED, "on battery")
        assert supernode.error("raise") == (FAILED, "the device failed (KeyError)")
        assert supernode.told("go")["count"] == 3, "what raised has counted before it did"
        assert checks._jobs.pid is None


@flower
def test_a_device_says_who_it_is_past_the_guard_and_on_record(supernode, fast, home, monkeypatch):
    def told():
        supernode.task()
        return supernode.reply(supernode.store(Message(RecordDict(), NODE, DESCRIBE, ttl=SECONDS)))

    monkeypatch.setenv(service.HOME, str(home.path))
    guard = Guard(home)

    @contextlib.contextmanager
    def sending(message, answer):
        with guard.sending(message, answer) as envelope:
            yield enveloped(answer, envelope)

    a_runner = Runner(
        supernode.address, SECRET, service.load, guard.check, sending, light={DESCRIBE}
    )
    with running(a_runner):
        assert dict(told().content[RECORD]) == describe(home).model_dump()
        shutil.rmtree(home.submodels)
        assert told().error.reason == "the device failed (CheckpointError)"
        write_policy(home, privacy={"smallest_cohort": 2})
        assert (told().error.code, told().error.reason) == (REFUSED, "policy")
        assert a_runner._jobs.pid is None
    found = [record.entry.kind for record in reversed(home.ledger().newest())]
    assert found == [Kind.DESCRIPTION, *[Kind.REFUSAL] * 3]


@flower
def test_a_supernode_with_another_secret_is_named(installed, supernode, fast):
    a_runner = Runner(supernode.address, b"another", installed.load, installed.check)
    told = f"the SuperNode at {supernode.address} has another secret"
    with pytest.raises(ConfigError, match=told), running(a_runner) as thread:
        thread.join(SECONDS)


@flower
def test_a_supernode_that_is_away_is_waited_for_and_told_of_once(installed, fast, caplog):
    with contextlib.closing(SuperNode()) as before:
        address = before.address
    port = int(address.rpartition(":")[2])
    with running(Runner(address, SECRET, installed.load, installed.check)):
        time.sleep(0.3)
        assert caplog.text.count(f"the SuperNode at {address} is away") == 1
        with contextlib.closing(SuperNode(port)) as after:
            assert after.told("go")["count"] == 1


HOSTILE = """
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

Path({marker!r}).touch()
client = ClientApp()
server = ServerApp()

@client.query("wish")
def wish(message, context):
    Path({marker!r}).touch()
    return Message(RecordDict({{"told": ConfigRecord({{"by": "bundle"}})}}), reply_to=message)

@server.main()
def main(grid, context):
    pass
"""
BUNDLE = """
[project]
name = "hostile"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "eve"
[tool.flwr.app.components]
serverapp = "hostile.app:server"
clientapp = "hostile.app:client"
"""
RUNNER = """
import sys, threading
from pathlib import Path
from installed_app import check, load
from proxymoe.client.runner import Runner

secret = Path(sys.argv[2]).read_bytes()
Runner(sys.argv[1], secret, load, check, idle_seconds=20.0).run(threading.Event())
"""


class Deployment:
    """A SuperLink, a SuperNode and a runner, each a process; the ServerApp is played here."""

    def __init__(self, folder, children):
        self._children = children
        self._folder = folder
        self._environment = {**os.environ, **flower_environment(folder / "flower", os.environ)}
        self.marker = folder / "executed"
        (secret := folder / "secret").write_bytes(SECRET)
        runtime_port, link_port = free_port(), free_port()
        link, runtime = f"127.0.0.1:{link_port}", f"127.0.0.1:{runtime_port}"
        flags = ["--insecure", "--isolation", "process", "--host", "127.0.0.1"]
        flags += ["--port", str(link_port), "--superexec-auth-secret-file", str(secret)]
        self._start(self._script("flower-superlink"), *flags)
        soon(lambda: listens(link_port))
        settings = node.NodeSettings(link, runtime_port, secret, None, None)
        self.node = self._start(*node.command(settings))
        self.runner = self._start(sys.executable, "-c", RUNNER, runtime, str(secret))
        self._submit(link)
        self._take_the_servers_part(link)

    def _script(self, name):
        return str(Path(sys.executable).parent / name)

    def _start(self, *words):
        process = subprocess.Popen(words, env=self._environment)

        def end():
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()

        self._children.callback(end)
        return psutil.Process(process.pid)

    def _submit(self, link):
        """Starts a run whose bundle brings a ClientApp of its own."""
        app = self._folder / "bundle"
        (app / "hostile").mkdir(parents=True)
        (app / "pyproject.toml").write_text(BUNDLE)
        (app / "hostile" / "__init__.py").touch()
        (app / "hostile" / "app.py").write_text(HOSTILE.format(marker=str(self.marker)))
        (self._folder / "flower").mkdir(exist_ok=True)
        config = (
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{link}"\ninsecure = true'
        )
        (self._folder / "flower" / "config.toml").write_text(config)
        command = [self._script("flwr"), "run", str(app), "here"]
        subprocess.run(command, env=self._environment, check=True)
        self.marker.unlink(missing_ok=True)  # who submits a bundle may look into it

    def _take_the_servers_part(self, link):
        from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor
        from flwr.supercore.runtime import RuntimeHttpClient
        from flwr.superlink.grid.http_grid import HttpGrid

        signed = SuperExecAuthHttpInterceptor(
            master_secret=SECRET, protected_methods=["/flwr.proto.Runtime/AcquireTask"]
        )
        with RuntimeHttpClient.from_server_address(link, True, None, [signed]) as client:
            request = AcquireTaskRequest(supported_task_types=["flwr-serverapp"])
            token = soon(lambda: client.AcquireTask(request).token)
        self._grid = HttpGrid(link, insecure=True, token=token)
        self._children.callback(self._grid.close)
        given = self._grid._runtime_client.PullTaskInput(PullTaskInputRequest())
        identify(given.run.run_id)
        self._grid.set_run(run_from_proto(given.run))
        (self._node,) = soon(lambda: list(self._grid.get_node_ids()))

    def reply(self, verb):
        message = Message(
            RecordDict({"asked": ConfigRecord({"verb": verb})}), self._node, "query.wish"
        )
        (name,) = self._grid.push_messages([message])

        def replies():
            self._grid._runtime_client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
            return list(self._grid.pull_messages([name]))

        (reply,) = soon(replies)
        return reply

    def told(self, verb):
        reply = self.reply(verb)
        assert not reply.has_error(), reply.error
        return dict(reply.content["told"])

    def error(self, verb):
        error = self.reply(verb).error
        return error.code, error.reason


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def listens(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False


@flower
def test_on_a_device_only_the_installed_app_answers_whatever_the_bundle_brings(installed, tmp_path):
    with contextlib.ExitStack() as children:
        device = Deployment(tmp_path, children)
        first = device.told("go")
        started = time.monotonic()
        second = device.told("go")
        seconds = time.monotonic() - started
        assert first == {"by": "installed", "pid": first["pid"], "warm": 1, "count": 1}
        assert second == {"by": "installed", "pid": first["pid"], "warm": 2, "count": 2}
        assert device.error("refuse not while on battery") == (REFUSED, "not while on battery")
        assert device.error("die")[0] == DIED
        assert device.told("go")["count"] == 3, "no refused and no failed message has counted"
        soon(lambda: not device.runner.children())

        sizes = [process.memory_full_info() for process in (device.node, device.runner)]
        rss, pss = [sum(getattr(size, kind) for size in sizes) / 1e6 for kind in ("rss", "pss")]
        print(f"idle: {rss:.0f} MB RSS, {pss:.0f} MB PSS; a warm answer: {seconds:.1f} s")  # noqa: T201
        assert rss < 240, sizes  # of the 260 MB that a device may take with its supervisor
        assert not device.marker.exists()
        assert not list((tmp_path / "flower").rglob("*hostile*"))
