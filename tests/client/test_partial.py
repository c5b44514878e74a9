"""Whatever a crash leaves of a blob, what is found again is a true beginning of it."""

import hashlib
import os
import resource
import signal
import subprocess
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.client.partial import MAX_CHUNK_BYTES, RECORD, StoreError
from proxymoe.client.store import Store
from proxymoe.common.errors import IntegrityError
from proxymoe.common.files import digest_of
from tests.laws import tried

CHUNK = 1000
BLOB = bytes(i * i % 251 for i in range(5 * CHUNK + 17))
DIGEST = digest_of(BLOB)


def sha(content):
    return hashlib.sha256(content).digest()


def begin(store, blob=BLOB):
    partial = store.begin(digest_of(blob), len(blob))
    assert partial is not None
    return partial


def feed(partial, blob=BLOB, up_to=None):
    """Adds chunks from where it stands, until so many bytes are there."""
    while partial.num_verified < (len(blob) if up_to is None else up_to):
        chunk = blob[partial.num_verified : partial.num_verified + CHUNK]
        partial.append(chunk, sha(chunk))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store", 10**9)


@tried(20)  # each example flushes a disk again and again
@given(stops=st.lists(st.integers(0, 6 * CHUNK), max_size=5))
def test_a_blob_in_any_number_of_attempts_is_the_blob(tmp_path_factory, stops):
    store = Store(tmp_path_factory.mktemp("store"), 10**9)
    reached = 0
    for stop in stops:
        with begin(store) as partial:
            assert partial.num_verified == reached
            feed(partial, up_to=min(stop, len(BLOB)))
            reached = partial.num_verified
    with begin(store) as partial:
        feed(partial)
        partial.finish()
    assert store.path(DIGEST).read_bytes() == BLOB


