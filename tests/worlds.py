"""A tiny simulation on disk: a base model, two devices with a few rows, one public domain."""

import json
from pathlib import Path
from typing import Any

import torch

from proxymoe.common.experiment import Experiment
from proxymoe.server.base import BaseCheckpoint
from proxymoe.simulations.site import Site
from proxymoe.simulations.world import open_site
from tests.tiny import save_tiny


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tiny_site(root: Path, **settings: Any) -> tuple[Site, BaseCheckpoint]:
    """The site of a tiny experiment below `root`; `settings` are sections of the experiment."""
    save_tiny("qwen2_moe", root / "base", torch.bfloat16)
    for name in ("kitchen", "garden"):
        for split in ("train", "test"):
            rows = [
                {"prompt": f"{name} {split} {i}: ", "completion": "ab"[i % 2]} for i in range(6)
            ]
            write_rows(root / "devices" / name / f"{split}.jsonl", rows)
    write_rows(root / "public" / "math.jsonl", [{"text": f"{i} + {i} = {2 * i}"} for i in range(9)])
    experiment = Experiment.model_validate(
        {
            "name": "tiny",
            "base_model": str(root / "base"),
            "calibration": str(root / "public"),
            "devices": [{"data": str(root / "devices"), "names": ["kitchen", "garden"]}],
            "adapter": {"rank": 4},
            "train": {"dtype": "float32", "max_tokens": 48, "steps": 3, "batch_size": 2},
            "evaluate": {"public_domains": ["math"]},
            **settings,
        }
    )
    return open_site(experiment, root / "cache")
