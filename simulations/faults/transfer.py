"""Level 4: a blob set on its way over TLS, cut, corrupted, killed at both ends, and out of disk.

The bytes that a fault costs are counted at the proxy between the two ends, so what TLS, gRPC and
retries add is in them.
"""

import resource
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from proxymoe.client.fetch import fetch
from proxymoe.client.partial import StoreError
from proxymoe.client.retry import Backoff
from proxymoe.client.store import Store
from proxymoe.server.blobs import MAX_CHUNK_BYTES, BlobPlace
from proxymoe.simulations.faults.children import Child, Tell
from proxymoe.simulations.faults.proxy import FaultyProxy
from proxymoe.simulations.faults.report import Ground, Scenario
from proxymoe.simulations.loopback import Loopback, write_blobs

LEVEL = "transfer"
MB = 10**6
SIZES = (64 * MB, *[4 * MB] * 35)
"""A trunk and its experts: 204 MB."""
EVERY = 20 * MB
DEVICE_KILLS, SERVER_KILLS = 12, 6
FULL_AT = (0, 1 * MB, 3_999_999, 7 * MB, 33 * MB, 50 * MB, 63_999_999)
"""Bytes that a file may have before the disk is full."""
QUICK = Backoff(retries=400, first_seconds=0.05, max_seconds=0.5)
ROOM = 10**9
STREAMS = 4
"""Of one device at a time."""


@dataclass(frozen=True)
class Site:
    """The blob set of one scenario, and the keys of both ends."""

    loopback: Loopback
    places: Mapping[str, BlobPlace]

    @classmethod
    def new(cls, ground: Ground) -> "Site":
        """Fresh blobs and keys."""
        return cls(Loopback.new(), write_blobs(ground.folder(), SIZES, ground.rng))

    @cached_property
    def needs(self) -> dict[str, int]:
        """{digest: num_bytes} of the set."""
        return {digest: place.num_bytes for digest, place in self.places.items()}

    @contextmanager
    def server(self) -> "Iterator[Server]":
        """A blob service in a process of its own, that is killed when the block ends."""
        server = Server(self)
        try:
            yield server
        finally:
            server.kill()

    def damaged(self, folder: Path) -> str:
        """What is wrong with the blobs that a store says it has; each is read again."""
        store = Store(folder, ROOM)
        held = [d for d, size in self.needs.items() if store.holds(d, size)]
        damaged = [digest[:12] for digest in held if not store.verify(digest)]
        return f"the store holds damaged blobs: {damaged}" if damaged else ""

    def unfinished(self, folder: Path) -> str:
        """As `damaged`, of a store that should have everything, and nothing else."""
        if missing := Store(folder, ROOM).lacking(self.needs):
            return f"{len(missing)} of {len(self.needs)} blobs are missing"
        leftover = [path.name for path in (folder / "partial").iterdir()]
        return f"left behind: {leftover}" if leftover else self.damaged(folder)


class Server:
    """A blob service that can be killed and started again on the same port."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.port = 0
        self.start()

    def start(self) -> None:
        """Starts the process; returns when it serves."""
        self._child = Child(serve, self._site, self.port)
        self.port = self._child.hear()

    def kill(self) -> None:
        """Kills the process now."""
        self._child.kill()


def serve(tell: Tell, site: Site, port: int) -> None:
    """A blob service's life: it ends when it is killed."""
    with site.loopback.serving(site.places, port) as bound:
        tell(bound)
        threading.Event().wait()


def bring(tell: Tell, site: Site, port: int, folder: Path, file_bytes: int | None = None) -> None:
    """A device's life: fetches what its store lacks, and tells how it goes.

    Args:
        tell: hears the verified bytes now and then, and "full" if the disk is.
        site: what to fetch.
        port: where from.
        folder: of the store.
        file_bytes: no file may be longer; a disk that is full, as far as this process can see.
    """
    store = Store(folder, ROOM)
    store.pin("plan", site.needs)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    try:
        fetch(
            site.needs.items(),
            store,
            site.loopback.connector(port),
            draw=lambda: 0.5,
            streams=STREAMS,
            backoff=QUICK,
            progress=lambda done, _: tell(done),
        )
    except StoreError:
        tell("full")


