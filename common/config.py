"""Settings of extraction, tuning and federation, as strict, frozen objects.

Defaults stand here and nowhere else. Unknown keys are refused, and units are in the names.
`common/experiment.py` puts them together for a simulation, `server/settings.py` for a coordinator.
"""

from enum import StrEnum
from typing import Literal, Self

from pydantic import Field, model_validator

from proxymoe.common.plan import Precision, RouterMode
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
        require_rotatable(self.mode, self.router, self.rotate)
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
    fewest_holders: int = Field(default=1, ge=1)
    """A block counts in a sum in the clear only if so many devices of the cohort hold it: what few
    have learned suits few. Under masks the smallest class of the sum says the same."""
    canary_every: int = Field(default=1, ge=1)
    """Rounds between two canary checks; what came after the last passed one can be undone."""
    canary_tolerance: float = Field(default=3.0, gt=0)
    """Nats per token by which the loss on public text may rise over the base model's."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.cohort_size is not None and self.fewest_holders > self.cohort_size:
            raise ValueError(
                f"fewest_holders {self.fewest_holders} is above cohort_size {self.cohort_size}: "
                "no block would ever be summed"
            )
        return self


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


def require_rotatable(mode: PlanMode, router: RouterMode, rotate: float) -> None:
    """Raises ValueError where plans cannot change from round to round."""
    if rotate and (mode is not PlanMode.DROP or router is not RouterMode.FULL):
        raise ValueError(
            f"rotate = {rotate:g} with mode = {mode.value!r} and "
            f"router = {router.value!r}: only 'drop' under a 'full' router can rotate"
        )
