"""Network edge of the coordinator: sends blobs to devices, straight out of the files they lie in.

A blob is a byte range of a file, so the server needs no second copy of the base model. Who asks is
known from the client certificate, what a device may have is asked of the caller, and a stream
holds one chunk in memory, however large the blob is.
"""

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from proxymoe.common.assignment import MAX_APPLICATION_BYTES
from proxymoe.common.errors import CheckpointError, ConfigError
from proxymoe.common.generated.blobs_pb2 import Chunk, FetchRequest
from proxymoe.common.generated.blobs_pb2_grpc import BlobsServicer, add_BlobsServicer_to_server
from proxymoe.server.digests import ChunkDigests

log = logging.getLogger(__name__)

MAX_CHUNK_BYTES = 1 << 20
"""What the protocol promises to devices."""
REFUSERS = 4
"""Threads beyond the streams, so that one stream too many hears at once that it is."""
SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second server on the same port is an error, not a surprise
    ("grpc.max_receive_message_length", MAX_APPLICATION_BYTES + 1024),  # requests are small
    ("grpc.keepalive_time_ms", 30_000),  # a device that vanished frees its stream
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # devices look after us, too
)


@dataclass(frozen=True, slots=True)
class BlobPlace:
    """Where the bytes of a blob lie: a range of a file, or all of it."""

    path: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class BlobLimits:
    """How much a blob service gives away at a time.

    Raises:
        ConfigError: a limit under which nothing could be sent.
    """

    streams: int = 32
    """At most so many blobs are on their way at once."""
    streams_per_device: int = 4
    bytes_per_second: float | None = None
    """Of all streams together; None sends as fast as it goes."""
    burst_bytes: int = 8 << 20
    """What may be sent at once after a quiet time."""
    patience_seconds: float = 60.0
    """A stream that would pause longer for the byte rate is ended, to be resumed later."""
    chunk_bytes: int = MAX_CHUNK_BYTES

    def __post_init__(self) -> None:
        if min(self.streams, self.streams_per_device) < 1:
            raise ConfigError(
                f"{self.streams} streams, {self.streams_per_device} per device: both need 1 or more"
            )
        if self.bytes_per_second is not None and self.bytes_per_second <= 0:
            raise ConfigError(f"{self.bytes_per_second} bytes per second: more than 0, or None")
        if not 1 <= self.chunk_bytes <= MAX_CHUNK_BYTES:
            raise ConfigError(f"chunks of {self.chunk_bytes} bytes: 1 to {MAX_CHUNK_BYTES}")


class TokenBucket:
    """Paces pieces: in any t seconds, at most burst + t × rate bytes follow the first of them.

    Args:
        bytes_per_second: the rate.
        burst_bytes: what is let through at once when nothing was taken for long.
        clock: seconds that never run backwards.
    """

    def __init__(
        self, bytes_per_second: float, burst_bytes: int, clock: Callable[[], float]
    ) -> None:
        self._rate = bytes_per_second
        self._burst = float(burst_bytes)
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens = self._burst
        self._filled = clock()

    def take(self, num_bytes: int, patience_seconds: float) -> float | None:
        """Seconds to wait before these bytes may go; None, and nothing taken, if that is too long.

        Who takes more than there is leaves a debt, and those who come after wait for it too: the
        bucket serves in the order of asking.
        """
        with self._lock:
            now = self._clock()
            self._tokens = min(self._burst, self._tokens + (now - self._filled) * self._rate)
            self._filled = now
            wait = max(0.0, (num_bytes - self._tokens) / self._rate)
            if wait > patience_seconds:
                return None
            self._tokens -= num_bytes
            return wait

    def put_back(self, num_bytes: int) -> None:
        """Returns what was taken and then not sent, or hanging up would cost the others time."""
        with self._lock:
            self._tokens = min(self._burst, self._tokens + num_bytes)


