"""Brings blobs to this device: allowed by its policy, while its gates are open, and on record.

`client/fetch.py` moves bytes; here is everything that an owner wants decided and written down
before it may. What was brought stays, whatever ends it, and the next attempt goes on from there.
"""

import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import grpc

from proxymoe.client.attempts import Patience
from proxymoe.client.entries import Entry, Kind
from proxymoe.client.fetch import fetch, open_channel
from proxymoe.client.gates import GateState, Need, read_gates, this_machine
from proxymoe.client.home import EnrolmentRecord, Home
from proxymoe.client.policy import Objection, Request, judge
from proxymoe.client.retry import TransferError
from proxymoe.client.store import QuotaError, Store
from proxymoe.common.addresses import split_address
from proxymoe.common.assignment import Assignment, Blob
from proxymoe.common.certificates import check_device_certificate
from proxymoe.common.errors import ProxyMoEError
from proxymoe.common.files import canonical_json, digest_of

BATCH_BYTES = 64 << 20
"""Blobs to one entry in the ledger: so much is counted even if a cut keeps it from coming."""
TABLE = "table"
"""What the store calls the blobs of tables; those of a submodel go by its plan."""
GATE_SECONDS = 60.0
"""Between two looks at the gates while blobs are on their way."""
REACH_SECONDS = 10.0

Progress = Callable[[int, int], None]
"""Told (verified bytes, all bytes)."""


class PolicyRefused(ProxyMoEError):
    """The policy does not allow what the coordinator asks; `objections` tell why."""

    def __init__(self, objections: Sequence[Objection]) -> None:
        super().__init__("; ".join(map(str, objections)))
        self.objections = tuple(objections)


class GatesClosed(ProxyMoEError):
    """This machine may not be used now; `gates` are those that are closed. Try again later."""

    def __init__(self, gates: Sequence[GateState]) -> None:
        super().__init__("; ".join(map(str, gates)))
        self.gates = tuple(gates)


def require_allowed(home: Home, request: Request) -> None:
    """Returns if the owner's policy allows the request, after all that was used before.

    Raises:
        PolicyRefused: it does not.
        ConfigError, DataError, IntegrityError: policy, ledger or counts cannot be read.
    """
    if objections := judge(home.policy(), request, home.usage(time.time())):
        raise PolicyRefused(objections)


def require_open(home: Home, need: Need) -> None:
    """Returns if the machine may be used now; GatesClosed if not."""
    states = read_gates(home.policy(), this_machine(home.path), need)
    if closed := [gate for gate in states if not gate.open]:
        raise GatesClosed(closed)


def require_reachable(home: Home) -> None:
    """Returns if the coordinator can be reached: only then is it worth an entry in the ledger.

    Raises:
        TransferError: it is away.
    """
    address = home.enrolled().blobs
    try:
        socket.create_connection(split_address(address), REACH_SECONDS).close()
    except OSError as error:
        raise TransferError(f"the coordinator at {address} is away ({error})") from error


def connector(home: Home, record: EnrolmentRecord) -> Callable[[], grpc.Channel]:
    """Opens connections to the blob service, as this device.

    Raises:
        ProtocolError: the certificate has expired, or is not by the coordinator's CA; enrol again.
    """
    authority, certificate = home.authority.read_bytes(), home.certificate.read_bytes()
    check_device_certificate(certificate, authority, time.time())  # TLS would not say why
    return partial(open_channel, record.blobs, authority, certificate, home.key.read_bytes())


def small_needs(assignment: Assignment) -> dict[str, int]:
    """{digest: num_bytes} of what an assignment names besides weights: manifest and companions."""
    return {assignment.manifest.digest: assignment.manifest.num_bytes, **assignment.companions}


