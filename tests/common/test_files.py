"""Files appear whole or not at all."""

import errno
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.files import atomic_writer, canonical_json, digest_of, write_bytes, write_json

json_values = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def fail_halfway(path, error):
    with atomic_writer(path) as file:
        file.write(b"half of it")
        raise error


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_failed_write_leaves_nothing_behind(tmp_path, error):
    with pytest.raises(type(error)):
        fail_halfway(tmp_path / "file", error)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(OSError, match="No space"):
        fail_halfway(path, OSError(errno.ENOSPC, "No space left on device"))
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")  # noqa: PTH110
def test_a_device_without_space_is_an_error_and_not_silence(tmp_path):
    full = tmp_path / f".file.{os.getpid()}.partial"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space"):
        write_bytes(tmp_path / "file", b"x" * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_visible_before_the_block_ends(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    with atomic_writer(path) as file:
        file.write(b"content")
        assert not path.exists()
    assert path.read_bytes() == b"content"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_does_not_know_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file.json", {"loss": value})
    with pytest.raises(ValueError, match="JSON"):
        canonical_json([value])
    assert list(tmp_path.iterdir()) == []


@given(json_values)
def test_canonical_json_means_the_same_and_does_not_depend_on_order(value):
    assert json.loads(canonical_json(value)) == value
    if isinstance(value, dict):
        assert canonical_json(dict(reversed(value.items()))) == canonical_json(value)


@given(st.lists(st.binary()))
def test_a_digest_is_of_the_concatenation(parts):
    assert digest_of(*parts) == digest_of(b"".join(parts))
    assert digest_of(b"abc").startswith("ba7816bf")
