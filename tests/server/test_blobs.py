"""Any range of a blob, to those who may have it, and no faster than allowed."""

import time
import tracemalloc
from dataclasses import replace
from itertools import pairwise

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.errors import CheckpointError, ConfigError
from proxymoe.common.files import digest_of
from proxymoe.common.generated.blobs_pb2 import FetchRequest
from proxymoe.common.generated.blobs_pb2_grpc import BlobsStub
from proxymoe.server.blobs import (
    MAX_CHUNK_BYTES,
    BlobLimits,
    BlobPlace,
    BlobService,
    Refused,
    TokenBucket,
    device_of,
    read_chunks,
    serve_blobs,
)
from tests.blob_site import (
    SMALL_CHUNKS,
    Authority,
    BlobFiles,
    contents,
    everyone,
    serving,
    status,
)

CHUNK = SMALL_CHUNKS.chunk_bytes


@pytest.fixture
def files(tmp_path):
    return BlobFiles(tmp_path / "shard", *contents(5 * CHUNK + 7, 3 * CHUNK, 0))


def ask(connect, digest, offset=0):
    """All chunks of one answer."""
    with connect() as channel:
        return list(BlobsStub(channel).Fetch(FetchRequest(digest=digest, offset=offset)))


def refusal(connect, digest, offset=0):
    with pytest.raises(grpc.RpcError) as caught:
        ask(connect, digest, offset)
    return status(caught.value)


@pytest.mark.parametrize("start", [0, 1, CHUNK, 2 * CHUNK + 5, 5 * CHUNK + 6, 5 * CHUNK + 7])
def test_an_answer_is_the_blob_from_the_offset_on_in_verifiable_chunks(files, start):
    whole = files.contents[0]
    with serving(BlobService(files, everyone, SMALL_CHUNKS)) as site:
        chunks = ask(site.connector(), digest_of(whole), start)
    assert b"".join(chunk.data for chunk in chunks) == whole[start:]
    assert chunks[0].offset == start
    assert all(a.offset + len(a.data) == b.offset for a, b in pairwise(chunks))
    assert all(chunk.digest.hex() == digest_of(chunk.data) for chunk in chunks)
    assert {chunk.blob_bytes for chunk in chunks} == {len(whole)}


def test_an_empty_blob_is_answered_by_its_size(files):
    with serving(BlobService(files, everyone)) as site:
        (chunk,) = ask(site.connector(), digest_of(b""))
    assert (chunk.offset, chunk.data, chunk.blob_bytes) == (0, b"", 0)


@given(
    before=st.binary(max_size=9),
    blob=st.binary(max_size=90),
    after=st.binary(max_size=9),
    chunk_bytes=st.integers(1, 40),
    data=st.data(),
)
def test_chunks_are_the_range_and_nothing_around_it(
    tmp_path_factory, before, blob, after, chunk_bytes, data
):
    path = tmp_path_factory.getbasetemp() / "range"
    path.write_bytes(before + blob + after)
    start = data.draw(st.integers(0, len(blob)))
    found = list(read_chunks(BlobPlace(path, len(before), len(blob)), start, chunk_bytes))
    assert b"".join(content for _, content in found) == blob[start:]
    assert all(len(content) <= chunk_bytes for _, content in found)
    assert found[0][0] == start


