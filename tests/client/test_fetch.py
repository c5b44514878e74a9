"""Every blob arrives, whatever happens on the way, at little more than its own bytes."""

import os
import signal
import threading
import time
from functools import partial
from typing import Any

import grpc
import pytest

from proxymoe.client.fetch import CHANNEL_OPTIONS, fetch
from proxymoe.client.partial import StoreError
from proxymoe.client.retry import MAX_DAMAGED, Backoff, TransferError, TransferRefused
from proxymoe.client.store import Store
from proxymoe.common.errors import IntegrityError
from proxymoe.common.files import digest_of
from proxymoe.common.generated.blobs_pb2 import Chunk
from proxymoe.server.blobs import BlobLimits, BlobService
from proxymoe.simulations.faults.proxy import FaultyProxy
from tests.blob_site import (
    SMALL_CHUNKS,
    Authority,
    BlobFiles,
    contents,
    everyone,
    serving,
)

CHUNK = SMALL_CHUNKS.chunk_bytes
MIB = 1 << 20


class Pauses(list[float]):
    """Counts pauses in place of waiting; a real pause follows only so that others may run."""

    def __call__(self, seconds):
        self.append(seconds)
        time.sleep(0.001)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store", 10**9)


def bring(store, files, connect, **options):
    """`fetch` with what the tests do not care about."""
    needs = options.pop("needs", files.needs)
    store.pin("g1", needs)
    usual: dict[str, Any] = {"pause": Pauses(), "backoff": Backoff(retries=3), "draw": lambda: 0.5}
    return fetch(needs.items(), store, connect, **(usual | options))


def require_all(store, files):
    for digest, content in zip(files, files.contents, strict=True):
        assert store.path(digest).read_bytes() == content


@pytest.fixture
def files(tmp_path):
    return BlobFiles(tmp_path / "shard", *contents(5 * CHUNK + 7, 1, 3 * CHUNK, 0, 90))


@pytest.mark.parametrize("streams", [1, 4])
def test_all_blobs_arrive_and_are_not_fetched_twice(store, files, streams):
    total = sum(map(len, files.contents))
    told = []
    with serving(BlobService(files, everyone, SMALL_CHUNKS)) as site:
        report = bring(
            store,
            files,
            site.connector(),
            streams=streams,
            progress=lambda done, of: told.append((done, of)),
        )
        again = bring(store, files, site.connector())
    require_all(store, files)
    assert (report.fetched_bytes, report.reused_bytes, report.retries) == (total, 0, 0)
    assert (again.fetched_bytes, again.reused_bytes, again.retries) == (0, total, 0)
    assert told[-1] == (total, total)
    assert told == sorted(told)


def test_only_what_is_new_is_fetched(store, files):
    known, *new = files
    with serving(BlobService(files, everyone, SMALL_CHUNKS)) as site:
        bring(store, files, site.connector(), needs={known: files.needs[known]})
        report = bring(store, files, site.connector())
    assert report.reused_bytes == files.needs[known]
    assert report.fetched_bytes == sum(files.needs[digest] for digest in new)


def test_a_store_that_lacks_nothing_needs_no_coordinator(store, files):
    with serving(BlobService(files, everyone)) as site:
        bring(store, files, site.connector())
    report = bring(store, files, connect=lambda: pytest.fail("connected"))
    assert report.fetched_bytes == 0


def test_a_partial_blob_that_is_complete_needs_no_coordinator(store, tmp_path):
    files = BlobFiles(tmp_path / "shard", os.urandom(90))
    ((digest, size),) = files.items()
    started = store.begin(digest, size.num_bytes)
    assert started is not None
    with started:
        started.append(files.contents[0], bytes.fromhex(digest))
    bring(store, files, connect=lambda: pytest.fail("connected"))
    require_all(store, files)