class BlobService(BlobsServicer):
    """Answers `Fetch` of blobs.proto, which lists the status codes.

    Args:
        places: where each blob lies, by digest; may change while serving.
        allowed: whether a device, by name, may have a blob, by digest; called once per stream,
            from many threads, also with digests that do not exist.
        limits: how much is given away at a time.
        clock: seconds for the byte rate, never running backwards.
        caller: the device that calls; Refused if it may not.
    """

    def __init__(
        self,
        places: Mapping[str, BlobPlace],
        allowed: Callable[[str, str], bool],
        limits: BlobLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        caller: Callable[[grpc.ServicerContext], str] | None = None,
    ) -> None:
        self._caller = caller or (lambda context: device_of(context.auth_context()))
        self.limits = limits or BlobLimits()
        self._places = places
        self._digests = ChunkDigests(self.limits.chunk_bytes)
        self._allowed = allowed
        self._streams: Counter[str] = Counter()
        self._lock = threading.Lock()
        rate = self.limits.bytes_per_second
        self._bucket = TokenBucket(rate, self.limits.burst_bytes, clock) if rate else None

    def Fetch(self, request: FetchRequest, context: grpc.ServicerContext) -> Iterator[Chunk]:  # noqa: N802  gRPC's name
        """The chunks of a blob from an offset on; see blobs.proto."""
        ended = threading.Event()
        context.add_callback(ended.set)
        device = ""
        try:
            device = self._caller(context)
            place = self._place(device, request)
            with self._admitted(device):
                yield from self._chunks(request, place, ended)
        except Refused as refused:
            log.info("device %r: blob %.12s: %s", device, request.digest, refused.reason)
            context.abort(refused.code, refused.reason)
        except (OSError, CheckpointError) as error:
            # The path is nobody's business but ours.
            log.error("device %r: blob %.12s: %s", device, request.digest, error)
            context.abort(grpc.StatusCode.DATA_LOSS, "the blob is damaged on the server's disk")

    def _place(self, device: str, request: FetchRequest) -> BlobPlace:
        # Permission comes first: a device learns nothing of blobs that are not for it.
        if not self._allowed(device, request.digest):
            raise Refused(grpc.StatusCode.PERMISSION_DENIED, "no plan of this device names it")
        place = self._places.get(request.digest)
        if place is None:
            raise Refused(grpc.StatusCode.NOT_FOUND, "no such blob")
        if request.offset > place.num_bytes:
            raise Refused(
                grpc.StatusCode.OUT_OF_RANGE,
                f"offset {request.offset} in a blob of {place.num_bytes} bytes",
            )
        return place

    @contextmanager
    def _admitted(self, device: str) -> Iterator[None]:
        """Counts a stream while the block runs, unless it is one too many."""
        limits = self.limits
        with self._lock:
            if self._streams[device] >= limits.streams_per_device:
                reason = f"more than {limits.streams_per_device} streams of one device"
                raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
            if self._streams.total() >= limits.streams:
                reason = f"more than {limits.streams} streams of all devices"
                raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
            self._streams[device] += 1
        try:
            yield
        finally:
            with self._lock:
                self._streams[device] -= 1
                self._streams += Counter()  # forgets devices without a stream

    def _chunks(
        self, request: FetchRequest, place: BlobPlace, ended: threading.Event
    ) -> Iterator[Chunk]:
        digest = self._digests.of(request.digest, place.path)
        for offset, data in read_chunks(place, request.offset, self.limits.chunk_bytes):
            self._pace(len(data), ended)
            yield Chunk(
                offset=offset,
                data=data,
                digest=digest(offset, data),
                blob_bytes=place.num_bytes,
            )

    def _pace(self, num_bytes: int, ended: threading.Event) -> None:
        if self._bucket is None:
            return
        wait = self._bucket.take(num_bytes, self.limits.patience_seconds)
        if wait is None:
            reason = f"more than {self.limits.bytes_per_second:.0f} bytes per second are wanted"
            raise Refused(grpc.StatusCode.UNAVAILABLE, reason)
        if ended.wait(wait):  # a device that hangs up frees the thread at once
            self._bucket.put_back(num_bytes)


class Refused(Exception):
    """Carries a status to the one place that ends the call."""

    def __init__(self, code: grpc.StatusCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def device_of(identity: Mapping[str, bytes | Sequence[bytes]]) -> str:
    """The device that a gRPC auth context speaks for: the common name of its certificate.

    Raises:
        Refused: it names none, or several.
    """
    names = identity.get("x509_common_name", ())
    if isinstance(names, bytes) or len(names) != 1 or not names[0]:
        raise Refused(grpc.StatusCode.UNAUTHENTICATED, "the certificate must name one device")
    try:
        return names[0].decode()
    except UnicodeDecodeError:
        reason = "the certificate's name is not UTF-8"
        raise Refused(grpc.StatusCode.UNAUTHENTICATED, reason) from None


def read_chunks(place: BlobPlace, start: int, chunk_bytes: int) -> Iterator[tuple[int, bytes]]:
    """The bytes of a blob from `start` on, as (offset, data); read one by one, and at least one.

    Raises:
        CheckpointError: the file ends before the blob does.
        OSError: the file cannot be read.
    """
    with place.path.open("rb", buffering=0) as file:
        while True:
            wanted = min(chunk_bytes, place.num_bytes - start)
            data = os.pread(file.fileno(), wanted, place.offset + start)
            if len(data) != wanted:
                raise CheckpointError(
                    f"{place.path}: ends at byte {place.offset + start + len(data)}, inside a "
                    "blob; fetch the file again"
                )
            yield start, data
            start += len(data)
            if start >= place.num_bytes:
                return


def serve_blobs(
    service: BlobService,
    address: str,
    certificate: bytes,
    key: bytes,
    client_ca: bytes,
    others: Sequence[grpc.GenericRpcHandler] = (),
) -> tuple[grpc.Server, int]:
    """Starts serving over TLS; returns the server, and the port it is bound to.

    Nobody without a certificate signed by `client_ca` gets past the handshake.

    Args:
        service: answers the requests.
        address: host:port; port 0 takes a free one.
        certificate: of the server, PEM.
        key: its private key, PEM.
        client_ca: the certificate that signs those of devices, PEM.
        others: more methods, on the same port.

    Raises:
        ConfigError: the address is taken or not ours, or certificate and key are no pair.
    """
    threads = service.limits.streams + REFUSERS
    server = grpc.server(
        ThreadPoolExecutor(threads, thread_name_prefix="blobs"),
        options=SERVER_OPTIONS,
        maximum_concurrent_rpcs=threads,
    )
    add_BlobsServicer_to_server(service, server)
    server.add_generic_rpc_handlers(others)
    credentials = grpc.ssl_server_credentials(
        [(key, certificate)], root_certificates=client_ca, require_client_auth=True
    )
    try:
        port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ConfigError(
            f"{address}: blobs cannot be served here ({error}); is the address taken, or do "
            "certificate and key not belong together?"
        ) from error
    server.start()
    return server, port
