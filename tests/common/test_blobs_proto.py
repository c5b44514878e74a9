"""The committed stubs are what the committed .proto generates."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PROTO = ROOT / "common" / "blobs.proto"


@pytest.fixture
def command():
    """The arguments that the head of the .proto gives."""
    head = PROTO.read_text().partition("\nsyntax")[0].replace("\n//", "")
    found = re.search(r"-m grpc_tools\.protoc (.*\.proto)", head)
    assert found is not None
    return shlex.split(found[1])


def test_the_stubs_are_current(command, tmp_path, monkeypatch):
    protoc = pytest.importorskip("grpc_tools.protoc")
    monkeypatch.chdir(ROOT)
    shared = str(Path(protoc.__file__).parent / "_proto")
    arguments = [word.replace("_out=src", f"_out={tmp_path}") for word in command]
    assert protoc.main(["protoc", f"-I{shared}", *arguments]) == 0
    made = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert [path.name for path in made] == ["blobs_pb2.py", "blobs_pb2.pyi", "blobs_pb2_grpc.py"]
    for path in made:
        committed = ROOT / "src" / path.relative_to(tmp_path)
        assert committed.read_text() == path.read_text(), f"{path.name}: see {PROTO.name}"


def test_the_stubs_are_loaded_once_and_under_our_name():
    from proxymoe.common.generated import blobs_pb2, blobs_pb2_grpc

    assert blobs_pb2.__name__ == "proxymoe.common.generated.blobs_pb2"
    assert blobs_pb2.Chunk.DESCRIPTOR.full_name == "proxymoe.blobs.v1.Chunk"
    assert vars(blobs_pb2_grpc)["proxymoe_dot_common_dot_generated_dot_blobs__pb2"] is blobs_pb2