@pytest.mark.parametrize("streams", [1, 3])
def test_a_cut_costs_less_than_two_chunks(store, tmp_path, streams):
    files = BlobFiles(tmp_path / "shard", *contents(4 * MIB, 2 * MIB + 9, 3 * MIB))
    total = sum(map(len, files.contents))
    handed = []

    class Counted(BlobService):
        def Fetch(self, request, context):  # noqa: N802
            for chunk in super().Fetch(request, context):
                handed.append(len(chunk.data))
                yield chunk

    with (
        serving(Counted(files, everyone)) as site,
        FaultyProxy(site.port, cut_every=streams * 1_600_000) as proxy,
    ):
        connect = site.connector(port=proxy.port)
        report = bring(store, files, connect, streams=streams, backoff=Backoff(retries=5))
        cuts, on_the_wire, connections = proxy.num_cuts, proxy.num_bytes, proxy.num_connections
    require_all(store, files)
    assert 1 <= report.retries <= cuts
    assert connections == streams + report.retries
    assert report.fetched_bytes == total, "no verified byte is sent again"
    assert on_the_wire - total < 2 * MIB * cuts
    assert sum(handed) - total <= 2 * MIB * cuts


def test_bytes_corrupted_on_the_way_break_the_connection_and_nothing_else(store, tmp_path):
    files = BlobFiles(tmp_path / "shard", *contents(600_000))
    with (
        serving(BlobService(files, everyone, SMALL_CHUNKS)) as site,
        FaultyProxy(site.port, corrupt_every=200_000) as proxy,
    ):
        # On a busy machine a connection may break before what came over it is read.
        patient = Backoff(retries=10)
        report = bring(store, files, site.connector(port=proxy.port), backoff=patient)
        assert 2 <= report.retries <= proxy.num_corrupted
    require_all(store, files)


def test_a_connection_that_dies_silently_is_given_up_and_replaced(store, tmp_path):
    files = BlobFiles(tmp_path / "shard", *contents(600_000))
    lively = dict(CHANNEL_OPTIONS) | {
        "grpc.keepalive_time_ms": 100,
        "grpc.keepalive_timeout_ms": 200,
        "grpc.http2.ping_timeout_ms": 200,
    }
    with (
        serving(BlobService(files, everyone, SMALL_CHUNKS)) as site,
        FaultyProxy(site.port, swallow_after=200_000) as proxy,
    ):
        certificate, key = site.authority.issue("device-a")
        credentials = grpc.ssl_channel_credentials(site.authority.certificate, key, certificate)

        def connect():
            proxy.swallows.clear()
            address = f"127.0.0.1:{proxy.port}"
            return grpc.secure_channel(address, credentials, options=list(lively.items()))

        report = bring(store, files, connect)
        assert proxy.num_connections == 2
    assert report.retries == 1
    require_all(store, files)


def test_a_later_fetch_goes_on_where_a_failed_one_stopped(store, tmp_path):
    files = BlobFiles(tmp_path / "shard", *contents(20 * CHUNK))
    (digest,) = files
    with serving(BlobService(files, everyone, SMALL_CHUNKS)) as site:
        with pytest.raises(RuntimeError, match="enough"):
            bring(store, files, site.connector(), progress=partial(stop_at, 7 * CHUNK))
        assert not store.holds(digest, 20 * CHUNK)
        report = bring(store, files, site.connector())
    assert (report.reused_bytes, report.fetched_bytes) == (7 * CHUNK, 13 * CHUNK)
    require_all(store, files)


def stop_at(limit, done, _):
    if done >= limit:
        raise RuntimeError("enough")


def test_an_unreachable_coordinator_is_asked_a_bounded_number_of_times(store, files):
    with serving(BlobService(files, everyone)) as site:
        connect = site.connector()
    pauses = Pauses()
    backoff = Backoff(retries=4, first_seconds=0.02, max_seconds=0.1)
    with pytest.raises(TransferError, match=r"UNAVAILABLE.*5 failures in a row, the limit is 4"):
        bring(store, files, connect, streams=1, backoff=backoff, pause=pauses, draw=lambda: 0.0)
    assert pauses == [0.01, 0.02, 0.04, 0.05]


