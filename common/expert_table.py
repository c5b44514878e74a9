"""What every expert contributes under every public domain: a small table to rank experts by.

The server measures it on public text (`server/profile.py`) and ships it. A device weighs its
domains by the private mixture of its data, and so learns which experts its data needs, as the
coordinator would if it were told. Energies are expectations per token, hence linear in the
mixture; and the rule by which a plan spends its bytes comes along.

Shapes: M domains, in the order of their names; E experts of a layer.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import numpy as safetensors

from proxymoe.common.allocation import Room, Scores
from proxymoe.common.config import Allocation
from proxymoe.common.domains import read_table, require_names, tensors_of
from proxymoe.common.errors import CheckpointError, ConfigError
from proxymoe.common.files import write_bytes

HEADER = "experts"
"""The key of the file's metadata under which everything stands that is no tensor."""
MAX_EXPERT_BYTES = 1 << 50


@dataclass(frozen=True, slots=True, eq=False)
class ExpertTable:
    """Energies of all experts by public domain, and how plans are cut; always a valid table.

    Raises:
        CheckpointError: too few or too many domains, a bad name, no layers, or energies that are
            negative, not finite, or not of one number of domains.
    """

    domains: tuple[str, ...]
    """Sorted names."""
    energy: Mapping[int, NDArray[np.float32]]
    """(M, E) E[g² ‖f‖²] · E[1/‖h‖²] per token, by decoder layer: gate g, output f, and the residual
    stream h, of which it is the share that makes layers comparable."""
    expert_bytes: Mapping[int, int]
    """Bytes of one expert as devices of this run hold it, by decoder layer."""
    allocation: Allocation
    floor: float
    """Both as in `ExtractSettings`."""
    is_exact: bool
    """Whether plans follow from these energies alone; not with another mode, or with templates."""

    def __post_init__(self) -> None:
        require_names(self.domains)
        if not self.energy or self.energy.keys() != self.expert_bytes.keys():
            raise CheckpointError(
                f"energies of {len(self.energy)} layers, and bytes of experts of "
                f"{len(self.expert_bytes)}; a table has both of one layer or more"
            )
        for at, energy in self.energy.items():
            if energy.dtype != np.float32 or energy.ndim != 2 or not energy.size:
                raise CheckpointError(
                    f"layer {at}: energies of {energy.dtype} {energy.shape}, not of float32 (M, E)"
                )
            if len(energy) != len(self.domains):
                raise CheckpointError(
                    f"layer {at}: energies of {len(energy)} domains, named are {len(self.domains)}"
                )
            if not (np.isfinite(energy).all() and (energy >= 0).all()):
                raise CheckpointError(f"layer {at}: energies that are negative or not finite")
            if not 1 <= self.expert_bytes[at] <= MAX_EXPERT_BYTES:
                raise CheckpointError(f"layer {at}: experts of {self.expert_bytes[at]} bytes")
        if not 0 <= self.floor <= 1:
            raise CheckpointError(f"floor {self.floor:g}; it is a share from 0 to 1")

    @property
    def num_experts(self) -> dict[int, int]:
        """Experts per layer, by number of the decoder layer."""
        return {at: energy.shape[1] for at, energy in self.energy.items()}

    def mix(self, mixture: Mapping[str, float]) -> Scores:
        """What text of this domain mixture loses per token with every expert.

        Weights need not sum to 1: as for a profile, their proportions count.

        Raises:
            ConfigError: an unknown domain, or weights that are negative or all zero.
        """
        if unknown := sorted(set(mixture) - set(self.domains)):
            raise ConfigError(f"domains {unknown} are not in the table; known: {self.domains}")
        weights = np.array([mixture.get(name, 0.0) for name in self.domains])
        if not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
            raise ConfigError(f"domain mixture {dict(mixture)} needs weights >= 0, some above 0")
        shares = weights / weights.sum()
        return {at: shares @ energy.astype(np.float64) for at, energy in self.energy.items()}

    def bytes_of(self, kept: Mapping[int, Sequence[int]]) -> int:
        """Bytes of these experts, by the same layers."""
        return sum(self.expert_bytes[at] * len(experts) for at, experts in kept.items())

    def keep(self, scores: Scores, num_bytes: int) -> dict[int, list[int]]:
        """The experts that a plan of so many bytes for experts keeps, by decoder layer.

        Where layers are alike in number and bytes of experts, as in all families so far, the bytes
        that a plan uses lead to the same choice as the budget that it was made for.

        Args:
            scores: of `mix`, or others of the same experts.
            num_bytes: one expert per layer fits, at least.
        """
        return Room(dict(self.expert_bytes), num_bytes, self.allocation, self.floor).fill(scores)


class _Header(BaseModel):
    """Everything of a table that is no tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    domains: tuple[str, ...]
    expert_bytes: dict[Annotated[int, Field(ge=0)], Annotated[int, Field(strict=True)]]
    allocation: Allocation
    floor: float
    is_exact: Annotated[bool, Field(strict=True)]


def expert_table_bytes(table: ExpertTable) -> bytes:
    """The table as safetensors, one tensor per layer; equal tables have equal bytes."""
    header = _Header(
        domains=table.domains,
        expert_bytes={at: table.expert_bytes[at] for at in sorted(table.expert_bytes)},
        allocation=table.allocation,
        floor=table.floor,
        is_exact=table.is_exact,
    )
    # safetensors reads memory as it lies.
    tensors = {str(at): np.ascontiguousarray(energy) for at, energy in table.energy.items()}
    return safetensors.save(tensors, {HEADER: header.model_dump_json()})


def expert_table_from(content: bytes) -> ExpertTable:
    """The table that these bytes stand for; they may come from anywhere.

    Raises:
        CheckpointError: too large, no safetensors, or no valid table.
    """
    tensors, header = tensors_of(content), _header(content)
    if strange := sorted(tensors.keys() ^ {str(at) for at in header.expert_bytes}):
        raise CheckpointError(f"layer {strange[0][:80]!r}: only its energies, or only its bytes")
    return ExpertTable(
        domains=header.domains,
        energy={at: tensors[str(at)] for at in header.expert_bytes},
        expert_bytes=header.expert_bytes,
        allocation=header.allocation,
        floor=header.floor,
        is_exact=header.is_exact,
    )


def save_expert_table(path: Path, table: ExpertTable) -> None:
    """Writes the table to a safetensors file, atomically."""
    write_bytes(path, expert_table_bytes(table))


def load_expert_table(path: Path) -> ExpertTable:
    """The table in a file.

    Raises:
        CheckpointError: the file is missing, too large or no valid table; names the file.
    """
    return read_table(path, expert_table_from)


def _header(content: bytes) -> _Header:
    """The header of bytes that are safetensors: their length comes first, then JSON."""
    end = 8 + int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8:end]).get("__metadata__") or {}
    try:
        return _Header.model_validate_json(metadata.get(HEADER, ""))
    except ValidationError as error:
        fields = sorted({".".join(map(str, e["loc"])) or "all of it" for e in error.errors()})
        raise CheckpointError(f"table of experts with a header refused at {fields}") from None
