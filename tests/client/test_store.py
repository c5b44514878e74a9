"""What a generation pins stays; the rest gives way, oldest first, and nothing else ever goes."""

import errno
import hashlib
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.client.partial import StoreError
from proxymoe.client.store import QuotaError, Store
from proxymoe.common.errors import ProtocolError
from proxymoe.common.files import digest_of
from tests.laws import tried

SIZE = 100
BLOBS = [bytes([i]) * SIZE for i in range(6)]
DIGESTS = [digest_of(blob) for blob in BLOBS]


def needs(*which):
    return {DIGESTS[i]: SIZE for i in which}


def put(store, *which, size=SIZE):
    """Stores blobs, the later ones used later; or, with a smaller size, a part of each."""
    for i in which:
        partial = store.begin(DIGESTS[i], SIZE)
        assert partial is not None
        with partial:
            chunk = BLOBS[i][:size]
            partial.append(chunk, hashlib.sha256(chunk).digest())
            if size == SIZE:
                partial.finish()
    for age, i in enumerate(reversed(which)):
        for folder in ("blobs", "partial"):
            path = store.folder / folder / DIGESTS[i]
            if path.exists():
                os.utime(path, (10**9 - age, 10**9 - age))


def held(store):
    return [i for i, digest in enumerate(DIGESTS) if store.holds(digest, SIZE)]


class Folder(Store):
    """A store that knows where it is."""

    def __init__(self, folder, quota):
        super().__init__(folder, quota)
        self.folder = folder


@pytest.fixture
def store(tmp_path):
    return Folder(tmp_path / "store", 4 * SIZE)


def test_a_store_remembers(store):
    store.pin("g1", needs(0, 1))
    put(store, 0)
    again = Store(store.folder, 4 * SIZE)
    assert again.pins() == {"g1": needs(0, 1)}
    assert again.lacking(needs(0, 1)) == needs(1)
    assert again.path(DIGESTS[0]).read_bytes() == BLOBS[0]


def test_unpinned_blobs_go_least_recently_used_first(store):
    put(store, 0, 1, 2, 3)
    store.path(DIGESTS[0])
    store.pin("g1", needs(4, 5))
    assert held(store) == [0, 3]


def test_room_is_made_for_what_is_still_to_come(store):
    put(store, 0, 1, 2, 3)
    store.pin("g1", needs(3, 4))
    assert held(store) == [1, 2, 3]
    put(store, 4)
    assert store.collect() == 0
    assert held(store) == [1, 2, 3, 4]


def test_blobs_of_several_generations_count_once_and_stay_until_the_last_goes(store):
    store.pin("g1", needs(0, 1, 2))
    store.pin("g2", needs(1, 2, 3))
    put(store, 0, 1, 2, 3)
    store.unpin("g1")
    assert held(store) == [0, 1, 2, 3], "unpinned is not removed"
    store.pin("g3", needs(4))
    assert held(store) == [1, 2, 3]


def test_a_generation_that_is_pinned_anew_replaces_itself(store):
    store.pin("g1", needs(0, 1, 2))
    store.pin("g1", needs(3, 4, 5, 0))
    assert store.pins() == {"g1": needs(3, 4, 5, 0)}


def test_a_partial_blob_counts_and_goes_too(store):
    put(store, 0, size=60)
    put(store, 1, 2, 3)
    os.utime(store.folder / "partial" / DIGESTS[0], (1, 1))
    store.pin("g1", needs(4))
    assert held(store) == [1, 2, 3]
    assert list((store.folder / "partial").iterdir()) == []


def test_a_partial_blob_that_is_being_written_does_not_go(store):
    partial = store.begin(DIGESTS[0], SIZE)
    assert partial is not None
    with partial:
        partial.append(BLOBS[0][:60], hashlib.sha256(BLOBS[0][:60]).digest())
        store.pin("g1", needs(1, 2, 3, 4))
        partial.append(BLOBS[0][60:], hashlib.sha256(BLOBS[0][60:]).digest())
        partial.finish()
    assert held(store) == [0]
    assert store.collect() == SIZE


@tried(12)  # each example is some twenty flushes to a disk
@given(
    pinned=st.sets(st.integers(0, 5), max_size=4),
    order=st.permutations(range(6)),
    quota=st.integers(4, 6),
)
def test_collecting_keeps_the_pinned_and_the_newest_that_fit(
    tmp_path_factory, pinned, order, quota
):
    store = Folder(tmp_path_factory.mktemp("store"), 10**9)
    put(store, *order)
    store.pin("g1", needs(*pinned))
    store.quota_bytes = quota * SIZE
    loose = [i for i in order if i not in pinned]
    keep = loose[len(loose) - min(len(loose), quota - len(pinned)) :]
    assert store.collect() == (6 - len(pinned) - len(keep)) * SIZE
    assert held(store) == sorted({*pinned, *keep})