def test_a_foreign_coordinator_gets_no_request(store, files):
    asked = []

    def note(device, digest):
        asked.append((device, digest))
        return True

    with (
        serving(BlobService(files, note)) as ours,
        serving(BlobService(files, note)) as foreign,
    ):
        connect = ours.connector(port=foreign.port)
        with pytest.raises(TransferError, match="UNAVAILABLE"):
            bring(store, files, connect, backoff=Backoff(retries=1))
    assert asked == []


def test_a_foreign_device_gets_nothing(store, files):
    with serving(BlobService(files, everyone)) as site:
        connect = site.connector(authority=Authority())
        with pytest.raises(TransferError):
            bring(store, files, connect, backoff=Backoff(retries=1))
    assert not any(store.holds(*need) for need in files.needs.items() if need[1])


@pytest.mark.parametrize(
    ("allowed", "known", "reason"),
    [(False, True, "PERMISSION_DENIED, no plan"), (True, False, "NOT_FOUND, no such blob")],
)
def test_what_is_refused_for_good_is_asked_for_once(store, files, allowed, known, reason):
    asked = []

    def decide(device, digest):
        asked.append(digest)
        return allowed

    pauses = Pauses()
    with (
        serving(BlobService(files if known else {}, decide)) as site,
        pytest.raises(TransferRefused, match=reason),
    ):
        bring(store, files, site.connector(), streams=1, pause=pauses)
    assert len(asked) == 1
    assert pauses == []


def test_too_many_streams_are_asked_for_again(store, tmp_path):
    files = BlobFiles(tmp_path / "shard", *contents(*[3 * CHUNK] * 6))
    limits = BlobLimits(streams_per_device=1, chunk_bytes=CHUNK)
    with serving(BlobService(files, everyone, limits)) as site:
        bring(store, files, site.connector(), streams=3, backoff=Backoff(retries=10_000))
    require_all(store, files)


def harm(files, digest):
    """Damages a blob in the file that the server reads."""
    with files.path.open("r+b") as file:
        file.seek(files[digest].offset + files[digest].num_bytes - 1)
        file.write(bytes([files.contents[list(files).index(digest)][-1] ^ 1]))


def test_a_blob_damaged_at_the_server_is_never_stored(store, files, tmp_path):
    first, *_ = files
    harm(files, first)
    size = files.needs[first]
    told = []
    with serving(BlobService(files, everyone, SMALL_CHUNKS)) as site:
        with pytest.raises(IntegrityError, match=rf"{first[:12]}: {size} bytes differ from .* 3 t"):
            bring(
                store,
                files,
                site.connector(),
                needs={first: size},
                progress=lambda done, _: told.append(done),
            )
        assert told.count(size) == MAX_DAMAGED + 1
        assert not store.holds(first, size)
        assert (tmp_path / "store" / "partial" / first).stat().st_size == 0


def test_a_blob_that_is_repaired_in_time_is_fetched_anew(store, files):
    first, *_ = files
    harm(files, first)

    def repair(_):
        with files.path.open("r+b") as file:
            file.seek(files[first].offset)
            file.write(files.contents[0])

    with serving(BlobService(files, everyone, SMALL_CHUNKS)) as site:
        report = bring(store, files, site.connector(), streams=1, pause=repair)
    require_all(store, files)
    assert report.fetched_bytes == sum(map(len, files.contents)) + files.needs[first]


def test_a_blob_missing_on_the_servers_disk_is_damage(store, files):
    files.path.unlink()
    with (
        serving(BlobService(files, everyone)) as site,
        pytest.raises(IntegrityError, match="DATA_LOSS"),
    ):
        bring(store, files, site.connector())


def lying(files, change):
    """A service whose chunks are changed by a function of the number of the chunk and itself."""

    class Lying(BlobService):
        def Fetch(self, request, context):  # noqa: N802
            for number, chunk in enumerate(super().Fetch(request, context)):
                yield from change(number, chunk)

    return Lying(files, everyone, SMALL_CHUNKS)


def changed(**fields):
    def change(number, chunk):
        for name, value in fields.items() if number == 0 else ():
            setattr(chunk, name, value)
        yield chunk

    return change


def ended(number, chunk):
    if number < 2:
        yield chunk


