"""Network edge of the device: fetches the blobs that its store lacks.

Each stream has a connection of its own and takes one blob after another. A connection that is cut
costs less than two chunks: the window of a stream is one and a half, and the next attempt goes on
behind the last verified one. What is refused for good is not asked for again.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Lock
from typing import Any

import grpc

from proxymoe.client.partial import Partial
from proxymoe.client.retry import Backoff, Failures, TransferRefused
from proxymoe.client.store import Store
from proxymoe.common.errors import IntegrityError
from proxymoe.common.generated.blobs_pb2 import FetchRequest
from proxymoe.common.generated.blobs_pb2_grpc import BlobsStub

CHANNEL_OPTIONS = (
    ("grpc.enable_retries", 0),  # we retry, and know from where
    ("grpc.use_local_subchannel_pool", 1),  # or gRPC would lay all streams into one connection
    ("grpc.http2.bdp_probe", 0),  # the window stays at the chunk that is read, and this:
    ("grpc.http2.lookahead_bytes", 512 << 10),
    ("grpc.keepalive_time_ms", 20_000),  # a connection that died silently is noticed
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # or a minute passes, whatever the line above says
)
FOR_GOOD = frozenset(
    {
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
"""Answers that will be the same next time."""
LOOK_AGAIN_SECONDS = 0.25
"""How often we look whether a blob that another process fetches is there, or we are to stop."""


@dataclass(frozen=True, slots=True)
class FetchReport:
    """What it took to have all blobs."""

    fetched_bytes: int
    """Received and verified."""
    reused_bytes: int
    """Here before, or fetched by another process meanwhile."""
    retries: int


def open_channel(address: str, ca: bytes, certificate: bytes, key: bytes) -> grpc.Channel:
    """A connection of its own to the coordinator at host:port, made when it is first used.

    Args:
        address: the host must be named in the coordinator's certificate.
        ca: the certificate that signs the coordinator's, PEM.
        certificate: of this device, PEM.
        key: its private key, PEM.
    """
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    return grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)


def fetch(
    needs: Iterable[tuple[str, int]],
    store: Store,
    connect: Callable[[], grpc.Channel],
    draw: Callable[[], float],
    pause: Callable[[float], None] = time.sleep,
    streams: int = 4,
    backoff: Backoff | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FetchReport:
    """Brings all blobs into the store; returns once every one is there, verified and durable.

    Args:
        needs: (digest, num_bytes) of the blobs, all pinned in the store.
        store: keeps them, and what arrived of the others if this fails.
        connect: opens a connection; called for each stream, and after each failure.
        draw: a random number from [0, 1), for jitter; called from several threads.
        pause: waits so many seconds; called from several threads.
        streams: how many blobs are fetched at a time.
        backoff: when to try again.
        progress: told (verified bytes, bytes of all blobs) after each chunk, by one thread at a
            time.

    Raises:
        StoreError: blobs are not pinned, or the disk is full.
        IntegrityError: bytes were wrong again and again; none of those is kept.
        TransferRefused: the coordinator refuses a blob for good.
        TransferError: too many failures in a row.
    """
    wanted = dict(needs)
    store.require_pinned(wanted)
    transfer = _Transfer(wanted, store, pause, progress)
    with ThreadPoolExecutor(streams, thread_name_prefix="fetch") as pool:
        try:
            lanes = [
                pool.submit(_Lane(transfer, connect, draw, backoff or Backoff()).run)
                for _ in range(min(streams, len(transfer.lacking)))
            ]
            for lane in as_completed(lanes):
                lane.result()
        finally:
            transfer.stop()
    return transfer.report()


class _Stopped(Exception):
    """Another lane has failed, or the user interrupts: this one ends, too."""


class _Transfer:
    """What the lanes of one `fetch` share: the blobs to bring, the counts, and the end."""

    def __init__(
        self,
        wanted: Mapping[str, int],
        store: Store,
        pause: Callable[[float], None],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.store = store
        self.lacking = store.lacking(wanted)
        self._pause = pause
        self._progress = progress
        self._lock = Lock()
        self._stopped = Event()
        self._calls: set[Any] = set()
        self._queue = iter(self.lacking.items())
        self._total = sum(wanted.values())
        self._done = self._reused = self._total - sum(self.lacking.values())
        self._fetched = self._retries = 0

    def next_blob(self) -> tuple[str, int] | None:
        """(digest, num_bytes) of a blob that no lane has taken yet."""
        with self._lock:
            return next(self._queue, None)

    def count(self, fetched: int = 0, reused: int = 0, lost: int = 0) -> None:
        """Counts bytes: received and verified, here without that, thrown away as damaged."""
        with self._lock:
            self._fetched += fetched
            self._reused += reused
            self._done += fetched + reused - lost
            if self._progress:
                self._progress(self._done, self._total)

    def retry_after(self, seconds: float) -> None:
        """Waits before another attempt, and counts it."""
        self.rest(seconds)
        with self._lock:
            self._retries += 1

    def rest(self, seconds: float) -> None:
        """Waits, in steps short enough to notice the end."""
        self.require_running()
        while seconds > 0:
            step = min(seconds, LOOK_AGAIN_SECONDS)
            self._pause(step)
            self.require_running()
            seconds -= step

    def require_running(self) -> None:
        """Raises _Stopped when the lanes are to end."""
        if self._stopped.is_set():
            raise _Stopped

    @contextmanager
    def open(self, call: Any) -> Iterator[None]:
        """Cancels the call when the block ends, or when the lanes are to end."""
        with self._lock:
            self._calls.add(call)
        try:
            self.require_running()
            yield
        finally:
            call.cancel()
            with self._lock:
                self._calls.remove(call)

    def stop(self) -> None:
        """Ends all lanes soon, whatever they wait for."""
        self._stopped.set()
        with self._lock:
            for call in self._calls:
                call.cancel()

    def report(self) -> FetchReport:
        """The counts, once all lanes have ended."""
        return FetchReport(self._fetched, self._reused, self._retries)


class _Lane:
    """One stream at a time over one connection: blob after blob, until none is left."""

    def __init__(
        self,
        transfer: _Transfer,
        connect: Callable[[], grpc.Channel],
        draw: Callable[[], float],
        backoff: Backoff,
    ) -> None:
        self._transfer = transfer
        self._connect = connect
        self._draw = draw
        self._backoff = backoff
        self._channel: grpc.Channel | None = None

    def run(self) -> None:
        """Brings blobs into the store until none is left."""
        try:
            while blob := self._transfer.next_blob():
                self._bring(*blob)
        finally:
            self._disconnect()

    def _bring(self, digest: str, num_bytes: int) -> None:
        """Fetches one blob, or waits for another process that is about to have it."""
        store = self._transfer.store
        while not store.holds(digest, num_bytes):
            partial = store.begin(digest, num_bytes)
            if partial is None:
                self._transfer.rest(LOOK_AGAIN_SECONDS)
                continue
            with partial:
                self._transfer.count(reused=partial.num_verified)
                self._fetch(partial, digest)
            return
        self._transfer.count(reused=num_bytes)

    def _fetch(self, partial: Partial, digest: str) -> None:
        failures = Failures(self._backoff.retries, partial.num_verified)
        while True:
            reached = 0
            try:
                try:
                    self._receive(partial, digest)
                finally:
                    reached = partial.num_verified
                partial.finish()
                return
            except (grpc.RpcError, IntegrityError) as error:
                # gRPC would wait before it connects again, and answer for the network meanwhile.
                self._disconnect()
                self._transfer.require_running()
                self._transfer.count(lost=reached - partial.num_verified)
                reason, damaged = _reason(error, digest)
                number = failures.add(reason, reached, damaged)
                self._transfer.retry_after(self._backoff.seconds(number, self._draw()))

    def _receive(self, partial: Partial, digest: str) -> None:
        """Adds what the coordinator sends, chunk by chunk, until the blob or the stream ends."""
        if partial.num_verified == partial.num_bytes:
            return
        if self._channel is None:
            self._channel = self._connect()
        request = FetchRequest(digest=digest, offset=partial.num_verified)
        call = BlobsStub(self._channel).Fetch(request)
        with self._transfer.open(call):
            for chunk in call:
                if (chunk.offset, chunk.blob_bytes) != (partial.num_verified, partial.num_bytes):
                    raise IntegrityError(
                        f"byte {chunk.offset} of {chunk.blob_bytes} was sent, byte "
                        f"{partial.num_verified} of {partial.num_bytes} was wanted"
                    )
                data = chunk.data  # a copy, each time one asks
                partial.append(data, chunk.digest)
                self._transfer.count(fetched=len(data))

    def _disconnect(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None


def _reason(error: grpc.RpcError | IntegrityError, digest: str) -> tuple[str, bool]:
    """What went wrong, and whether bytes were damaged; TransferRefused if it is for good."""
    blob = f"blob {digest[:12]}"
    if isinstance(error, IntegrityError):
        return f"{blob}: {error}", True
    code = error.code()
    reason = f"{blob}: {code.name}, {error.details()}"
    if code in FOR_GOOD:
        raise TransferRefused(f"{reason}; join again for a plan that this device may have")
    return reason, code is grpc.StatusCode.DATA_LOSS