def test_more_than_the_quota_is_refused_at_once_and_changes_nothing(store):
    put(store, 0, 1)
    store.pin("g1", needs(2, 3))
    with pytest.raises(QuotaError, match=r"\['g1', 'g2'\] need 500 bytes, .* is 400; raise the"):
        store.pin("g2", needs(3, 4, 5, 0))
    assert held(store) == [0, 1]
    assert store.pins() == {"g1": needs(2, 3)}


def test_a_quota_that_was_lowered_below_what_is_pinned_is_told_and_drops_nothing(store):
    store.pin("g1", needs(0, 1, 2))
    put(store, 0, 1, 2, 5)
    with pytest.raises(QuotaError):
        Store(store.folder, 2 * SIZE).collect()
    assert held(store) == [0, 1, 2, 5]


def test_what_is_not_pinned_has_no_room(store):
    store.pin("g1", needs(0, 1))
    store.require_pinned(needs(0, 1))
    with pytest.raises(StoreError, match=r"1 blobs, .* first, are not pinned"):
        store.require_pinned(needs(0, 2))
    with pytest.raises(StoreError):
        store.require_pinned({DIGESTS[0]: SIZE + 1})


@pytest.mark.parametrize("harm", ["bit", "short", "unreadable"])
def test_a_blob_damaged_on_disk_is_found_and_dropped(store, monkeypatch, harm):
    put(store, 0, 1)
    path = store.path(DIGESTS[0])
    if harm == "unreadable":

        def broken(*_):
            raise OSError(errno.EIO, "bad sector", str(path))

        monkeypatch.setattr(hashlib, "file_digest", broken)
    else:
        path.write_bytes(BLOBS[0][:-1] + (b"!" if harm == "bit" else b""))
    assert not store.verify(DIGESTS[0])
    monkeypatch.undo()
    assert held(store) == [1]
    assert store.verify(DIGESTS[1])


def test_a_blob_that_is_not_here_is_not_sound(store):
    assert not store.verify(DIGESTS[0])
    with pytest.raises(StoreError, match="fetch it first"):
        store.path(DIGESTS[0])


def test_a_blob_that_lost_bytes_is_lacking(store):
    put(store, 0)
    store.path(DIGESTS[0]).write_bytes(b"short")
    assert store.lacking(needs(0)) == needs(0)
    put(store, 0)
    assert store.path(DIGESTS[0]).read_bytes() == BLOBS[0]


@pytest.mark.parametrize("digest", ["../../etc/passwd", "", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_what_is_no_digest_reaches_no_file(store, digest):
    for attempt in (
        lambda: store.pin("g1", {digest: 1}),
        lambda: store.begin(digest, 1),
        lambda: store.holds(digest, 1),
        lambda: store.path(digest),
        lambda: store.verify(digest),
    ):
        with pytest.raises(ProtocolError, match="is no SHA-256"):
            attempt()


@pytest.mark.parametrize("name", ["", ".", "../g", "a/b", "g" * 129])
def test_what_is_no_generation_reaches_no_file(store, name):
    with pytest.raises(ProtocolError, match="generation"):
        store.pin(name, needs(0))
    with pytest.raises(ProtocolError, match="generation"):
        store.unpin(name)


def test_a_negative_size_makes_no_room(store):
    with pytest.raises(ProtocolError, match="of -1 bytes"):
        store.pin("g1", {DIGESTS[0]: -1})


def test_damaged_pins_are_named_and_drop_nothing(store):
    put(store, 0, 1, 2, 3)
    (store.folder / "pins" / "g1.json").write_text("[")
    with pytest.raises(StoreError, match=r"g1\.json: damaged"):
        store.pin("g2", needs(4))
    assert held(store) == [0, 1, 2, 3]


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "store").write_text("")
    with pytest.raises(StoreError, match="store"):
        Store(tmp_path / "store", SIZE)


def test_many_processes_pin_and_write_at_once_and_nothing_is_lost(store):
    script = """
import hashlib, sys
from pathlib import Path
from proxymoe.client.store import Store
store, name = Store(Path(sys.argv[1]), 10**9), sys.argv[2]
blobs = {hashlib.sha256(b).hexdigest(): b for b in (bytes([i]) * 100 for i in range(6))}
needs = {digest: 100 for digest in blobs}
for turn in range(10):
    store.pin(f"{name}-{turn}", needs)
written = 0
while lacking := store.lacking(needs):
    for digest in lacking:
        partial = store.begin(digest, 100)
        if partial is None:
            continue
        with partial:
            while partial.num_verified < 100:
                chunk = blobs[digest][:10]
                partial.append(chunk, hashlib.sha256(chunk).digest())
                written += 10
            partial.finish()
print(written)
"""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", script, store.folder, name], stdout=subprocess.PIPE, text=True
        )
        for name in ("a", "b", "c")
    ]
    written = [int(writer.communicate()[0]) for writer in writers]
    assert sum(written) == 6 * SIZE, "every byte is written once"
    assert held(store) == [0, 1, 2, 3, 4, 5]
    assert len(store.pins()) == 30
