"""Flower edge of the coordinator: the ServerApp, which runs the rounds that are left.

Flower starts it in a process of its own, by the name that stands in `bundle/pyproject.toml`. It
may be killed at any time: the round engine's state is on disk, and the next one goes on. Two never
run at once.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read once, when flwr is imported

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from proxymoe.common.errors import ConfigError, ProtocolError
from proxymoe.common.files import digest_of, write_json
from proxymoe.common.identity import key_digest
from proxymoe.common.tickets import Ticket, issue_ticket
from proxymoe.server.aggregate import Summation
from proxymoe.server.app import GridTransport
from proxymoe.server.devices import Devices
from proxymoe.server.engine import RoundEngine
from proxymoe.server.envelopes import Envelopes
from proxymoe.server.flower import COORDINATOR
from proxymoe.server.lock import held
from proxymoe.server.masked_round import MaskedRound, MaskRules
from proxymoe.server.planner import Planner
from proxymoe.server.promise import spending, summations
from proxymoe.server.round import Federation
from proxymoe.server.run_directory import RunDirectory
from proxymoe.server.status import engine_file, engine_lock
from proxymoe.server.store import RoundStore

log = logging.getLogger(__name__)

DESCRIBE_SECONDS = 180.0
"""How long devices may take to say who they are; a cold one starts Python and loads torch."""
MAX_LOG_BYTES = 4 << 20

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the rounds that are left, if no other process does."""
    run = RunDirectory(Path(os.environ[COORDINATOR]))
    _log_to(run.log / "rounds.log")
    refusal = "the rounds are being run by another process"
    with held(engine_lock(run), refusal), _announced(run, context.run_id):
        run_rounds(run, grid)


def run_rounds(run: RunDirectory, grid: Grid) -> None:
    """Runs all rounds that are left over the nodes of `grid`, and returns when there are none."""
    settings, devices = run.settings, Devices(run.devices_db)
    planner = Planner(run)
    federation = planner.federation(planner.canary())
    if len(federation.members):
        log.info("%s", planner.coverage())
    with contextlib.closing(run.store(planner.layout.size)) as store:
        rules = settings.round_rules
        asked = settings.federation.cohort_size
        envelopes = sealing(run, federation, store, devices)
        transport = GridTransport(
            grid,
            num_devices=lambda: rules.needed(asked or len(federation.members)),
            gather_seconds=DESCRIBE_SECONDS,
            reply_seconds=settings.rules.deadline_seconds,
            is_device=admission(devices, grid.get_nodes),
            ticket_of=ticketing(run, federation, store),
            round_keys=None if federation.masked else envelopes.offer,
        )
        if federation.masked:
            summation_of = masking(run, federation, store, devices, transport)
            RoundEngine(federation, store, transport, summation_of, rules).run()
        else:
            summation_of = summations(settings, federation, store)
            passed, opened = envelopes.passed, envelopes.opened
            RoundEngine(
                federation, store, transport, summation_of, rules, passed=passed, opened=opened
            ).run()


def masking(
    run: RunDirectory,
    federation: Federation,
    store: RoundStore,
    devices: Devices,
    transport: GridTransport,
) -> Callable[[int], Summation]:
    """The masked sum of each round, over devices as they are enrolled when it begins."""
    sums = run.settings.sums
    rules = MaskRules(
        smallest_cohort=sums.smallest_cohort,
        smallest_class=sums.smallest_class,
        letter_seconds=sums.letter_seconds,
        asking_seconds=run.settings.rules.asking_seconds,
        attempts=sums.attempts,
    )

    spend = spending(run.settings, federation, store) if federation.noise else _nothing

    def summation_of(number: int) -> Summation:
        def begin(names: list[str]) -> int:
            return store.begin_attempt(number, names, time.time())

        keys, account = devices.public_keys(), partial(spend, number)
        letters = transport.exchange_letters
        return MaskedRound(federation, number, rules, letters, keys, begin, account)

    return summation_of


def sealing(
    run: RunDirectory,
    federation: Federation,
    store: RoundStore,
    devices: Devices,
    clock: Callable[[], float] = time.time,
) -> Envelopes:
    """The envelopes of rounds in the clear. `clock` gives unix seconds."""
    seconds = run.settings.round_rules.deadline_seconds + 1
    return Envelopes(federation, store, run.signing_key, seconds, devices.public_keys, clock)


def _nothing(number: int, attempt: int, devices: Iterable[str]) -> None:
    """What a sum without noise puts on the account."""


def admission(devices: Devices, nodes: Callable[[], Iterable[Any]]) -> Callable[[int, str], bool]:
    """Whether a node, by id, is the device whose name it gives: `GridTransport.is_device`.

    The node of a device is known from its registration. If the coordinator was killed just then,
    the SuperLink still tells which key the node has.
    """

    def is_device(node: int, device: str) -> bool:
        if devices.node_of(device) is None:
            for info in nodes():
                with contextlib.suppress(ProtocolError, ConfigError):
                    devices.note_node(key_digest(bytes(info.public_key)), info.node_id)
        return devices.is_device(node, device)

    return is_device


def ticketing(
    run: RunDirectory,
    federation: Federation,
    store: RoundStore,
    clock: Callable[[], float] = time.time,
) -> Callable[[str, bytes], bytes]:
    """Signs the ticket of each task: `GridTransport.ticket_of`. `clock` gives unix seconds."""
    key, rules = run.signing_key, run.settings.round_rules

    def ticket_of(device: str, task: bytes) -> bytes:
        now, current = clock(), store.latest()
        assert current is not None, "a task belongs to a round"
        member, asked = federation.members[device], len(current.cohort)
        ticket = Ticket(
            run=federation.run,
            round=current.number,
            device=device,
            base=federation.base,
            plan=member.plan.digest,
            layout=member.layout.digest,
            task=digest_of(task),
            cohort_size=rules.needed(min(federation.settings.cohort_size or asked, asked)),
            issued=int(now),
            expires=int(now + rules.deadline_seconds) + 1,
        )
        return issue_ticket(ticket, key)

    return ticket_of


def _log_to(path: Path) -> None:
    """Logs into a file only: what a ServerApp prints would grow in the SuperLink's database."""
    to_file = RotatingFileHandler(path, maxBytes=MAX_LOG_BYTES, backupCount=1, encoding="utf-8")
    logging.basicConfig(
        level=logging.INFO,
        handlers=[to_file],
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would tell of every request


@contextlib.contextmanager
def _announced(run: RunDirectory, flower_run: int) -> Iterator[None]:
    """Tells the conductor, in a file, which process runs the rounds while the block does."""
    known = {"pid": os.getpid(), "run": flower_run}
    write_json(engine_file(run), known | {"state": "running"})
    state = "stopped"
    try:
        yield
        state = "finished"
    except Exception:
        log.exception("the rounds broke off")
        state = "failed"
        raise
    finally:
        log.info("the rounds: %s", state)
        write_json(engine_file(run), known | {"state": state})
