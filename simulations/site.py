"""Where a simulation's model, text and devices are: plain data that every worker gets."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from proxymoe.common.adapter import AdapterLayout
from proxymoe.common.config import DeviceSettings
from proxymoe.common.errors import ConfigError
from proxymoe.common.experiment import Experiment
from proxymoe.common.text import Example, Examples, TooLong, read_rows, tokenise

ASSETS = Path(__file__).parent / "assets"
SPLITS = ("train", "test")


@dataclass(frozen=True, slots=True)
class VirtualDevice:
    """A device of the simulation: its name, its private data, its domain."""

    name: str
    folder: Path
    domain: str
    answers: bool


@dataclass(frozen=True)
class Site:
    """Everything a worker needs to act as any device, or as the server's evaluator."""

    experiment: Experiment
    base: str
    """Digest of the base model."""
    full: Path
    """The full model, materialised."""
    submodels: Path
    """Folder of materialised proxy submodels by plan digest."""
    layout: AdapterLayout
    devices: tuple[VirtualDevice, ...]

    def device(self, name: str) -> VirtualDevice:
        """The device of that name."""
        return next(device for device in self.devices if device.name == name)


def asset(name: str) -> Path:
    """A path from an experiment file: as it is if absolute, else among the assets."""
    path = Path(name).expanduser()
    found = path if path.is_absolute() else ASSETS / path
    if not found.exists():
        raise ConfigError(f"{name}: no such file or folder ({found})")
    return found


def virtual_devices(groups: tuple[DeviceSettings, ...]) -> tuple[VirtualDevice, ...]:
    """The devices that an experiment names; ConfigError where data is missing."""
    devices = []
    for group in groups:
        root = asset(group.data)
        for name in group.names:
            folder = root / name
            if missing := [s for s in SPLITS if not (folder / f"{s}.jsonl").exists()]:
                raise ConfigError(f"device {name!r}: {folder} has no {missing[0]}.jsonl")
            devices.append(VirtualDevice(name, folder, group.domain or name, group.answers))
    return tuple(devices)


def device_examples(
    device: VirtualDevice, split: str, tokenizer: PreTrainedTokenizerBase, experiment: Experiment
) -> Examples:
    """The device's rows of one split; of `test`, a fixed draw of at most `max_items`."""
    rows = read_rows(device.folder / f"{split}.jsonl")
    limit = experiment.evaluate.max_items
    if split == "test" and len(rows) > limit:
        rng = np.random.default_rng([0, len(rows)])
        rows = [rows[i] for i in sorted(rng.permutation(len(rows))[:limit])]
    train = experiment.train
    return tokenise(rows, tokenizer, train.max_tokens, TooLong(train.too_long))


def public_examples(
    path: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> tuple[Example, ...]:
    """All rows of one public domain."""
    return tokenise(read_rows(path), tokenizer, max_tokens).examples


def answers(
    devices: tuple[VirtualDevice, ...], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, ...]]:
    """Every completion that occurs in these devices' training rows, tokenised, sorted."""
    rows = [row for device in devices for row in read_rows(device.folder / "train.jsonl")]
    distinct = {json.dumps(row["completion"]): row for row in rows}
    one_each = [distinct[key] for key in sorted(distinct)]
    examples = tokenise(one_each, tokenizer, max_tokens=10**6).examples
    return [example.tokens[example.start :] for example in examples]
