"""`join`: a device at work, as two processes that a small one keeps running.

    supervisor     `supervise`, in the place of the command line that prepared it (`prepare.py`)
      node         Flower's SuperNode: `client/node.py`
      runner       `run`: answers what the SuperNode receives, past the guard
        job        opens the device and trains; there for as long as there is something to do

Most of its life a device waits, so what waits is kept small: nothing heavy is imported here
before the process that needs it.
"""
# ruff: noqa: PLC0415  see above

import contextlib
import functools
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from proxymoe.client.partial import lock_file
from proxymoe.common.errors import ConfigError, ProxyMoEError
from proxymoe.common.files import write_bytes
from proxymoe.common.offline import LOOPBACK, flower_environment
from proxymoe.common.supervise import Backoff, Child, ChildFailed, Supervisor, listening

if TYPE_CHECKING:
    from proxymoe.client.home import Home
    from proxymoe.client.masked import MaskedUpdates
    from proxymoe.client.personalize import Device

HOME = "PROXYMOE_DEVICE_HOME"
"""Environment variable that tells runner and job process whose device they answer for."""
MAIN = "from proxymoe.client.service import main; main()"
"""Run like this and not with -m, or the app would be part of `__main__`, and could not travel."""
THRIFT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}
"""Has glibc give memory back after a round, 7 MB in all; too slow for those who train."""
DONE, FAILED = 0, 1
REFUSED, MISCONFIGURED = os.EX_NOPERM, os.EX_CONFIG
"""Exit codes; the last two are the SuperNode's, see `client/node.py`."""
START_SECONDS = 180.0
"""For the SuperNode on a slow and busy machine."""
RESTARTS = Backoff(max_failures=20)
"""For a process that ends; after a quarter of an hour of that it takes more than a restart."""
LINGER_SECONDS = 10.0
"""The SuperNode has an answer from the runner some time before the coordinator has it."""
FORSAKEN_SECONDS = 3600.0
"""How long the last update waits to be summed under masks, if nobody asks for it."""
FEDERATED = "federated.bin"
"""Among the adapters: the last training task that was answered, with its federated adapter."""

log = logging.getLogger(__name__)


def start(home: "Home", *, once: bool = False) -> NoReturn:
    """Puts a supervisor in the place of this process, for a device that is prepared.

    Args:
        once: leave after the last round of the assignment.

    Raises:
        ConfigError: not enrolled, or for addresses that cannot be.
    """
    from proxymoe.client.node import NodeSettings, command

    record = home.enrolled()
    with socket.create_server((LOOPBACK, 0)) as free:
        port = free.getsockname()[1]
    home.write_private(home.runtime_secret, secrets.token_hex(32).encode())
    node = command(
        NodeSettings(record.coordinator, port, home.runtime_secret, home.authority, home.ssh_key)
    )
    os.environ |= flower_environment(home.flower, os.environ) | THRIFT | {HOME: str(home.path)}
    sys.stdout.flush()
    mode = "once" if once else "always"
    us = _python("supervise", str(home.path), mode, record.coordinator, str(port))
    os.execv(us[0], [*us, *node])  # noqa: S606  our own interpreter, our own arguments


def supervise(home: Path, *, once: bool, coordinator: str, port: int, node: Sequence[str]) -> None:
    """Keeps SuperNode and runner at work until SIGTERM, SIGINT, or all is done.

    Raises:
        ConfigError: a second client.
        ChildFailed: the coordinator does not want this device, or it cannot work like this.
    """
    mode = "once" if once else "always"
    children = [
        Child(
            "node",
            tuple(node),
            ready=listening(LOOPBACK, port),
            ready_seconds=START_SECONDS,
            gives_up={
                REFUSED: f"the coordinator at {coordinator} does not want this device; it was "
                "revoked or never registered: ask who runs the coordinator, then enrol again",
                MISCONFIGURED: "Flower's SuperNode cannot start with these settings; enrol again "
                "or reinstall ProxyMoE",
            },
        ),
        Child(
            "runner",
            _python("run", str(home), mode, f"{LOOPBACK}:{port}"),
            gives_up={
                MISCONFIGURED: "the runner cannot work like this; put right what its log names",
                **({DONE: "the last round is done"} if once else {}),
            },
        ),
    ]
    with _alone(home):
        log.info("at work for the coordinator at %s; see `proxymoe-device status`", coordinator)
        try:
            Supervisor(children, home / "log", RESTARTS).run()
        except ChildFailed as end:
            if end.code != DONE:
                raise
        log.info("left the coordinator at %s", coordinator)


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """As `Home.alone`, without the memory that a `Home` takes."""
    lock = lock_file(home / "lock", os.O_CREAT)
    if lock is None:
        raise ConfigError(f"{home}: a second client; one is at work here already: stop it first")
    with lock:
        yield


