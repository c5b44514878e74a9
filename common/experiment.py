"""One experiment file: the settings of a simulation, and of the comparison that it may end in.

The resolved file is written beside every result, so each run explains itself.
"""

import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from proxymoe.common.config import (
    AdapterSettings,
    Allocation,
    DeviceSettings,
    EvaluateSettings,
    ExtractSettings,
    FederationSettings,
    PersonalSettings,
    PlanMode,
    TrainSettings,
    require_rotatable,
)
from proxymoe.common.errors import ConfigError
from proxymoe.common.files import canonical_json, digest_of
from proxymoe.common.plan import Precision, RouterMode
from proxymoe.common.privacy_settings import PrivacySettings
from proxymoe.common.section import Section


class Calibration(StrEnum):
    """Whose public text the experts of a device are chosen by."""

    MATCHED = "matched"
    """The device's own domain."""
    UNIFORM = "uniform"
    """All domains alike."""
    MISMATCHED = "mismatched"
    """The domain that uses the experts most differently."""


class Mode(Section):
    """One way to cut proxy submodels, as a row of the comparison."""

    mode: PlanMode
    router: RouterMode = RouterMode.FULL
    allocation: Allocation = Allocation.GLOBAL
    healed: bool = False
    """Whether the submodel is healed on public text first; then it is not training-free."""
    rotate: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        require_rotatable(self.mode, self.router, self.rotate)
        return self

    @property
    def name(self) -> str:
        """As in file names: what differs from the default follows the mode."""
        turned = f"rotate-{self.rotate:g}" if self.rotate else None
        said = (self.router, self.allocation, "healed" if self.healed else None, turned)
        usual = (RouterMode.FULL, Allocation.GLOBAL, None)
        return "-".join([self.mode, *(word for word in said if word not in usual)])


class HealSettings(Section):
    """How a submodel is healed on public text of all domains; see `server/heal.py`."""

    steps: int = Field(default=80, ge=1)
    learning_rate: float = Field(default=5e-3, gt=0)
    tokens: int = Field(default=512, ge=64)
    """Of every public domain."""


class CompareSettings(Section):
    """The table that shows whether the idea works; without seeds there is none."""

    seeds: tuple[int, ...] = ()
    modes: tuple[Mode, ...] = ()
    single_devices: tuple[str, ...] = ()
    """Devices that are tuned alone, with every mode and kept fraction."""
    single_fractions: tuple[float, ...] = (0.25, 0.125)
    calibrations: tuple[Calibration, ...] = (Calibration.MATCHED,)
    quantised: tuple[Precision, ...] = ()
    """Rivals: the full model with its experts in so many bits, tuned on each of these devices."""
    single_train: dict[str, TrainSettings] = Field(default_factory=dict)
    """How each of them is tuned."""
    heal: HealSettings = HealSettings()
    federated_modes: tuple[Mode, ...] = ()
    federated_devices: tuple[str, ...] = ()
    """Devices that are federated, with these modes at the experiment's kept fraction."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if turning := [mode.name for mode in self.modes if mode.rotate]:
            raise ValueError(f"modes: {turning[0]} is for federated_modes; no rounds, no rotation")
        return self


class Experiment(Section):
    """One experiment file."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    base_model: str = "tiny-moe"
    """Checkpoint folder; a relative path is taken from the assets."""
    calibration: str = "calibration"
    """Folder of public <domain>.jsonl files; relative to the assets."""
    calibration_tokens: int = Field(default=4096, ge=64)
    """Tokens profiled per public domain."""
    seed: int = Field(default=0, ge=0)
    workers: int = Field(default=2, ge=1)
    secure: bool = False
    """Whether updates are summed under masks: the coordinator sees no single one."""
    smallest_sum: int = Field(default=2, ge=2)
    """Fewest devices that a masked sum is over; blocks with fewer holders are skipped."""
    devices: tuple[DeviceSettings, ...] = Field(min_length=1)
    extract: ExtractSettings = ExtractSettings()
    adapter: AdapterSettings = AdapterSettings()
    train: TrainSettings = TrainSettings()
    federation: FederationSettings = FederationSettings()
    privacy: PrivacySettings = PrivacySettings()
    personal: PersonalSettings = PersonalSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    compare: CompareSettings = CompareSettings()

    @model_validator(mode="after")
    def _distinct_devices(self) -> Self:
        names = [name for group in self.devices for name in group.names]
        if len(names) != len(set(names)):
            raise ValueError(f"device names must be distinct, got {names}")
        return self

    @property
    def smallest_class(self) -> int:
        """Fewest holders in a cohort by which a block is summed."""
        return self.smallest_sum if self.secure else self.federation.fewest_holders

    @property
    def digest(self) -> str:
        """Names these settings; goes into every message of the run."""
        return digest_of(canonical_json(self.model_dump(mode="json")))


def load_experiment(path: Path, overrides: tuple[str, ...] = ()) -> Experiment:
    """The experiment in a TOML file, with `section.key=value` overrides (values in TOML).

    Raises:
        ConfigError: no file, no TOML, an unknown key or a value out of range; names which.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        for override in overrides:
            _override(table, override)
        return Experiment.model_validate(table)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{path}: " + "; ".join(lines)) from error


def _override(table: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: write section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, key = path.strip().split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: {section} is no section")
    table[key] = value