def test_memory_does_not_grow_with_the_blob(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    tracemalloc.start()
    try:
        total = sum(len(data) for _, data in read_chunks(BlobPlace(path, 0, 64 << 20), 0, 1 << 20))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == 64 << 20
    assert peak < 4 << 20


def test_a_device_gets_only_what_it_is_allowed_and_learns_nothing_else(files):
    mine, other, _ = files
    asked = []

    def allowed(device, digest):
        asked.append((device, digest))
        return (device, digest) == ("device-a", mine)

    with serving(BlobService(files, allowed, SMALL_CHUNKS)) as site:
        assert ask(site.connector("device-a"), mine)
        refused = refusal(site.connector("device-a"), other)
        assert refused[0] is grpc.StatusCode.PERMISSION_DENIED
        assert refusal(site.connector("device-a"), "0" * 64) == refused
        assert refusal(site.connector("device-b"), mine) == refused
    assert asked[-1] == ("device-b", mine)


def test_what_may_be_asked_can_change_while_serving(files):
    mine, *_ = files
    revoked = set()
    with serving(BlobService(files, lambda device, _: device not in revoked)) as site:
        connect = site.connector("device-a")
        assert ask(connect, mine)
        revoked.add("device-a")
        assert refusal(connect, mine)[0] is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("digest", ["0" * 64, "", "../../etc/passwd"])
def test_an_unknown_blob_is_refused(files, digest):
    with serving(BlobService(files, lambda *_: True)) as site:
        assert refusal(site.connector(), digest) == (grpc.StatusCode.NOT_FOUND, "no such blob")


def test_an_offset_behind_the_end_is_refused_with_the_size(files):
    mine = digest_of(files.contents[0])
    with serving(BlobService(files, everyone)) as site:
        code, words = refusal(site.connector(), mine, 5 * CHUNK + 8)
    assert code is grpc.StatusCode.OUT_OF_RANGE
    assert words == f"offset {5 * CHUNK + 8} in a blob of {5 * CHUNK + 7} bytes"


@pytest.mark.parametrize("harm", ["gone", "short"])
def test_a_file_that_lost_bytes_is_told_without_its_path(files, harm, caplog):
    first, second, _ = files
    if harm == "gone":
        files.path.unlink()
    else:
        with files.path.open("r+b") as file:
            file.truncate(files[second].offset + CHUNK)
    with serving(BlobService(files, everyone, SMALL_CHUNKS)) as site:
        code, words = refusal(site.connector(), second)
        if harm == "short":
            assert ask(site.connector(), first), "what is not damaged is served on"
    assert code is grpc.StatusCode.DATA_LOSS
    assert str(files.path) not in words
    assert str(files.path) in caplog.text


def test_a_short_file_is_named_where_it_is_read(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(b"12345")
    with pytest.raises(CheckpointError, match=r"short: ends at byte 5, inside a blob"):
        list(read_chunks(BlobPlace(path, 2, 4), 0, 4))


def test_nobody_gets_in_without_a_certificate_of_our_authority(files):
    mine, *_ = files
    with serving(BlobService(files, everyone)) as site:
        foreign = site.connector("device-a", authority=Authority())
        assert refusal(foreign, mine)[0] is grpc.StatusCode.UNAVAILABLE
        anonymous = grpc.ssl_channel_credentials(site.authority.certificate)
        address = f"127.0.0.1:{site.port}"
        code, _ = refusal(lambda: grpc.secure_channel(address, anonymous), mine)
        assert code is grpc.StatusCode.UNAVAILABLE
        code, _ = refusal(lambda: grpc.insecure_channel(address), mine)
        assert code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("names", [None, [], [b""], [b"a", b"b"], [b"\xff"]])
def test_an_identity_that_is_not_one_name_is_refused(names):
    identity = {} if names is None else {"x509_common_name": names}
    with pytest.raises(Exception, match="certificate"):
        device_of(identity)


def paused(site, device, digest):
    """A stream that has begun and does not go on, until it is cancelled."""
    channel = site.connector(device)()
    call = BlobsStub(channel).Fetch(FetchRequest(digest=digest))
    next(call)
    return channel, call


def ask_until_admitted(connect, digest, offset=0):
    """The answer, once a stream that was cancelled is no longer counted."""
    for _ in range(500):
        try:
            return ask(connect, digest, offset)
        except grpc.RpcError as error:
            if status(error)[0] is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            time.sleep(0.01)
    pytest.fail("the cancelled stream is still counted")


@pytest.mark.parametrize(
    ("limits", "second", "reason"),
    [
        ({"streams_per_device": 1}, "device-a", "more than 1 streams of one device"),
        ({"streams": 1}, "device-b", "more than 1 streams of all devices"),
    ],
)
def test_a_stream_too_many_is_refused_until_another_ends(tmp_path, limits, second, reason):
    # Larger than a stream's window, so that it cannot end before it is read.
    files = BlobFiles(tmp_path / "shard", *contents(3 << 20))
    (digest,) = files
    with serving(BlobService(files, everyone, BlobLimits(**limits))) as site:
        channel, call = paused(site, "device-a", digest)
        connect = site.connector(second)
        assert refusal(connect, digest) == (grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
        call.cancel()
        channel.close()
        assert ask_until_admitted(connect, digest)


def test_another_device_is_not_held_up_by_one_that_has_all_its_streams(tmp_path):
    files = BlobFiles(tmp_path / "shard", *contents(3 << 20))
    (digest,) = files
    with serving(BlobService(files, everyone, BlobLimits(streams_per_device=1))) as site:
        channel, call = paused(site, "device-a", digest)
        assert ask(site.connector("device-b"), digest)
        call.cancel()
        channel.close()


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@given(
    rate=st.floats(1, 1e6),
    burst=st.integers(0, 1000),
    steps=st.lists(st.tuples(st.floats(0, 10), st.integers(0, 5000)), max_size=30),
)
def test_in_no_stretch_of_time_more_than_burst_and_rate_follow_the_first_piece(rate, burst, steps):
    clock = Clock()
    bucket = TokenBucket(rate, burst, clock)
    sent = []
    for seconds, num_bytes in steps:
        clock.now += seconds
        wait = bucket.take(num_bytes, 1e9)
        assert wait is not None
        sent.append((clock.now + wait, num_bytes))
    assert [at for at, _ in sent] == sorted(at for at, _ in sent)
    for i, (start, _) in enumerate(sent):
        for j in range(i, len(sent)):
            through = sum(num_bytes for _, num_bytes in sent[i + 1 : j + 1])
            assert through <= burst + rate * (sent[j][0] - start) + 1e-3


def test_a_bucket_that_is_asked_for_less_than_its_rate_never_waits():
    clock = Clock()
    bucket = TokenBucket(1000.0, 100, clock)
    for _ in range(50):
        assert bucket.take(100, 1.0) == pytest.approx(0.0, abs=1e-9)
        clock.now += 0.1


def test_who_would_wait_too_long_takes_nothing():
    clock = Clock()
    bucket = TokenBucket(100.0, 100, clock)
    assert bucket.take(300, 2.0) == 2.0
    assert bucket.take(1, 2.0) is None
    clock.now = 2.0
    assert bucket.take(100, 1.0) == 1.0


def test_what_was_not_sent_is_put_back_up_to_the_burst():
    bucket = TokenBucket(100.0, 100, Clock())
    assert bucket.take(300, 9.0) == 2.0
    bucket.put_back(300)
    assert bucket.take(100, 9.0) == 0.0
    bucket.put_back(200)
    assert bucket.take(200, 9.0) == 1.0


def test_bytes_come_no_faster_than_the_rate(tmp_path):
    files = BlobFiles(tmp_path / "shard", *contents(40_000))
    limits = BlobLimits(chunk_bytes=1000, bytes_per_second=100_000, burst_bytes=10_000)
    with serving(BlobService(files, everyone, limits)) as site:
        started = time.monotonic()
        ask(site.connector(), *files)
        assert time.monotonic() - started >= 0.29


def test_a_rate_that_would_keep_a_stream_too_long_ends_it(files):
    mine = digest_of(files.contents[0])
    limits = replace(SMALL_CHUNKS, bytes_per_second=1.0, burst_bytes=CHUNK, patience_seconds=1.0)
    with serving(BlobService(files, everyone, limits, Clock())) as site:
        code, words = refusal(site.connector(), mine)
    assert (code, words) == (
        grpc.StatusCode.UNAVAILABLE,
        "more than 1 bytes per second are wanted",
    )


def test_a_device_that_hangs_up_frees_a_stream_that_waits_for_the_rate(files):
    mine = digest_of(files.contents[0])
    limits = replace(SMALL_CHUNKS, streams=1, bytes_per_second=CHUNK / 50, burst_bytes=CHUNK)
    service = BlobService(files, everyone, limits)
    with serving(service) as site:
        channel, call = paused(site, "device-a", mine)
        call.cancel()
        channel.close()
        # Nothing is left to send: only the stream, or what it took of the rate, is in the way.
        assert ask_until_admitted(site.connector(), mine, len(files.contents[0]))


@pytest.mark.parametrize(
    "limits",
    [
        {"streams": 0},
        {"streams_per_device": 0},
        {"bytes_per_second": 0.0},
        {"chunk_bytes": 0},
        {"chunk_bytes": MAX_CHUNK_BYTES + 1},
    ],
)
def test_limits_under_which_nothing_is_sent_are_refused(limits):
    with pytest.raises(ConfigError):
        BlobLimits(**limits)


def test_an_address_that_is_taken_is_refused(files):
    service = BlobService(files, everyone)
    with serving(service) as site:
        certificate, key = site.authority.issue("coordinator")
        address = f"127.0.0.1:{site.port}"
        with pytest.raises(ConfigError, match=rf"{address}: blobs cannot be served here"):
            serve_blobs(service, address, certificate, key, site.authority.certificate)


def test_a_key_of_another_certificate_is_refused(files):
    authority = Authority()
    certificate, _ = authority.issue("coordinator")
    _, key = authority.issue("coordinator")
    with pytest.raises(ConfigError, match="certificate and key"):
        serve_blobs(
            BlobService(files, everyone), "127.0.0.1:0", certificate, key, authority.certificate
        )


def test_whom_the_service_does_not_take_for_a_device_gets_nothing(files):
    def caller(context):
        raise Refused(grpc.StatusCode.PERMISSION_DENIED, "this device key is revoked")

    service = BlobService(files, everyone, caller=caller)
    with serving(service) as site, pytest.raises(grpc.RpcError) as caught:
        ask(site.connector(), next(iter(files)))
    assert status(caught.value) == (
        grpc.StatusCode.PERMISSION_DENIED,
        "this device key is revoked",
    )