def doubled(number, chunk):
    yield chunk
    yield chunk


def endless(number, chunk):
    yield chunk
    empty = {"offset": chunk.offset + CHUNK, "blob_bytes": chunk.blob_bytes}
    while number == 0:
        yield Chunk(digest=bytes.fromhex(digest_of(b"")), **empty)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"data": b"x"}, "the chunk at byte 0 differs from its digest"),
        ({"digest": b"x" * 32}, "the chunk at byte 0 differs from its digest"),
        ({"offset": 7}, "byte 7 of 81927 was sent, byte 0 of 81927 was wanted"),
        ({"blob_bytes": 9}, "byte 0 of 9 was sent, byte 0 of 81927 was wanted"),
        ({"data": b""}, "0 bytes at byte 0 do not fit"),
    ],
    ids=["data", "digest", "offset", "size", "empty"],
)
def test_a_lying_server_is_not_believed(store, files, fields, reason, tmp_path):
    first, *_ = files
    pauses = Pauses()
    with (
        serving(lying(files, changed(**fields))) as site,
        pytest.raises(IntegrityError, match=reason),
    ):
        bring(store, files, site.connector(), needs={first: files.needs[first]}, pause=pauses)
    assert (tmp_path / "store" / "partial" / first).stat().st_size == 0
    assert pauses


@pytest.mark.parametrize("change", [doubled, endless])
def test_what_a_server_sends_too_much_is_not_taken(store, files, change):
    first, *_ = files
    with serving(lying(files, change)) as site:
        report = bring(store, files, site.connector(), needs={first: files.needs[first]})
    assert store.path(first).read_bytes() == files.contents[0]
    assert report.fetched_bytes == files.needs[first]
    assert report.retries >= 4


def test_a_stream_that_ends_early_is_taken_up_again(store, files):
    first, *_ = files
    with serving(lying(files, ended)) as site:
        report = bring(store, files, site.connector(), needs={first: files.needs[first]})
    assert store.path(first).read_bytes() == files.contents[0]
    assert report.retries == 2


def test_what_is_not_pinned_is_not_fetched(store, files):
    with pytest.raises(StoreError, match="not pinned"):
        fetch(files.needs.items(), store, lambda: pytest.fail("connected"), lambda: 0.5)


def test_two_processes_that_want_the_same_fetch_it_once(store, tmp_path):
    files = BlobFiles(tmp_path / "shard", *contents(*[6 * CHUNK] * 5))
    total = sum(map(len, files.contents))
    reports = []
    with serving(BlobService(files, everyone, SMALL_CHUNKS)) as site:

        def run(name):
            own = Store(tmp_path / "store", 10**9)
            reports.append(bring(own, files, site.connector(name), streams=2))

        threads = [threading.Thread(target=run, args=[name]) for name in ("device-a", "device-b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    require_all(store, files)
    assert sum(report.fetched_bytes for report in reports) == total
    assert all(report.fetched_bytes + report.reused_bytes == total for report in reports)


def test_an_interrupt_ends_all_streams_soon_and_keeps_what_came(store, tmp_path):
    files = BlobFiles(tmp_path / "shard", *contents(*[40 * CHUNK] * 3))
    slow = BlobLimits(chunk_bytes=CHUNK, bytes_per_second=20 * CHUNK, burst_bytes=6 * CHUNK)
    told, presses = [], [5, 60]

    def progress(done, _):
        told.append(done)
        # Now and then, on a busy machine, the first one is not seen; then people press again.
        if presses and done >= presses[0] * CHUNK:
            presses.pop(0)
            os.kill(os.getpid(), signal.SIGINT)

    with (
        serving(BlobService(files, everyone, slow)) as site,
        pytest.raises(KeyboardInterrupt),
    ):
        bring(store, files, site.connector(), pause=time.sleep, progress=progress)
    assert store.lacking(files.needs) == files.needs, "it did not wait for the rest"
    parts = (tmp_path / "store" / "partial" / digest for digest in files)
    assert sum(part.stat().st_size for part in parts) == max(told)
