"""Disk edge: a run's rounds, so that four rounds equal two, a stop, and two more."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proxymoe.common.checkpoint import read_tensors, write_tensors
from proxymoe.common.errors import CheckpointError, LayoutMismatch
from proxymoe.common.files import write_json
from proxymoe.server import strategy
from proxymoe.server.round import FederationState, RoundReport
from proxymoe.server.strategy import StrategyState

KEPT_STATES = 2
STATE = ("adapter", "momentum", "variance")
PROVEN = "proven."


class Journal:
    """The states and reports of a run's rounds, in a folder.

    A round is written report first and state last, each atomically: the newest state file says
    what has happened, whatever else a killed run left behind.
    """

    def __init__(self, folder: Path) -> None:
        self._states = folder / "states"
        self._reports = folder / "rounds"

    def write(self, state: FederationState, report: RoundReport) -> None:
        """Makes a completed round durable and forgets states that nobody needs any more."""
        entry = dataclasses.asdict(report)
        if report.canary_loss is not None and not math.isfinite(report.canary_loss):
            entry["canary_loss"] = None  # JSON knows no NaN
        write_json(self._reports / f"{state.round:05d}.json", entry)
        tensors = _tensors(state, "")
        if state.proven is not None:
            tensors |= _tensors(state.proven, PROVEN)
            tensors[f"{PROVEN}round"] = torch.tensor([state.proven.round])
        write_tensors(self._states / f"{state.round:05d}.safetensors", tensors)
        for old in sorted(self._states.glob("*.safetensors"))[:-KEPT_STATES]:
            old.unlink()

    def latest(self, size: int) -> FederationState:
        """The state after the last completed round, or the initial one, for P = `size`.

        Raises:
            LayoutMismatch: the run on disk has an adapter of another size.
            CheckpointError: the newest state is damaged.
        """
        paths = sorted(self._states.glob("*.safetensors"))
        if not paths:
            return initial_state(size)
        tensors = read_tensors(paths[-1])
        proven_names = {f"{PROVEN}{name}" for name in (*STATE, "round")}
        if set(tensors) not in (set(STATE), set(STATE) | proven_names):
            raise CheckpointError(f"{paths[-1]}: no state of a run; remove it to go on before it")
        if tensors["adapter"].numel() != size:
            raise LayoutMismatch(
                f"{paths[-1]}: adapter of {tensors['adapter'].numel()} parameters, expected "
                f"{size}; the run was started with other settings"
            )
        proven = None
        if f"{PROVEN}round" in tensors:
            proven = _state(int(tensors[f"{PROVEN}round"].item()), tensors, PROVEN)
        return _state(int(paths[-1].stem), tensors, "", proven)

    def reports(self, up_to: int) -> list[dict[str, Any]]:
        """The reports of rounds 1 to `up_to`, in order."""
        try:
            return [
                json.loads((self._reports / f"{number:05d}.json").read_bytes())
                for number in range(1, up_to + 1)
            ]
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self._reports}: a round report is unreadable ({error})"
            ) from error


def _tensors(state: FederationState, prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}adapter": state.adapter,
        f"{prefix}momentum": state.strategy.momentum,
        f"{prefix}variance": state.strategy.variance,
    }


def _state(
    number: int, tensors: dict[str, Tensor], prefix: str, proven: FederationState | None = None
) -> FederationState:
    memory = StrategyState(tensors[f"{prefix}momentum"], tensors[f"{prefix}variance"])
    return FederationState(number, tensors[f"{prefix}adapter"], memory, proven)


def initial_state(size: int) -> FederationState:
    """The state before the first round: the adapter that changes nothing."""
    memory = strategy.init(size)
    return FederationState(0, memory.momentum.clone(), memory)
