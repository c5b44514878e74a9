"""A chunk is hashed once, and what is remembered is always of the file as it is."""

import hashlib
import os
import time

import grpc
import pytest

from proxymoe.common.files import digest_of
from proxymoe.common.generated.blobs_pb2 import FetchRequest
from proxymoe.common.generated.blobs_pb2_grpc import BlobsStub
from proxymoe.server import digests as module
from proxymoe.server.blobs import BlobService
from proxymoe.server.digests import SETTLED_SECONDS, ChunkDigests
from tests.blob_site import SMALL_CHUNKS, BlobFiles, contents, everyone, serving

CHUNK = 10
BLOB = "a" * 64


class Hashing:
    """Stands for hashlib, and counts what is hashed."""

    def __init__(self):
        self.hashed = []

    def sha256(self, data):
        self.hashed.append(bytes(data))
        return hashlib.sha256(data)


@pytest.fixture
def hashing(monkeypatch):
    counted = Hashing()
    monkeypatch.setattr(module, "hashlib", counted)
    return counted


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "shard"
    found.write_bytes(b"0123456789abcdef")
    return found


@pytest.fixture
def settled():
    """The digests of a service that looks at files long after they were written."""
    return ChunkDigests(CHUNK, clock=lambda: time.time() + 2 * SETTLED_SECONDS)


def sha(data):
    return hashlib.sha256(data).digest()


def test_a_chunk_is_hashed_for_the_first_who_asks(settled, path, hashing):
    for _ in range(3):
        digest = settled.of(BLOB, path)
        assert digest(0, b"0123456789") == sha(b"0123456789")
        assert digest(10, b"abcdef") == sha(b"abcdef")
    assert hashing.hashed == [b"0123456789", b"abcdef"]


def test_what_is_remembered_is_of_one_blob(settled, path):
    settled.of(BLOB, path)(0, b"one")
    assert settled.of("b" * 64, path)(0, b"two") == sha(b"two")


def test_ranges_that_are_no_chunks_of_the_blob_are_not_remembered(settled, path, hashing):
    for _ in range(2):
        assert settled.of(BLOB, path)(3, b"3456789abc") == sha(b"3456789abc")
    assert len(hashing.hashed) == 2


@pytest.mark.parametrize("change", ["rewritten", "replaced", "written with its old time"])
def test_another_file_has_other_digests(settled, path, change):
    assert settled.of(BLOB, path)(0, b"damaged") == sha(b"damaged")
    before = path.stat()
    time.sleep(0.02)  # file systems count time in steps of some milliseconds
    if change == "replaced":
        other = path.with_name("other")
        other.write_bytes(path.read_bytes())
        other.replace(path)
    else:
        path.write_bytes(path.read_bytes())
    if change != "rewritten":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert settled.of(BLOB, path)(0, b"restored") == sha(b"restored")


def test_a_file_that_has_just_been_written_is_hashed_each_time(path, hashing):
    digests = ChunkDigests(CHUNK)
    for _ in range(2):
        digests.of(BLOB, path)(0, b"0123456789")
    assert len(hashing.hashed) == 2


def test_a_file_that_is_gone_is_an_error(settled, path):
    path.unlink()
    with pytest.raises(FileNotFoundError):
        settled.of(BLOB, path)


def test_a_service_hashes_a_blob_for_its_first_device_only(tmp_path, hashing, monkeypatch):
    monkeypatch.setattr(module, "SETTLED_SECONDS", -1.0)
    files = BlobFiles(tmp_path / "shard", *contents(3 * SMALL_CHUNKS.chunk_bytes + 7))
    (blob,) = files
    with serving(BlobService(files, everyone, SMALL_CHUNKS)) as site:
        for device in ("device-a", "device-b"):
            for start in (0, SMALL_CHUNKS.chunk_bytes):
                request = FetchRequest(digest=blob, offset=start)
                channel: grpc.Channel
                with site.connector(device)() as channel:
                    chunks = list(BlobsStub(channel).Fetch(request))
                assert all(chunk.digest.hex() == digest_of(chunk.data) for chunk in chunks)
    assert len(hashing.hashed) == 4
