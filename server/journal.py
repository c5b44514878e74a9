"""Disk edge: a run's rounds, so that four rounds equal two, a stop, and two more.

What is written is a state that passed the canary (or the first), with the reports of all rounds
since the last one written. A killed run goes on from there, and does the rounds in between again.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proxymoe.common.checkpoint import read_tensors, write_tensors
from proxymoe.common.errors import CheckpointError, LayoutMismatch
from proxymoe.common.files import write_json
from proxymoe.server import strategy
from proxymoe.server.round import FederationState, RoundReport
from proxymoe.server.strategy import StrategyState

KEPT_STATES = 2
STATE = {"adapter", "momentum", "variance"}


class Journal:
    """The states and reports of a run's rounds, in a folder.

    Reports go first and the state last, each atomically: the newest state file says what has
    happened, whatever else a killed run left behind.
    """

    def __init__(self, folder: Path) -> None:
        self._states = folder / "states"
        self._reports = folder / "rounds"

    def write(self, state: FederationState, reports: Sequence[RoundReport]) -> None:
        """Makes a proven state durable, with the reports of the rounds since the last one."""
        assert state.proven is None, "only what passed the canary is worth going on from"
        write_json(self._reports / f"{state.round:05d}.json", [_entry(r) for r in reports])
        tensors = {
            "adapter": state.adapter,
            "momentum": state.strategy.momentum,
            "variance": state.strategy.variance,
        }
        write_tensors(self._states / f"{state.round:05d}.safetensors", tensors)
        for old in sorted(self._states.glob("*.safetensors"))[:-KEPT_STATES]:
            old.unlink()

    def latest(self, size: int) -> FederationState:
        """The newest state that was written, or the initial one, for P = `size`.

        Raises:
            LayoutMismatch: the run on disk has an adapter of another size.
            CheckpointError: the newest state is damaged.
        """
        paths = sorted(self._states.glob("*.safetensors"))
        if not paths:
            return initial_state(size)
        tensors = read_tensors(paths[-1])
        if set(tensors) != STATE:
            raise CheckpointError(f"{paths[-1]}: no state of a run; remove it to go on before it")
        if tensors["adapter"].numel() != size:
            raise LayoutMismatch(
                f"{paths[-1]}: adapter of {tensors['adapter'].numel()} parameters, expected "
                f"{size}; the run was started with other settings"
            )
        memory = StrategyState(tensors["momentum"], tensors["variance"])
        return FederationState(int(paths[-1].stem), tensors["adapter"], memory)

    def reports(self, up_to: int) -> list[dict[str, Any]]:
        """The reports of rounds 1 to `up_to`, in order.

        Raises:
            CheckpointError: one of them is missing or damaged.
        """
        found: list[dict[str, Any]] = []
        for path in sorted(self._reports.glob("*.json")):
            if int(path.stem) > up_to:
                continue
            try:
                found += json.loads(path.read_bytes())
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path}: a report is unreadable ({error})") from error
        if [report["round"] for report in found] != list(range(1, up_to + 1)):
            raise CheckpointError(f"{self._reports}: reports of rounds 1 to {up_to} are not whole")
        return found


def _entry(report: RoundReport) -> dict[str, Any]:
    entry = dataclasses.asdict(report)
    if report.canary_loss is not None and not math.isfinite(report.canary_loss):
        entry["canary_loss"] = None  # JSON knows no NaN
    return entry


def initial_state(size: int) -> FederationState:
    """The state before the first round: the adapter that changes nothing."""
    memory = strategy.init(size)
    return FederationState(0, memory.momentum.clone(), memory)
