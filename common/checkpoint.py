"""Disk edge: a safetensors checkpoint as named byte ranges, read one tensor at a time.

The format is a little-endian header length, a JSON header {name: dtype, shape, data_offsets}, and
the bytes. Reading ranges ourselves keeps memory at one tensor, lets a blob service send parts of
a file without a second copy of the model, and finds truncation before any work is done.
"""

import json
import math
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from proxymoe.common.errors import CheckpointError
from proxymoe.common.files import atomic_writer

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100 << 20
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class TensorRange:
    """Where the bytes of one tensor lie."""

    file: str
    offset: int
    num_bytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file that is not to be written to meanwhile."""

    path: Path
    offset: int
    num_bytes: int
    stamp: tuple[int, int]

    def append_to(self, file: IO[bytes]) -> int:
        """Copies the bytes to the end of a file, in the kernel where it can; returns how many.

        Raises:
            CheckpointError: the file of this span has changed.
        """
        with self.path.open("rb") as source:
            if sys.platform == "linux":
                file.flush()
                to, at, left = file.fileno(), self.offset, self.num_bytes
                while left and (sent := os.sendfile(to, source.fileno(), at, left)):
                    at, left = at + sent, left - sent
                file.seek(0, os.SEEK_END)
            else:
                source.seek(self.offset)
                file.write(source.read(self.num_bytes))
            _require_stamp(self.path, source, self.stamp)
        return self.num_bytes


class Checkpoint:
    """A checkpoint folder with one or many safetensors shards; headers are read at once.

    Raises:
        CheckpointError: a file is missing, truncated or malformed, or a tensor has no known type.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranges: dict[str, TensorRange] = {}
        self._stamps: dict[str, tuple[int, int]] = {}
        for name in self._shards():
            self._stamps[name] = _stamp((folder / name).stat())
            for tensor, place in _read_header(folder / name).items():
                if tensor in self.ranges:
                    raise CheckpointError(f"{folder}: tensor {tensor} stands in two shards")
                self.ranges[tensor] = place

    def read_bytes(self, name: str, first: int = 0, num_bytes: int | None = None) -> bytes:
        """The raw bytes of one tensor, or `num_bytes` of them from byte `first`.

        Raises:
            CheckpointError: the file has changed since its header was read.
        """
        count = self.ranges[name].num_bytes - first if num_bytes is None else num_bytes
        with self._open(name, first) as file:
            return file.read(count)

    def read_into(self, name: str, buffer: memoryview, first: int = 0) -> None:
        """Fills the buffer with raw bytes of one tensor from byte `first` on, as `read_bytes`."""
        with self._open(name, first) as file:
            file.readinto(buffer)

    def span(self, name: str, first: int, num_bytes: int) -> Span:
        """Where some bytes of one tensor lie, to be copied."""
        place = self.ranges[name]
        path, stamp = self.folder / place.file, self._stamps[place.file]
        return Span(path, place.offset + first, num_bytes, stamp)

    def read(self, name: str) -> Tensor:
        """One tensor, owned by the caller."""
        place = self.ranges[name]
        return tensor_from(self.read_bytes(name), place.dtype, place.shape)

    @contextmanager
    def _open(self, name: str, first: int) -> Iterator[BufferedReader]:
        """The file at a byte of a tensor; what was read is good if the block ends in peace.

        The headers were held against the files' sizes, so only a change can cut a tensor short.
        """
        place = self.ranges[name]
        path = self.folder / place.file
        with path.open("rb") as file:
            file.seek(place.offset + first)
            yield file
            _require_stamp(path, file, self._stamps[place.file])

    def _shards(self) -> list[str]:
        index = self.folder / INDEX
        if index.exists():
            try:
                places = json.loads(index.read_text())["weight_map"].values()
                listed = sorted({str(name) for name in places})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index}: not a safetensors index ({error})") from error
            if outside := [name for name in listed if Path(name).name != name]:
                raise CheckpointError(f"{index}: shards {outside} are no names of files beside it")
            missing = [name for name in listed if not (self.folder / name).exists()]
            if missing:
                raise CheckpointError(
                    f"{self.folder}: shards {missing} named by the index are missing"
                )
        elif (self.folder / WEIGHTS).exists():
            listed = [WEIGHTS]
        else:
            raise CheckpointError(f"{self.folder}: holds neither {WEIGHTS} nor {INDEX}")
        extra = {path.name for path in self.folder.glob("model*.safetensors")} - {*listed}
        if extra:
            raise CheckpointError(
                f"{self.folder}: shards {sorted(extra)} are not of this checkpoint, which is "
                f"{listed[0]} and {len(listed) - 1} more; remove what is left over, or {INDEX} is "
                "an old one"
            )
        return listed


def _stamp(seen: os.stat_result) -> tuple[int, int]:
    """Changes with a file's contents."""
    return seen.st_size, seen.st_mtime_ns


def _require_stamp(path: Path, file: IO[bytes], stamp: tuple[int, int]) -> None:
    if _stamp(os.fstat(file.fileno())) != stamp:
        raise CheckpointError(
            f"{path}: was changed while it was in use; start again, or fetch it again"
        )


def tensor_from(content: bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor that these bytes stand for."""
    if not content:
        return torch.empty(shape, dtype=DTYPES[dtype])
    flat = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return flat.view(DTYPES[dtype]).reshape(shape)


def bytes_of(tensor: Tensor) -> bytes:
    """The bytes that stand for a tensor in a checkpoint."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def write_checkpoint(
    path: Path,
    specs: dict[str, tuple[str, tuple[int, ...]]],
    contents: Iterable[Iterable[bytes | Span]],
) -> None:
    """Writes one safetensors file, streamed and atomic.

    Args:
        path: the file to make.
        specs: {tensor name: (dtype name, shape)}; this order is the order of the bytes.
        contents: the bytes of each tensor in parts, in the order of `specs`, taken one at a time.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in specs.items():
        size = math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 64)
    with atomic_writer(path) as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for name, parts in zip(specs, contents, strict=True):
            start, stop = header[name]["data_offsets"]
            written = sum(
                part.append_to(file) if isinstance(part, Span) else file.write(part)
                for part in parts
            )
            if written != stop - start:
                raise CheckpointError(f"{name}: {written} bytes where {stop - start} belong")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a small set of tensors as one safetensors file, atomically."""
    specs = {n: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()}
    write_checkpoint(path, specs, ([bytes_of(tensor)] for tensor in tensors.values()))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file."""
    return dict(_iterate(path))


def _iterate(path: Path) -> Iterator[tuple[str, Tensor]]:
    places = _read_header(path)
    with path.open("rb") as file:
        for name, place in places.items():
            file.seek(place.offset)
            yield name, tensor_from(file.read(place.num_bytes), place.dtype, place.shape)


def _read_header(path: Path) -> dict[str, TensorRange]:
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if not 0 < length <= min(MAX_HEADER_BYTES, total - 8):
                raise ValueError(f"header of {length} bytes in a file of {total}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        places = {name: _place(path.name, 8 + length, entry) for name, entry in header.items()}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error
    for name, place in places.items():
        if place.offset + place.num_bytes > total:
            raise CheckpointError(
                f"{path}: truncated; {name} ends at byte {place.offset + place.num_bytes} "
                f"of {total}; fetch the file again"
            )
    return places


def _place(file: str, base: int, entry: dict[str, Any]) -> TensorRange:
    dtype, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
    start, stop = entry["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"unsupported dtype {dtype}")
    if min([start, *shape]) < 0 or stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{stop - start} bytes for {dtype} {shape}")
    return TensorRange(file, base + start, stop - start, dtype, shape)
