"""The code keeps the shape that its readers were promised."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("client", "common", "server", "simulations")
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
GENERATED = ("_pb2.py", "_pb2_grpc.py")
MAX_FILE_LINES = 320
MAX_FUNCTION_LINES = 60
MAX_IGNORED_TYPES = 15
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

WRITTEN = [path for path in SOURCES if not path.name.endswith(GENERATED)]
"""What people wrote. Each rule is one test of all of it, which names every file that breaks it."""


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_public(name: str) -> bool:
    return not name.startswith("_")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_a_module_says_what_it_is_for():
    assert len(WRITTEN) > 100
    assert [name(path) for path in WRITTEN if not ast.get_docstring(tree(path))] == []


def test_a_file_can_be_read_at_one_sitting():
    counts = {name(at): len(at.read_text(encoding="utf-8").splitlines()) for at in WRITTEN}
    long = {file: count for file, count in counts.items() if count > MAX_FILE_LINES}
    assert not long, f"{long}, the limit is {MAX_FILE_LINES} lines"


def test_a_function_can_be_seen_at_one_glance():
    long = {
        f"{name(path)}: {node.name}": node.end_lineno - node.lineno + 1
        for path in WRITTEN
        for node in ast.walk(tree(path))
        if isinstance(node, FUNCTIONS) and node.end_lineno is not None
        if node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert not long, f"{long}, the limit is {MAX_FUNCTION_LINES} lines"


def test_public_names_are_explained():
    mute = [
        f"{name(path)}: {node.name}"
        for path in WRITTEN
        for node in tree(path).body
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and is_public(node.name)
        if not ast.get_docstring(node)
    ]
    assert not mute, f"{mute} have no docstring"


def test_types_are_ignored_rarely_and_never_wholesale():
    lines = [line for path in SOURCES for line in path.read_text(encoding="utf-8").splitlines()]
    ignored = [line.strip() for line in lines if "# type: ignore" in line]
    assert all("# type: ignore[" in line for line in ignored)
    assert len(ignored) <= MAX_IGNORED_TYPES, "\n".join(ignored)


def test_every_package_folder_is_linked_and_no_file_bears_a_vague_name():
    for package in PACKAGES:
        assert (ROOT / "src" / "proxymoe" / package).resolve() == ROOT / package
    vague = {"utils", "util", "helpers", "manager", "misc"}
    assert not {path.stem for path in SOURCES} & vague


def test_errors_of_users_have_one_root():
    from proxymoe.common import errors

    found = [value for value in vars(errors).values() if isinstance(value, type)]
    assert len(found) > 5
    assert all(issubclass(error, errors.ProxyMoEError) for error in found)
    assert all(error.__name__ in (errors.__doc__ or "") for error in found)


@pytest.mark.parametrize("module", ["config", "errors", "messages", "plan"])
def test_protocol_files_do_not_name_torch(module):
    imported = {
        name.name.partition(".")[0]
        for node in ast.walk(tree(ROOT / "common" / f"{module}.py"))
        if isinstance(node, ast.Import)
        for name in node.names
    } | {
        (node.module or "").partition(".")[0]
        for node in ast.walk(tree(ROOT / "common" / f"{module}.py"))
        if isinstance(node, ast.ImportFrom)
    }
    assert "torch" not in imported


def test_public_names_of_the_core_exist():
    """What other packages, docs and notebooks may rely on."""
    from proxymoe.common import (
        adapter,
        attach,
        checkpoint,
        config,
        experiment,
        experts,
        files,
        loss,
        manifest,
        messages,
        model,
        moe,
        peft_format,
        plan,
        text,
    )

    names = {
        adapter: "AdapterLayout Block SCALE adapter_layout delta_weight factors frozen_factor",
        attach: "AttachedAdapter",
        checkpoint: "Checkpoint read_tensors tensor_from bytes_of write_checkpoint write_tensors",
        config: "ExtractSettings FederationSettings TrainSettings",
        experiment: "Experiment load_experiment",
        experts: "BACKEND Redirect ExpertAdapter expert_state install_backend only_valid_tokens",
        files: "atomic_writer canonical_json digest_of write_bytes write_json",
        loss: "Quality completion_loss token_quality",
        manifest: "Manifest Piece materialise read_config",
        messages: "TrainTask TrainReply Refusal encode decode",
        model: "LoadedModel compute_dtype load",
        moe: "MoELayer moe_layers keep_experts slice_router attention_linears",
        peft_format: "export_peft import_peft peft_config",
        plan: "LayerPlan Others Plan RouterMode keep_all read_plan",
        text: "Batch Example TooLong collate read_rows shuffled_batches tokenise",
    }
    for module, wanted in names.items():
        assert [name for name in wanted.split() if not hasattr(module, name)] == []