@tried(30)
@given(data=st.data())
def test_whatever_a_crash_leaves_only_a_true_beginning_is_found(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("store")
    with begin(Store(folder, 10**9)) as partial:
        feed(partial, up_to=4 * CHUNK)
    for path in (folder / "partial" / DIGEST, folder / "partial" / f"{DIGEST}.chunks"):
        content = bytearray(path.read_bytes())
        for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
            content[at] ^= data.draw(st.integers(1, 255))
        size = data.draw(st.integers(0, len(content)))
        path.write_bytes(bytes(content[:size]) + data.draw(st.binary(max_size=50)))
    with begin(Store(folder, 10**9)) as partial:
        found = (folder / "partial" / DIGEST).read_bytes()
        assert found == BLOB[: partial.num_verified]
        feed(partial)
        partial.finish()
    assert Store(folder, 10**9).path(DIGEST).read_bytes() == BLOB


def test_a_process_killed_at_any_chunk_costs_at_most_that_chunk(tmp_path):
    script = """
import hashlib, os, signal, sys
from pathlib import Path
from proxymoe.client.store import Store
blob = bytes(i * i % 251 for i in range(5017))
partial = Store(Path(sys.argv[1]), 10**9).begin(hashlib.sha256(blob).hexdigest(), len(blob))
for start in range(0, 3000, 1000):
    chunk = blob[start : start + 1000]
    partial.append(chunk, hashlib.sha256(chunk).digest())
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    with begin(Store(tmp_path, 10**9)) as partial:
        assert partial.num_verified == 3 * CHUNK
        feed(partial)
        partial.finish()


@pytest.mark.parametrize("left", ["data", "record"])
def test_a_chunk_without_its_record_and_a_record_without_its_chunk_are_dropped(tmp_path, left):
    store = Store(tmp_path, 10**9)
    with begin(store) as partial:
        feed(partial, up_to=2 * CHUNK)
    chunk = BLOB[2 * CHUNK : 3 * CHUNK]
    name, extra = {
        "data": (DIGEST, chunk),
        "record": (f"{DIGEST}.chunks", RECORD.pack(CHUNK, sha(chunk))),
    }[left]
    with (tmp_path / "partial" / name).open("ab") as file:
        file.write(extra)
    with begin(store) as partial:
        assert partial.num_verified == 2 * CHUNK


def test_a_chunk_that_differs_from_its_digest_is_not_added(store, tmp_path):
    with begin(store) as partial:
        feed(partial, up_to=CHUNK)
        with pytest.raises(IntegrityError, match="the chunk at byte 1000 differs"):
            partial.append(b"x" * CHUNK, sha(b"y" * CHUNK))
        assert partial.num_verified == CHUNK
        feed(partial)
        partial.finish()


@pytest.mark.parametrize("size", [0, len(BLOB) + 1])
def test_a_chunk_that_does_not_fit_is_not_added(store, size):
    with begin(store) as partial:
        with pytest.raises(IntegrityError, match=rf"{size} bytes at byte 0 do not fit"):
            partial.append(bytes(size), sha(bytes(size)))
        assert partial.num_verified == 0


def test_a_chunk_that_memory_is_not_made_for_is_not_added(store):
    blob = bytes(MAX_CHUNK_BYTES + 1)
    with begin(store, blob) as partial, pytest.raises(IntegrityError, match="do not fit"):
        partial.append(blob, sha(blob))


def test_wrong_bytes_with_right_chunk_digests_are_never_stored(store, tmp_path):
    wrong = BLOB[:-1] + b"!"
    with begin(store) as partial:
        feed(partial, wrong)
        with pytest.raises(IntegrityError, match="differ from the blob's digest"):
            partial.finish()
        assert partial.num_verified == 0
        assert not store.holds(DIGEST, len(BLOB))
        assert (tmp_path / "store" / "partial" / DIGEST).stat().st_size == 0
        feed(partial)
        partial.finish()
    assert store.path(DIGEST).read_bytes() == BLOB


def test_a_blob_that_is_not_whole_is_not_stored_and_can_go_on(store):
    with begin(store) as partial:
        feed(partial, up_to=2 * CHUNK)
        with pytest.raises(IntegrityError, match="ends at byte 2000 of 5017"):
            partial.finish()
        feed(partial)
        partial.finish()
    assert store.holds(DIGEST, len(BLOB))


def test_an_empty_blob_is_whole_from_the_start(store):
    with begin(store, b"") as partial:
        partial.finish()
    assert store.path(digest_of(b"")).read_bytes() == b""


def test_a_finished_blob_leaves_nothing_else_behind(store, tmp_path):
    with begin(store) as partial:
        feed(partial)
        partial.finish()
    assert list((tmp_path / "store" / "partial").iterdir()) == []


def test_a_full_disk_is_told_and_keeps_what_was_received(store):
    """The limit on file sizes stands for the disk: the write fails half-way, in the same place."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with begin(store) as partial:
        feed(partial, up_to=2 * CHUNK)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * CHUNK + 300, before[1]))
        try:
            with pytest.raises(StoreError, match="make room on the disk"):
                feed(partial)
            assert partial.num_verified == 2 * CHUNK
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
    with begin(store) as partial:
        assert partial.num_verified == 2 * CHUNK
        feed(partial)
        partial.finish()


def test_a_second_writer_waits_for_the_first_and_goes_on_from_there(store, tmp_path):
    other = Store(tmp_path / "store", 10**9)
    with begin(store) as partial:
        feed(partial, up_to=3 * CHUNK)
        assert other.begin(DIGEST, len(BLOB)) is None
    with begin(other) as partial:
        assert partial.num_verified == 3 * CHUNK
        assert store.begin(DIGEST, len(BLOB)) is None
        feed(partial)
        partial.finish()
        assert store.begin(DIGEST, len(BLOB)) is None
    assert store.begin(DIGEST, len(BLOB)) is None
    assert store.holds(DIGEST, len(BLOB))


def test_memory_does_not_grow_with_the_blob(tmp_path):
    size, chunk = 32 << 20, bytes(1 << 20)
    digest = hashlib.sha256(bytes(size)).hexdigest()
    store = Store(tmp_path, 10**9)
    tracemalloc.start()
    try:
        for stop in (size // 2, size):
            partial = store.begin(digest, size)
            assert partial is not None
            with partial:
                while partial.num_verified < stop:
                    partial.append(chunk, sha(chunk))
                if stop == size:
                    partial.finish()
        assert store.verify(digest)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 << 20


def test_the_folder_is_its_owners_alone(store, tmp_path):
    with begin(store) as partial:
        feed(partial)
        partial.finish()
    assert (tmp_path / "store").stat().st_mode & 0o077 == 0
    assert store.path(DIGEST).stat().st_mode & 0o077 == 0
    assert os.access(store.path(DIGEST), os.R_OK)
