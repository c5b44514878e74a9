"""What must hold of a coordinator's folder at any moment, whatever happened before.

The audit log is played again, without the engine: no round begins twice or goes on after its end,
a device counts at most once in a round, and every committed version is what the strategy makes of
the mean of exactly the updates that were accepted.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from proxymoe.common.errors import ProxyMoEError
from proxymoe.common.files import digest_of
from proxymoe.common.messages import Vector, decode
from proxymoe.server import audit, strategy
from proxymoe.server.round import Federation, FederationState, tasks_of
from proxymoe.server.schedule import server_rate
from proxymoe.server.store import Phase, RoundStore, Version
from proxymoe.simulations.faults.cohort import honest

Possible = Callable[[bytes], list[bytes]]
"""Every reply to a task that a device might have sent and the coordinator accepted."""


def other(task: bytes) -> bytes:
    """A reply that can be used, and differs from the honest one."""
    return honest(task, lambda update: -update)


class Law:
    """Judges one folder again and again, and remembers what was committed before.

    Args:
        federation: whose folder it is.
        folder: where its `RoundStore` is.
        possible: the updates that are known to have been sent.
    """

    def __init__(
        self,
        federation: Federation,
        folder: Path,
        possible: Possible = lambda task: [honest(task), other(task)],
    ) -> None:
        self._federation, self._folder, self._possible = federation, folder, possible
        self._committed: dict[int, Version] = {}

    def broken(self) -> str:
        """What does not hold now; "" if everything does."""
        try:
            store = RoundStore(self._folder, self._federation.run, self._federation.layout.size)
            try:
                return "; ".join(self._complaints(store))
            finally:
                store.close()
        except ProxyMoEError as error:
            return f"{type(error).__name__}: {error}"

    def unfinished(self, expected: FederationState | None = None) -> str:
        """As `broken`, of a run that should be over: in the expected bits, if any are."""
        if found := self.broken():
            return found
        rounds = self._federation.settings.rounds
        store = RoundStore(self._folder, self._federation.run, self._federation.layout.size)
        try:
            last = store.latest()
            if last is None or not last.phase.over or last.number != rounds:
                return f"the run stands at {last}, not at the end of round {rounds}"
            state = store.state(rounds + 1, store.current())
        finally:
            store.close()
        if expected is not None and not _same(state, expected):
            return "the run ended in other bits than the undisturbed one"
        return ""

    def _complaints(self, store: RoundStore) -> Iterator[str]:
        (sound,) = store.database.execute("PRAGMA integrity_check").fetchone()
        if sound != "ok":
            yield f"the database is damaged: {sound}"
        story = Story()
        for entry in audit.entries(store.database):
            yield from story.tell(entry)
        versions = {version.version: version for version in store.versions()}
        if versions != story.versions:
            yield f"versions {sorted(versions)}, and {sorted(story.versions)} on record"
        for number, devices in story.accepted.items():
            if store.updates(number) != devices:
                yield f"round {number}: updates differ from those on record"
        for number, version in self._committed.items():
            if versions.get(number) != version:
                yield f"version {number} was committed, and is lost or another now"
        self._committed = versions
        for version in versions.values():
            yield from self._unlawful(store, version, story.accepted[version.number])

    def _unlawful(
        self, store: RoundStore, version: Version, accepted: dict[str, str]
    ) -> Iterator[str]:
        """Compares a version with what its updates make of its parent."""
        federation = self._federation
        state = store.state(version.number, version.parent)
        updates = {}
        for name, task in tasks_of(federation, state, accepted).items():
            vectors = [decode(reply)[1] for reply in self._possible(task)]
            known = {digest_of(vector.tobytes()): vector for vector in vectors}
            if accepted[name] not in known:
                yield f"version {version.version}: nobody sent what {name} is said to have sent"
                return
            updates[name] = known[accepted[name]]
        mean, held = mean_of(federation, updates)
        memory, adapter = strategy.apply(
            state.strategy,
            state.adapter,
            torch.from_numpy(mean),
            torch.from_numpy(held),
            federation.settings,
            rate=server_rate(federation.settings, version.number),
        )
        expected = FederationState(version.number, adapter, memory)
        if not _same(store.state(version.number + 1, version.version), expected):
            yield f"version {version.version} is not the mean of the updates that were accepted"


class Story:
    """What the audit log tells, played again."""

    def __init__(self) -> None:
        self.accepted: defaultdict[int, dict[str, str]] = defaultdict(dict)
        self.versions: dict[int, Version] = {}
        self._current = 0
        self._open: int | None = None
        self._last = 0

    def tell(self, entry: audit.Entry) -> Iterator[str]:
        """Plays one entry, and complains if it cannot follow what came before."""
        body = entry.body
        number: Any = body.get("round")
        if entry.event == Phase.PLANNED:
            if self._open is not None or number != self._last + 1:
                yield f"round {number} was planned after round {self._last}, open: {self._open}"
            self._open = self._last = number
        elif number is not None and number != self._open:
            yield f"round {number}: {entry.event!r} while round {self._open} was open"
        if entry.event == "update":
            if body["device"] in self.accepted[number]:
                yield f"round {number}: {body['device']} counts twice"
            self.accepted[number][body["device"]] = body["digest"]
        elif entry.event == Phase.COMMITTED:
            if body["parent"] != self._current or body["version"] != len(self.versions) + 1:
                yield f"round {number}: version {body['version']} on {body['parent']}"
            self._current = body["version"]
            self.versions[self._current] = Version(
                self._current, body["parent"], number, body["digest"]
            )
        if entry.event in (Phase.COMMITTED, Phase.ABANDONED, Phase.ROLLED_BACK):
            self._open = None


def mean_of(federation: Federation, updates: dict[str, Vector]) -> tuple[Vector, NDArray[np.bool_]]:
    """(P,) fp32 per block the mean over its holders, added in order of names; (P,) who has any."""
    full = federation.layout
    total = np.zeros(full.size)
    holders = np.zeros(full.size)
    for name in sorted(updates):
        layout = federation.members[name].layout
        for at, block in enumerate(full.blocks):
            if block in layout.blocks:
                mine = layout.blocks.index(block)
                span = slice(full.bounds[at], full.bounds[at + 1])
                total[span] += updates[name][layout.bounds[mine] : layout.bounds[mine + 1]]
                holders[span] += 1
    return (total / np.maximum(holders, 1)).astype(np.float32), holders > 0


def _same(found: FederationState, expected: FederationState) -> bool:
    return (
        torch.equal(found.adapter, expected.adapter)
        and torch.equal(found.strategy.momentum, expected.strategy.momentum)
        and torch.equal(found.strategy.variance, expected.strategy.variance)
    )
