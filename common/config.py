"""An experiment, as one strict, frozen object backed by TOML.

Defaults stand here and nowhere else. Unknown keys are refused, units are in the names, and the
resolved file is written beside every result, so each run explains itself.
"""

import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from proxymoe.common.errors import ConfigError
from proxymoe.common.files import canonical_json, digest_of
from proxymoe.common.plan import Precision, RouterMode
from proxymoe.common.privacy_settings import PrivacySettings
from proxymoe.common.section import Section


class PlanMode(StrEnum):
    """How experts are chosen, and what becomes of the others; each has a file in `server/modes`."""

    DROP = "drop"
    MEAN = "mean"
    AFFINE = "affine"
    PTSE = "ptse"
    MSMOE = "msmoe"
    HCSMOE = "hcsmoe"
    REAP = "reap"
    EAN = "ean"
    FREQUENCY = "frequency"
    RANDOM = "random"


class Allocation(StrEnum):
    """How many experts each layer keeps."""

    GLOBAL = "global"
    """By saliency over all layers, above a floor."""
    UNIFORM = "uniform"
    """The same number in every layer."""


class DeviceSettings(Section):
    """Devices that one folder of data describes: one device per named subfolder."""

    data: str
    """Folder with <name>/train.jsonl, validation.jsonl and test.jsonl; relative to the assets."""
    names: tuple[str, ...] = Field(min_length=1)
    domain: str | None = None
    """Public domain the owner names for all of them; None takes the device's own name."""
    answers: bool = True
    """Whether completions are one of few answers to rank (else: running text)."""


class ExtractSettings(Section):
    """How a proxy submodel is cut."""

    kept_fraction: float = Field(default=0.25, gt=0, le=1)
    """Share of the experts' bytes to keep, when no budget is given."""
    budget_bytes: int | None = Field(default=None, gt=0)
    mode: PlanMode = PlanMode.DROP
    allocation: Allocation = Allocation.GLOBAL
    floor: float = Field(default=0.25, ge=0, le=1)
    """Every layer keeps this share of what a uniform allocation would give it."""
    router: RouterMode = RouterMode.FULL
    experts: Precision = Precision.BF16
    """How the device holds its experts; a narrower one makes room for more in the same bytes."""
    templates: int = Field(default=0, ge=0)
    """Most plans there are per budget: a device gets the one that serves it best, so that experts
    have many holders; 0 cuts every device a plan of its own."""
    rotate: float = Field(default=0.0, ge=0, le=1)
    """Share of each layer's kept experts that are drawn anew for every round of a simulation, by
    energy: in time the adapter meets them all. At equal bytes in memory, but more are fetched."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require_rotatable(self)
        return self


class AdapterSettings(Section):
    """What is trained."""

    targets: tuple[Literal["attention", "shared", "experts"], ...] = ("attention", "shared")
    rank: int = Field(default=16, ge=1, le=512)


class TrainSettings(Section):
    """How a device tunes an adapter."""

    steps: int = Field(default=12, ge=1)
    batch_size: int = Field(default=8, ge=1)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """`sgd` suits few local steps under an adaptive server strategy."""
    learning_rate: float = Field(default=1e-2, gt=0, le=1e6)
    warmup_steps: int = Field(default=2, ge=0)
    decay: bool = False
    """Whether the learning rate falls linearly to zero within these steps."""
    gradient_clip: float = Field(default=1.0, gt=0)
    max_tokens: int = Field(default=256, ge=8)
    too_long: Literal["truncate", "drop", "refuse"] = "truncate"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    expert_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Chance of a kept expert to sit out a step, if the submodel lacks others: the adapter learns
    not to lean on who is there, and so suits the full model, where all are."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about half the memory, a third more time."""


class FederationSettings(Section):
    """How updates of many devices become one adapter."""

    rounds: int = Field(default=20, ge=1)
    cohort_size: int | None = Field(default=None, ge=1)
    """Devices asked per round; None asks all that can be asked."""
    cohorts: Literal["deck", "covering"] = "deck"
    """Who is asked together: as a shuffled deck has them, or so that many blocks have holders
    enough to be summed; every device is asked equally often."""
    strategy: Literal["fedavg", "fedadam"] = "fedavg"
    server_learning_rate: float = Field(default=2.5, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    epsilon: float = Field(default=1e-3, gt=0)
    final_rate: float = Field(default=0.1, gt=0, le=1)
    """The devices' learning rate falls linearly over the rounds to this share of itself."""
    server_final_rate: float = Field(default=1.0, gt=0, le=1)
    """The same for the server's learning rate."""
    server_warmup_rounds: int = Field(default=0, ge=0)
    """Rounds over which the server's learning rate rises linearly."""
    clip_norm: float = Field(default=30.0, gt=0)
    """Largest L2 norm of one device's update; longer ones are scaled down on the device."""
    canary_every: int = Field(default=1, ge=1)
    """Rounds between two canary checks; what came after the last passed one can be undone."""
    canary_tolerance: float = Field(default=3.0, gt=0)
    """Nats per token by which the loss on public text may rise over the base model's."""


class PersonalSettings(Section):
    """The personal adapter on top of the federated one; it never leaves the device."""

    steps: int = Field(default=0, ge=0)
    batch_size: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=5e-3, gt=0)
    local_learning_rate: float = Field(default=1e-2, gt=0)
    """Of the comparison: tuning alone, from nothing, with the same number of steps."""


class EvaluateSettings(Section):
    """How results are measured."""

    max_items: int = Field(default=150, ge=1)
    """Test rows per device."""
    public_rows: int = Field(default=24, ge=1)
    """Rows per public domain for the canary and for forgetting."""
    public_domains: tuple[str, ...] = ("math", "code")
    proxies: bool = True
    """Whether the untuned and the tuned proxy submodel are evaluated too."""
    full_reference: bool = False
    """Whether each device is also tuned alone with the full model, for recovered gain."""


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
        _require_rotatable(self)
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


def _require_rotatable(settings: ExtractSettings | Mode) -> None:
    """Raises ValueError where plans cannot change from round to round."""
    mode, router = settings.mode, settings.router
    if settings.rotate and (mode is not PlanMode.DROP or router is not RouterMode.FULL):
        raise ValueError(
            f"rotate = {settings.rotate:g} with mode = {mode.value!r} and "
            f"router = {router.value!r}: only 'drop' under a 'full' router can rotate"
        )


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
        """Fewest holders in a cohort by which a block is summed; one in the clear."""
        return self.smallest_sum if self.secure else 1

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
