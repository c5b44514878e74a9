"""Disk edge of the device: which proxy submodel is in place, as its files tell.

What a device says of itself follows from that, so no model code is imported here: a device that
only waits can say who it is at once, and stays small.
"""

import hashlib
import json
from pathlib import Path

from proxymoe.client.gates import readable_files
from proxymoe.client.home import Home
from proxymoe.common.assignment import Assignment
from proxymoe.common.errors import CheckpointError, ConfigError, LayoutMismatch
from proxymoe.common.files import sync_folder, write_json
from proxymoe.common.messages import Description
from proxymoe.common.plan import read_plan

CONTENTS = "contents.json"
"""{file: digest} of a submodel, written last: who has it, and fits it, is whole."""


def describe(home: Home) -> Description:
    """Who this device is, and the proxy submodel that it could train now.

    Files are looked at, weights are not read: damage in them shows when a task opens the device.

    Raises:
        ConfigError: nothing is assigned, or the policy cannot be read.
        DataError: the policy names no data that could be trained on.
        CheckpointError: the submodel is not here, or lacks a file; fetch it again.
        LayoutMismatch: the submodel in place is of another plan than the assignment.
    """
    assignment = assigned(home)
    folder = home.submodel(assignment.plan)
    plan = read_plan(folder).digest
    if plan != assignment.plan:
        raise LayoutMismatch(
            f"{folder}: of plan {plan[:12]}, assigned was {assignment.plan[:12]}; join again"
        )
    if missing := [name for name in _contents(folder) if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder}: {missing[0]} is missing; join again")
    readable_files(home.policy().data)  # who could not train does not offer to
    return Description(device=assignment.device, plan=plan)


def assigned(home: Home) -> Assignment:
    """What is assigned to this device.

    Raises:
        ConfigError: nothing is.
        ProtocolError: what is here is damaged, or not by its coordinator.
    """
    assignment = home.assignment()
    if assignment is None:
        raise ConfigError(f"{home.path}: no plan is assigned to this device; join first")
    return assignment


def is_whole(folder: Path) -> bool:
    """Whether every file of a submodel is as it was when it was built; all of it is read."""
    try:
        return all(_digest(folder / name) == digest for name, digest in _contents(folder).items())
    except (OSError, CheckpointError):
        return False


def list_contents(folder: Path) -> None:
    """Ends the building of a submodel: what is in its folder now is what belongs there."""
    write_json(folder / CONTENTS, {path.name: _digest(path) for path in sorted(folder.iterdir())})
    sync_folder(folder)


def _contents(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / CONTENTS).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / CONTENTS}: no list of files ({error})") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
