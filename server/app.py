"""Flower edge of the coordinator: carries the round engine's tasks over a Flower grid.

Flower delivers at most once, and reports a failure by an error reply that may come from anywhere:
replies are known by the message that they answer, never by their sender. A device that fails, is
late or has left is missing from the exchange, and the round engine goes on without it. A node
says itself which device it is; a deployment checks that against the key that it was admitted with.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read once, when flwr is imported

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from pydantic import ValidationError

from proxymoe.common.messages import (
    CONTENT,
    DESCRIBE,
    LETTER,
    RECORD,
    ROUND_KEYS,
    TICKET,
    TRAIN,
    Description,
)
from proxymoe.server.round import Answer, Transport

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
MAX_REASON = 200
"""Characters of a foreign error text that are logged."""

Asked = TypeVar("Asked")


class GridTransport:
    """A `server.round.Transport` on the grid of one Flower run.

    Args:
        grid: reaches the nodes of the run.
        num_devices: how many are wanted now; `devices` returns as soon as that many are known, or
            that many nodes are online and all have answered.
        gather_seconds: how long `devices` waits for that; then it returns those there are.
        reply_seconds: how long `exchange` waits for replies; what comes later is never used.
        pause: waits between two polls; it may raise, which ends the waiting.
        is_device: whether a node, by id, was admitted as the device whose name it gives.
        ticket_of: the job ticket that goes with a device's task; None sends none.
        round_keys: the keys, signed, that go with a training task; None sends none.
    """

    def __init__(
        self,
        grid: Grid,
        num_devices: Callable[[], int],
        gather_seconds: float,
        reply_seconds: float,
        pause: Callable[[float], None] = time.sleep,
        is_device: Callable[[int, str], bool] = lambda *_: True,
        ticket_of: Callable[[str, bytes], bytes] | None = None,
        round_keys: Callable[[], bytes] | None = None,
    ) -> None:
        self._grid = grid
        self._is_device = is_device
        self._ticket_of, self._round_keys = ticket_of, round_keys
        self._num_devices = num_devices
        self._gather_seconds = gather_seconds
        self._reply_seconds = reply_seconds
        self._pause = pause
        self._nodes: dict[str, int] = {}
        self._asked: dict[str, int] = {}
        """Nodes that have not described themselves yet, by the message that asks them."""
        self._silent: set[int] = set()
        """Nodes that were waited for once, in vain; rounds do not wait for them again."""

    def devices(self) -> list[str]:
        """Names of the devices whose nodes are online; nodes not known yet are asked first.

        A node without a valid description, or with the name of a device that is online already,
        is left out, and asked again at the next call. One that has been silent to the end of a call
        may answer later, but no later call waits for it.
        """
        deadline = time.monotonic() + self._gather_seconds
        done: set[int] = set()
        wanted = self._num_devices()
        while True:
            online = set(self._grid.get_node_ids())
            self._nodes = {name: node for name, node in self._nodes.items() if node in online}
            for node in sorted(online - done - {*self._nodes.values(), *self._asked.values()}):
                done.add(node)
                if message := self._push(node, DESCRIBE, ConfigRecord(), self._gather_seconds):
                    self._asked[message] = node
            for node, record in self._pull(self._asked):
                self._meet(node, record)
            all_met = len(online) >= wanted and self._silent.issuperset(self._asked.values())
            if len(self._nodes) >= wanted or all_met:
                break
            if time.monotonic() >= deadline:
                found = len(self._nodes), wanted, self._gather_seconds
                log.warning("%d of %d devices after %.0f s", *found)
                self._silent.update(self._asked.values())
                break
            self._pause(POLL_SECONDS)
        return sorted(self._nodes)

    def exchange(self, tasks: Mapping[str, bytes]) -> Iterator[Answer]:
        """See `server.round.Transport`; ends when all have answered or time is up."""
        return self._exchanged(tasks, TRAIN)

    def exchange_letters(self, letters: Mapping[str, bytes]) -> Iterator[Answer]:
        """The same for letters of secure aggregation."""
        return self._exchanged(letters, LETTER)

    def _exchanged(self, tasks: Mapping[str, bytes], kind: str) -> Iterator[Answer]:
        deadline = time.monotonic() + self._reply_seconds
        pending: dict[str, str] = {}
        for name, task in tasks.items():
            if message := self._send(name, task, kind):
                pending[message] = name
            else:
                log.warning("device %s: unreachable, task not sent", name)
        while pending:
            for name, record in self._pull(pending):
                content = record.get(CONTENT)
                if isinstance(content, bytes):
                    yield name, content
                else:
                    log.warning("device %s: reply without content", name)
            if pending and time.monotonic() >= deadline:
                late = sorted(pending.values())
                log.warning("no reply within %.0f s from %s", self._reply_seconds, late)
                return
            if pending:
                self._pause(POLL_SECONDS)
                yield None

    def _send(self, name: str, task: bytes, kind: str) -> str | None:
        if name not in self._nodes:
            return None
        record = ConfigRecord({CONTENT: task})
        if self._ticket_of is not None:
            record[TICKET] = self._ticket_of(name, task)
        if self._round_keys is not None and kind == TRAIN:
            record[ROUND_KEYS] = self._round_keys()
        return self._push(self._nodes[name], kind, record, self._reply_seconds)

    def _meet(self, node: int, record: ConfigRecord) -> None:
        self._silent.discard(node)
        try:
            described = Description.model_validate(dict(record))
        except ValidationError:
            log.warning("node %d: not a description", node)
            return
        if not self._is_device(node, described.device):
            log.warning("node %d: not admitted as device %s", node, described.device)
            return
        if self._nodes.setdefault(described.device, node) != node:
            log.warning("node %d: claims the name of device %s, online", node, described.device)
            return
        log.info("node %d is device %s, plan %s", node, described.device, described.plan[:12])

    def _push(self, node: int, kind: str, record: ConfigRecord, seconds: float) -> str | None:
        """The message's id, None if the grid refused it."""
        message = Message(RecordDict({RECORD: record}), node, kind, ttl=seconds)
        # One by one: for a refused message, grids return no id, an empty one, or None.
        ids = list(self._grid.push_messages([message]))
        return ids[0] if ids and ids[0] else None

    def _pull(self, pending: dict[str, Asked]) -> Iterator[tuple[Asked, ConfigRecord]]:
        """Replies that have come, each with whom was asked; `pending` forgets what is answered."""
        if not pending:
            return
        for message in self._grid.pull_messages(list(pending)):
            who = pending.pop(message.metadata.reply_to_message_id, None)
            if who is None:
                continue
            if message.has_error():
                reason = (message.error.reason or "")[:MAX_REASON]
                log.warning("%s: no answer, error %d: %r", who, message.error.code, reason)
                continue
            record = message.content.get(RECORD)
            if isinstance(record, ConfigRecord):
                yield who, record
            else:
                log.warning("%s: reply without our record", who)


def server_app(
    main: Callable[[Transport], None],
    num_devices: int,
    gather_seconds: float,
    reply_seconds: float,
    pause: Callable[[float], None] = time.sleep,
) -> ServerApp:
    """A ServerApp that calls `main` with a `GridTransport`; the rest are its arguments."""
    app = ServerApp()

    @app.main()
    def run(grid: Grid, context: Context) -> None:  # noqa: ARG001  Flower passes both
        main(GridTransport(grid, lambda: num_devices, gather_seconds, reply_seconds, pause))

    return app