def cut_or_corrupted(ground: Ground, *, corrupt: bool) -> Iterator[str]:
    """One transfer of the whole set through a proxy that strikes every 20 MB."""
    site, folder = Site.new(ground), ground.folder()
    strikes = {"corrupt_every" if corrupt else "cut_every": EVERY}
    with site.server() as server, FaultyProxy(server.port, **strikes) as proxy:
        child = Child(bring, site, proxy.port, folder)
        child.told()
        complaint = "the device was killed" if child.was_killed() else site.unfinished(folder)
        faults = proxy.num_corrupted if corrupt else proxy.num_cuts
        extra = proxy.num_bytes - sum(SIZES)
    # A record that does not decrypt ends its connection, and is lost with what was on the way.
    if not complaint and extra >= 2 * MAX_CHUNK_BYTES * faults:
        complaint = f"{extra / faults / MAX_CHUNK_BYTES:.2f} chunks sent again per fault, limit 2"
    yield from [complaint] * faults


def device_killed(ground: Ground) -> Iterator[str]:
    """One transfer, killed again and again; what was verified is never sent again."""
    site, folder = Site.new(ground), ground.folder()
    with site.server() as server, FaultyProxy(server.port) as proxy:
        for moment in _moments(ground, DEVICE_KILLS):
            child = Child(bring, site, proxy.port, folder)
            _hear_until(child, moment)
            child.kill()
            yield site.damaged(folder)
        bring(lambda _: None, site, proxy.port, folder)
        extra = proxy.num_bytes - sum(SIZES)
    limit = 2 * MAX_CHUNK_BYTES * STREAMS * DEVICE_KILLS
    complaint = f"{extra} bytes sent again, limit {limit}" if extra >= limit else ""
    if complaint := complaint or site.unfinished(folder):
        yield complaint


def server_killed(ground: Ground) -> Iterator[str]:
    """One transfer, under which the service is killed and started again."""
    site, folder = Site.new(ground), ground.folder()
    with site.server() as server:
        child = Child(bring, site, server.port, folder)
        for moment in _moments(ground, SERVER_KILLS):
            _hear_until(child, moment)
            server.kill()
            complaint = site.damaged(folder)
            server.start()
            yield complaint
        child.told()
        ended = "" if not child.was_killed() else "the device was killed"
    if complaint := ended or site.unfinished(folder):
        yield complaint


def disk_full(ground: Ground) -> Iterator[str]:
    """One transfer onto a disk that is full, and has a little more room at each attempt."""
    site, folder = Site.new(ground), ground.folder()
    with site.server() as server:
        for limit in FULL_AT:
            child = Child(bring, site, server.port, folder, limit)
            is_told = "full" in child.told() and not child.was_killed()
            yield site.damaged(folder) if is_told else f"full at {limit} bytes, and nobody was told"
        bring(lambda _: None, site, server.port, folder)
    if complaint := site.unfinished(folder):
        yield complaint


def _moments(ground: Ground, count: int) -> list[float]:
    """Verified bytes at which something happens: ascending, and not at the very end."""
    return sorted(ground.rng.uniform(0, 0.95 * sum(SIZES), count).tolist())


def _hear_until(child: Child, moment: float) -> None:
    while child.hear() < moment:
        pass


WHOLE = "in the end all blobs whole and verified"
SCENARIOS = (
    Scenario(
        LEVEL,
        "connection cut every 20 MB",
        f"{WHOLE}, less than 2 chunks sent again per cut, on average",
        partial(cut_or_corrupted, corrupt=False),
    ),
    Scenario(
        LEVEL,
        "bytes corrupted every 20 MB",
        f"{WHOLE}, less than 2 chunks sent again per fault, on average",
        partial(cut_or_corrupted, corrupt=True),
    ),
    Scenario(
        LEVEL, "device killed", f"{WHOLE}, less than 2 chunks and stream sent again", device_killed
    ),
    Scenario(LEVEL, "blob service killed and restarted", WHOLE, server_killed),
    Scenario(LEVEL, "disk full", f"said so; {WHOLE} once there is room", disk_full),
)
