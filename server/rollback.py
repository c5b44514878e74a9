"""Versions of the adapter, as an operator asks for them: one to read, or one to go back to."""

from torch import Tensor

from proxymoe.common.errors import ConfigError
from proxymoe.server.run_directory import RunDirectory
from proxymoe.server.status import rounds
from proxymoe.server.store import Phase, RoundStore

CONCLUDING = (Phase.AGGREGATED, Phase.EVALUATED)


def adapter_of(run: RunDirectory, version: int | None) -> tuple[int, Tensor]:
    """A committed version, by default the current one, and its adapter (P,).

    Raises:
        ConfigError: there is no such version, or no round yet.
        IntegrityError, CheckpointError: its vectors are damaged or missing.
    """
    store = _store(run)
    number = store.current() if version is None else version
    try:
        return number, store.version_state(number).adapter
    finally:
        store.close()


def roll_back(run: RunDirectory, version: int, now: float) -> None:
    """Makes an older version the current one, while the service runs or not.

    A round that is on comes to nothing, because it builds on what is given up; the round engine
    sees to that, and starts the next one from this version.

    Raises:
        ConfigError: no such version, no round yet, or a round is being concluded just now.
        IntegrityError, CheckpointError: its vectors are damaged or missing.
    """
    store = _store(run)
    try:
        latest = store.latest()
        if latest is not None and latest.phase in CONCLUDING:
            raise ConfigError(f"round {latest.number} is being concluded; try again in a moment")
        store.roll_back(version, now)
        if store.current() != version:
            raise ConfigError("a round was committed at the same moment; try again")
    finally:
        store.close()


def _store(run: RunDirectory) -> RoundStore:
    size = rounds(run).size
    if size is None:
        raise ConfigError(f"{run.path}: no round has begun, so there is no version yet")
    return run.store(size)
