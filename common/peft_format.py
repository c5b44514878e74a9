"""Linear adapters as ordinary PEFT folders, and back.

On disk an adapter is what `PeftModel.from_pretrained` loads on the full model: both factors of
every block, the frozen one included. PEFT packs the experts of a fused parameter with the expert
index slowest in A, (E·R, in), and fastest in B, (out, R·E); the first of two targeted parameters
is wrapped innermost and found under `.base_layer`.

Shared experts are targeted by parameter too: in many families PEFT takes modules of these names
for routed experts of an older format, and would silently adapt those instead.
"""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proxymoe.common.adapter import SCALE, AdapterLayout, Block, factors
from proxymoe.common.checkpoint import read_tensors, write_tensors
from proxymoe.common.errors import CheckpointError, LayoutMismatch
from proxymoe.common.files import write_json

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
INNER = ".base_layer"
REWRITTEN = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Names of modules that PEFT turns into routed experts."""


def export_peft(layout: AdapterLayout, vector: Tensor, folder: Path, base_name: str) -> Path:
    """Writes the adapter (P,) of the full layout as a PEFT folder; returns it.

    Args:
        layout: a full layout, with every expert of each fused parameter it targets.
        vector: the trained factors.
        folder: made if absent; weights appear last and atomically.
        base_name: where a user finds the base model, for the PEFT config.
    """
    layout.require(vector)
    write_json(folder / CONFIG_FILE, peft_config(layout, base_name))
    write_tensors(folder / WEIGHTS_FILE, dict(_tensors(layout, vector)))
    return folder


def import_peft(layout: AdapterLayout, folder: Path) -> Tensor:
    """The vector (P,) of an adapter that `export_peft` wrote for the same layout.

    Raises:
        CheckpointError: a file is missing or damaged.
        LayoutMismatch: other modules, another rank, or frozen factors of another seed.
    """
    found = read_tensors(folder / WEIGHTS_FILE)
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
        rank, scale = config["r"], config["lora_alpha"] / config["r"]
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: unreadable ({error})") from error
    expected = dict(_tensors(layout, layout.zeros()))
    if set(found) != set(expected) or (rank, scale) != (layout.rank, SCALE):
        raise LayoutMismatch(
            f"{folder}: adapter of rank {rank} and scale {scale} with {len(found)} tensors, "
            f"expected rank {layout.rank} and scale {SCALE} with {len(expected)}; "
            "it was made for other targets"
        )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise LayoutMismatch(
                f"{folder}: {name} has shape {tuple(found[name].shape)}, "
                f"expected {tuple(tensor.shape)}; it was made for another model"
            )
    parts = []
    for blocks in _runs(layout):
        first = blocks[0]
        key = _key(first, first.trains)
        frozen = _key(first, "B" if first.trains == "A" else "A")
        if not torch.equal(found[frozen], expected[frozen]):
            raise LayoutMismatch(
                f"{folder}: {frozen} is not the frozen factor of seed {layout.seed}"
            )
        parts += [t.reshape(-1) for t in _unpack(first, found[key], len(blocks), layout.rank)]
    return torch.cat(parts)


def peft_config(layout: AdapterLayout, base_name: str) -> dict[str, Any]:
    """The adapter_config.json of a layout: every target by its full path, nothing by pattern."""
    linears = [block.module for block in layout.blocks if block.expert is None]
    modules = [path for path in linears if path.rpartition(".")[2] not in REWRITTEN]
    parameters = [f"{path}.weight" for path in linears if path not in modules]
    parameters += list(dict.fromkeys(b.module for b in layout.blocks if b.expert is not None))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": layout.rank,
        "lora_alpha": SCALE * layout.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": modules,
        "target_parameters": parameters or None,
    }


def _tensors(layout: AdapterLayout, vector: Tensor) -> Iterator[tuple[str, Tensor]]:
    trained = iter(layout.trained_factors(vector))
    for blocks in _runs(layout):
        pairs = [factors(block, next(trained), layout.rank, layout.seed) for block in blocks]
        a, b = (torch.stack(side) for side in zip(*pairs, strict=True))
        yield _key(blocks[0], "A"), a.reshape(-1, a.shape[-1]).contiguous()
        yield _key(blocks[0], "B"), b.permute(1, 2, 0).reshape(b.shape[1], -1).contiguous()


def _unpack(block: Block, packed: Tensor, num_experts: int, rank: int) -> Tensor:
    """(E, *trained shape) from PEFT's packing; E = 1 for a linear module."""
    if block.trains == "A":
        return packed.reshape(num_experts, rank, block.in_features)
    return packed.reshape(block.out_features, rank, num_experts).permute(2, 0, 1)


def _runs(layout: AdapterLayout) -> Iterator[list[Block]]:
    """Blocks grouped by module: the experts of one fused parameter stay together."""
    for _, run in groupby(layout.blocks, key=lambda block: block.module):
        yield list(run)


def _key(block: Block, factor: str) -> str:
    if block.expert is None:
        return f"{PREFIX}{block.module}.lora_{factor}.weight"
    path, _, leaf = block.module.rpartition(".")
    inner = INNER if leaf == "gate_up_proj" else ""
    return f"{PREFIX}{path}{inner}.lora_{factor}.weight"