def run(home: "Home", address: str, *, once: bool) -> None:
    """Answers what the SuperNode at `address` receives, until SIGTERM.

    Args:
        once: or until the last round of the assignment is answered.

    Raises:
        ConfigError: not enrolled, nothing assigned, or the SuperNode has another secret.
    """
    from proxymoe.client.app import enveloped, withheld
    from proxymoe.client.guard import Guard
    from proxymoe.client.runner import Runner
    from proxymoe.common.messages import DESCRIBE, LETTER

    for name in THRIFT:
        os.environ.pop(name, None)  # here it works already, and the job process inherits the rest
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor's business
    assignment = home.assignment()
    if assignment is None:
        raise ConfigError(f"{home.path}: nothing is assigned to this device; join again")
    guard = Guard(home, num_threads())
    last = assignment.rounds if once else None

    @contextlib.contextmanager
    def sending(message: Any, answer: Any) -> Iterator[Any]:
        with guard.sending(message, answer) as envelope:
            yield enveloped(answer, envelope)
        if (seconds := _seconds_left(home, message, answer, last)) is not None:
            timer = threading.Timer(seconds, stop.set)
            timer.daemon = True
            timer.start()

    secret = home.runtime_secret.read_bytes()

    def instead(message: Any, answer: Any) -> Any:
        # Most messages have nothing to withhold, and then nobody needs what masking takes.
        return withheld(message, answer, lambda *update: masked_updates().withhold(*update))

    light = {DESCRIBE, LETTER}
    Runner(address, secret, load, guard.check, sending, light=light, instead=instead).run(stop)


@functools.cache
def masked_updates() -> "MaskedUpdates":
    """What waits in this process, for the device whose home the environment names."""
    from proxymoe.client.home import Home
    from proxymoe.client.masked import MaskedUpdates
    from proxymoe.client.records import Records
    from proxymoe.common.contribution import Limits

    home = Home(Path(os.environ[HOME]))

    def limits() -> Limits:
        privacy = home.policy().privacy
        return Limits(privacy.smallest_cohort, privacy.smallest_class)

    name, records = home.enrolled().device, Records(home.records_file)
    return MaskedUpdates(name, home.key.read_bytes(), records, limits)


def _seconds_left(home: "Home", message: Any, answer: Any, last: int | None) -> float | None:
    """How long to stay, now that this was answered; None is for good.

    Keeps the federated adapter of a task on the way.
    """
    from proxymoe.common.messages import CONTENT, LETTER, RECORD, TRAIN, TrainTask, decode

    kind = message.metadata.message_type
    if hasattr(answer, "reason") or kind not in (TRAIN, LETTER):
        return None
    if kind == LETTER:
        given = masked_updates().given_away
        return None if last is None or given is None or given < last else LINGER_SECONDS
    content = message.content[RECORD][CONTENT]
    with contextlib.suppress(OSError):  # a full disk is no reason to stop answering
        write_bytes(home.adapters / FEDERATED, content)
    task, _ = decode(content)
    if last is None or task.round < last:
        return None
    return FORSAKEN_SECONDS if isinstance(task, TrainTask) and task.masked else LINGER_SECONDS


def load() -> Any:
    """The ClientApp of the device whose home the environment names.

    Runner and job process make it alike; only who is asked to train imports model code.
    """
    from proxymoe.client.app import client_app
    from proxymoe.client.home import Home
    from proxymoe.client.inventory import describe

    home = Home(Path(os.environ[HOME]))
    return client_app(
        lambda _: _opened(home),
        lambda _: describe(home),
        answer=lambda letter: masked_updates().answer(letter),
    )


def _opened(home: "Home") -> "Device":
    import torch

    from proxymoe.client.submodel import open_device

    torch.set_num_threads(num_threads())
    return open_device(home)


def num_threads() -> int:
    """How many threads train: as OMP_NUM_THREADS says, by default one.

    With one, an update has the same bits as in a simulation, and the owner's machine stays free.
    """
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdecimal() and int(told) > 0 else 1


def main() -> None:
    """`supervise HOME MODE COORDINATOR PORT NODE…` or `run HOME MODE ADDRESS`, in a process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    verb, folder, mode, *rest = sys.argv[1:]
    code = DONE
    try:
        if verb == "supervise":
            coordinator, port, *node = rest
            home, once = Path(folder), mode == "once"
            supervise(home, once=once, coordinator=coordinator, port=int(port), node=node)
        else:
            from proxymoe.client.home import Home

            run(Home(Path(folder)), rest[0], once=mode == "once")
    except (ProxyMoEError, OSError) as error:
        log.error("error: %s", error)
        is_ours = verb == "run" and isinstance(error, ProxyMoEError)
        code = MISCONFIGURED if is_ours else FAILED
    sys.exit(code)


def _python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-P", "-c", MAIN, *arguments)