def bring(
    home: Home,
    assignment: Assignment,
    generation: str,
    needs: Mapping[str, int],
    built_bytes: int = 0,
    progress: Progress | None = None,
) -> None:
    """Pins {digest: num_bytes} for a generation, and fetches what the store lacks of it.

    Args:
        generation: a plan's digest, or TABLE; in place of what it had pinned before. Where the
            disk that the policy grants has no room for a plan beside others, those are given up.
        built_bytes: of that disk, for what is about to be made of the blobs.
        progress: counts what is here already, too.

    Raises:
        GatesClosed: the machine may not be used, or no longer; looked at again and again.
        QuotaError: there is no room, whatever is given up.
        TransferRefused, TransferError, IntegrityError, StoreError: see `client/fetch.py`.
        DataError, IntegrityError: the ledger cannot be written, and nothing leaves without it.
    """
    store = _pinned(home, generation, needs, built_bytes)
    lacking, total = store.lacking(needs), sum(needs.values())
    if not lacking:
        return
    record = home.enrolled()
    connect = connector(home, record)
    watch = _Watch(home, Need(disk_bytes=sum(lacking.values()) + built_bytes))
    here = total - sum(lacking.values())
    for batch in _batches(lacking):
        request = canonical_json(sorted(batch))
        entry = Entry(
            kind=Kind.REQUEST,
            receiver=record.blobs,
            num_bytes=len(request),
            digest=digest_of(request),
            run=assignment.run,
            fetched_bytes=sum(batch.values()),
        )

        def told(done: int, _: int, before: int = here) -> None:
            watch.look()
            if progress:
                progress(before + done, total)

        with home.ledger().sending(entry):
            fetch(batch.items(), store, connect, Patience().draw, progress=told)
        here += entry.fetched_bytes


def bring_tables(home: Home, assignment: Assignment, *tables: Blob) -> None:
    """Fetches public tables, and with them what it takes to read rows as tokens.

    Raises:
        PolicyRefused: the policy does not trust the coordinator, or the network is used up.
        GatesClosed, QuotaError, TransferError: and others, see `bring`.
    """
    needs = small_needs(assignment) | {table.digest: table.num_bytes for table in tables}
    lacking, coordinator = home.store().lacking(needs), home.enrolled().public_key
    network_bytes = sum(lacking.values())
    require_allowed(home, Request(coordinator=coordinator, network_bytes=network_bytes))
    if lacking:
        require_reachable(home)
    bring(home, assignment, TABLE, needs)


def drop_others(home: Home, *generations: str) -> None:
    """Forgets all but these: pins of the store, and submodels, whole or not."""
    store = home.store()
    for name in store.pins().keys() - {*generations}:
        store.unpin(name)
    for folder in home.submodels.glob("*"):
        if folder.name not in generations:
            shutil.rmtree(folder, ignore_errors=True)


class _Watch:
    """Looks at the gates now, and then whenever it is asked and time has passed."""

    def __init__(self, home: Home, need: Need) -> None:
        require_open(home, need)
        self._home = home
        self._due = time.monotonic() + GATE_SECONDS

    def look(self) -> None:
        """GatesClosed if one has closed meanwhile; room for what has come is not asked again."""
        if time.monotonic() >= self._due:
            require_open(self._home, Need())
            self._due = time.monotonic() + GATE_SECONDS


def _pinned(home: Home, generation: str, needs: Mapping[str, int], built_bytes: int) -> Store:
    store = home.store(built_bytes)
    try:
        store.pin(generation, needs)
    except QuotaError:
        if generation == TABLE:
            raise  # a submodel is worth more
        drop_others(home, generation, TABLE)
        store = home.store(built_bytes)
        store.pin(generation, needs)
    return store


def _batches(lacking: Mapping[str, int]) -> Iterator[dict[str, int]]:
    batch: dict[str, int] = {}
    for digest, num_bytes in lacking.items():
        if batch and sum(batch.values()) + num_bytes > BATCH_BYTES:
            yield batch
            batch = {}
        batch[digest] = num_bytes
    if batch:
        yield batch
