"""Reading safetensors ranges ourselves: round trips, and one refusal per way to be broken."""

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from proxymoe.common.checkpoint import (
    DTYPES,
    INDEX,
    WEIGHTS,
    Checkpoint,
    bytes_of,
    read_tensors,
    tensor_from,
    write_checkpoint,
    write_tensors,
)
from proxymoe.common.errors import CheckpointError


def raw_file(path, header, body=b"", length=None):
    """A safetensors file with any header, whether that makes sense or not."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + body)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def folder(tmp_path):
    write_tensors(tmp_path / WEIGHTS, {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)})
    return tmp_path


@given(
    st.sampled_from(sorted(DTYPES)),
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    st.integers(0, 255),
)
def test_tensors_and_bytes_stand_for_each_other(dtype, shape, filler):
    size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
    content = bytes([filler % 2 if dtype == "BOOL" else filler]) * size
    tensor = tensor_from(content, dtype, shape)
    assert (tensor.dtype, tuple(tensor.shape)) == (DTYPES[dtype], shape)
    assert bytes_of(tensor) == content


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_what_we_write_others_read_and_what_others_write_we_read(tmp_path, dtype):
    tensors = {"x": torch.tensor([[0, 1, 1]]).to(dtype), "scalar": torch.tensor(1).to(dtype)}
    write_tensors(tmp_path / "ours.safetensors", tensors)
    save_file(tensors, tmp_path / "theirs.safetensors")
    for found in (
        load_file(tmp_path / "ours.safetensors"),
        read_tensors(tmp_path / "theirs.safetensors"),
        read_tensors(tmp_path / "ours.safetensors"),
    ):
        assert set(found) == set(tensors)
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        assert all(found[name].dtype == dtype for name in tensors)


def test_a_checkpoint_reads_single_tensors(folder):
    checkpoint = Checkpoint(folder)
    assert set(checkpoint.ranges) == {"a", "b"}
    assert torch.equal(checkpoint.read("a"), torch.arange(6.0).view(2, 3))
    assert checkpoint.read_bytes("b") == bytes_of(torch.ones(4))


def test_tensors_are_owned_by_the_caller(folder):
    Checkpoint(folder).read("b").zero_()
    assert Checkpoint(folder).read("b").eq(1).all()


@pytest.mark.parametrize("keep", [0, 4, 8, 40])
def test_a_file_cut_inside_its_header_is_named(folder, keep):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file"):
        Checkpoint(folder)


def test_a_file_cut_inside_its_tensors_is_found_before_any_is_read(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated; b ends.*fetch"):
        Checkpoint(folder)


def test_a_file_cut_after_it_was_opened_is_found_at_the_read(folder):
    checkpoint = Checkpoint(folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: was changed while.*fetch"):
        checkpoint.read("b")


@pytest.mark.parametrize("length", [0, 10**6, 101 << 20, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_or_the_limit_is_refused(tmp_path, length):
    raw_file(tmp_path / WEIGHTS, {}, length=length)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*header of {length} bytes"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"not json", "Expecting value"),
        (b"\xff\xfe{}", ""),
        (b"[1, 2]", ""),
        ({"x": entry(dtype="F8_E4M3", offsets=(0, 2))}, "unsupported dtype F8_E4M3"),
        ({"x": entry(offsets=(0, 4))}, r"4 bytes for F32 \(2,\)"),
        ({"x": entry(offsets=(8, 0))}, "-8 bytes"),
        ({"x": entry(shape=(-1,), offsets=(0, -4))}, r"\(-1,\)"),
        ({"x": entry(offsets=(-8, 0))}, "F32"),
        ({"x": {"dtype": "F32", "shape": [2]}}, "data_offsets"),
        ({"x": entry(shape=("a",))}, "invalid literal"),
        ({"x": 3}, "subscriptable"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path, header, reason):
    raw_file(tmp_path / WEIGHTS, header, bytes(64))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{reason}"):
        Checkpoint(tmp_path)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_checkpoint_or_a_checkpoint_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(content)
    try:
        read_tensors(path)
    except CheckpointError as error:
        assert "any.safetensors" in str(error)  # noqa: PT017


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors: cannot be read"):
        read_tensors(tmp_path / "adapter.safetensors")


def test_shards_are_found_by_the_index_and_a_missing_one_is_named(tmp_path):
    write_tensors(tmp_path / "one.safetensors", {"a": torch.ones(1)})
    write_tensors(tmp_path / "two.safetensors", {"b": torch.ones(2)})
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert set(Checkpoint(tmp_path).ranges) == {"a", "b"}
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shards \['two\.safetensors'\].*are missing"):
        Checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for name in ("one", "two"):
        write_tensors(tmp_path / f"{name}.safetensors", {"a": torch.ones(1)})
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="tensor a stands in two shards"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json: not a safetensors index"):
        Checkpoint(tmp_path)


def test_a_shard_name_that_leaves_the_folder_is_refused(tmp_path):
    inside = tmp_path / "checkpoint"
    inside.mkdir()
    write_tensors(tmp_path / "outside.safetensors", {"a": torch.ones(1)})
    (inside / INDEX).write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"index\.json.*outside\.safetensors"):
        Checkpoint(inside)


def test_content_of_the_wrong_length_writes_no_file(tmp_path):
    with pytest.raises(CheckpointError, match="x: 4 bytes where 8 belong"):
        write_checkpoint(tmp_path / WEIGHTS, {"x": ("F32", (2,))}, [[bytes(4)]])
    assert list(tmp_path.iterdir()) == []


def test_too_few_contents_write_no_file(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        write_checkpoint(tmp_path / WEIGHTS, {"x": ("F32", (2,))}, [])
    assert list(tmp_path.iterdir()) == []
