"""A plan: which experts of a base model a proxy submodel keeps, and what happens to the others.

A plan is plain data that a person can read and compare. It always speaks in the base model's
own expert ids; slots (positions among the kept experts) exist only inside a live model.
"""

from enum import StrEnum
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from proxymoe.common.errors import CheckpointError, PlanError
from proxymoe.common.files import canonical_json, digest_of

PLAN_FILE = "plan.json"
"""The plan of a materialised submodel, beside its weights."""


class Others(StrEnum):
    """What a routed expert contributes when it is not kept."""

    DROP = "drop"
    """Nothing: its share of the sum is left out."""
    MEAN = "mean"
    """Its gate times a constant vector, its mean output (MoNE, arXiv 2507.00390)."""
    AFFINE = "affine"
    """Its gate times what imitates it best: a scaled kept expert plus a constant vector."""
    MERGE = "merge"
    """Its gate times the expert that it was merged into."""


class RouterMode(StrEnum):
    """Whether the proxy submodel's router can still choose what is not kept."""

    FULL = "full"
    """The whole router, untouched: gates are the base model's own."""
    SLICED = "sliced"
    """Only the kept rows, as most pruning methods do: gates renormalise over the kept."""
    SUMMED = "summed"
    """Before top-k the kept experts take over the probability of those merged into them, and the
    rest is masked, as in LiteMoE: r' = r·M."""


class Precision(StrEnum):
    """How a device holds the weights of routed experts; see `common/quantised.py`."""

    BF16 = "bf16"
    """As the base model's checkpoint has them, which is bf16 as a rule."""
    INT8 = "int8"
    INT4 = "int4"


class LayerPlan(BaseModel):
    """The kept experts of one MoE layer."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_experts: int = Field(ge=1)
    """Experts of this layer in the base model."""
    kept: tuple[int, ...] = Field(strict=False)
    """Ids of the kept experts, ascending."""
    stands_for: dict[int, int] = Field(default_factory=dict, strict=False)
    """{expert: kept expert} for those that a kept expert imitates, or that are merged into it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.kept:
            raise ValueError("no expert kept; every layer keeps at least one")
        if list(self.kept) != sorted(set(self.kept)):
            raise ValueError(f"kept experts {self.kept} are not ascending and distinct")
        if self.kept[0] < 0 or self.kept[-1] >= self.num_experts:
            raise ValueError(f"kept experts {self.kept} outside 0..{self.num_experts - 1}")
        others, kept = set(range(self.num_experts)) - set(self.kept), set(self.kept)
        if self.stands_for.keys() - others or set(self.stands_for.values()) - kept:
            raise ValueError(f"{self.stands_for}: not from experts left out to kept experts")
        return self

    def slots(self) -> list[int]:
        """Slot of every expert of the base layer, its own or of who stands for it; -1 if none."""
        slot_of = {expert: slot for slot, expert in enumerate(self.kept)}
        slot_of |= {expert: slot_of[kept] for expert, kept in self.stands_for.items()}
        return [slot_of.get(expert, -1) for expert in range(self.num_experts)]


class Plan(BaseModel):
    """Kept experts per layer, the fate of the others, and the base model this holds for."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    base: str
    """Digest of the base model's checkpoint."""
    layers: dict[int, LayerPlan] = Field(strict=False)
    """By number of the decoder layer."""
    router: RouterMode = Field(default=RouterMode.FULL, strict=False)
    others: Others = Field(default=Others.DROP, strict=False)
    experts: Precision = Field(default=Precision.BF16, strict=False)
    """A submodel with quantised experts is another one, also if it keeps them all."""
    mode: str = "drop"
    """How it was made; provenance only."""
    tables: str | None = None
    """Digest of the tensors that go with the plan, present unless the others are dropped."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.layers:
            raise ValueError("a plan needs at least one layer")
        if (self.tables is None) != (self.others is Others.DROP):
            raise ValueError("tables go with every plan, but with others = 'drop'")
        replaced = any(layer.stands_for for layer in self.layers.values())
        if replaced and self.others not in (Others.AFFINE, Others.MERGE):
            raise ValueError(f"others = '{self.others}', and yet kept experts stand for some")
        if self.router is RouterMode.SLICED and self.others not in (Others.DROP, Others.MERGE):
            raise ValueError(
                f"a sliced router never chooses other experts, so others = '{self.others}' is in "
                "vain; use 'drop'"
            )
        if self.router is RouterMode.SUMMED and self.others is not Others.MERGE:
            raise ValueError("a summed router goes with merged experts only; use router = 'full'")
        if self.others is Others.MERGE and self.experts is not Precision.BF16:
            raise ValueError(f"merged experts are not held in {self.experts}; use experts = 'bf16'")
        return self

    @property
    def digest(self) -> str:
        """Names this plan on the wire and in every message about it."""
        return digest_of(canonical_json(self.model_dump(mode="json")))

    @property
    def kept(self) -> dict[int, tuple[int, ...]]:
        """Ids of the kept experts, by decoder layer."""
        return {at: layer.kept for at, layer in self.layers.items()}

    @property
    def num_kept(self) -> int:
        """Kept experts over all layers."""
        return sum(len(layer.kept) for layer in self.layers.values())

    @property
    def kept_fraction(self) -> float:
        """Kept experts over all experts."""
        return self.num_kept / sum(layer.num_experts for layer in self.layers.values())

    @property
    def keeps_all(self) -> bool:
        """Whether the proxy submodel has every expert of the base model."""
        return all(len(layer.kept) == layer.num_experts for layer in self.layers.values())

    @property
    def is_base(self) -> bool:
        """Whether the proxy submodel is the base model itself, in every bit."""
        return self.keeps_all and self.experts is Precision.BF16

    def require_base(self, base: str) -> None:
        """Raises PlanError unless this plan was made for the base model with that digest."""
        if self.base != base:
            raise PlanError(
                f"plan {self.digest[:12]} is for base model {self.base[:12]}, not {base[:12]}; "
                "make a new plan for this base model"
            )


def keep_all(base: str, num_experts: dict[int, int], experts: Precision = Precision.BF16) -> Plan:
    """The plan whose proxy submodel is the full model; `num_experts` by decoder layer."""
    layers = {
        position: LayerPlan(num_experts=count, kept=tuple(range(count)))
        for position, count in num_experts.items()
    }
    return Plan(base=base, layers=layers, experts=experts, mode="all")


def read_plan(folder: Path) -> Plan:
    """The plan beside a materialised submodel; CheckpointError if there is none."""
    try:
        return Plan.model_validate_json((folder / PLAN_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{folder / PLAN_FILE}: no readable plan ({error})") from error
