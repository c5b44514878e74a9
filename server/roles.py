"""What each tensor on disk is: trunk, router, a part of one expert, or all experts at once.

The conversion from names on disk to names in memory is transformers' own, so it follows every
family.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from proxymoe.common.checkpoint import TensorRange
from proxymoe.common.errors import UnsupportedModel
from proxymoe.common.manifest import Part, Piece
from proxymoe.common.moe import MoELayer


@dataclass(frozen=True, slots=True)
class Role:
    """Which parameter, and which part of it, one tensor on disk is."""

    target: str
    """Name of the parameter in memory."""
    layer: int | None = None
    expert: int | None = None
    expert_dim: int | None = None
    part: Part = "whole"
    fused: bool = False
    """Whether it holds all experts, as the parameter in memory does."""

    def pieces(self, name: str, place: TensorRange) -> Iterator[Piece]:
        """The pieces of the tensor `name`: one, or one per expert; without digests yet."""
        count = place.shape[0] if self.fused else 1
        size = place.num_bytes // count
        for index in range(count):
            yield Piece(
                source=name,
                offset=index * size,
                target=self.target,
                part=self.part,
                layer=self.layer,
                expert=index if self.fused else self.expert,
                expert_dim=self.expert_dim,
                dtype=place.dtype,
                shape=place.shape[1:] if self.fused else place.shape,
                num_bytes=size,
                digest="",
            )


class Roles:
    """The roles of all tensors of one model's checkpoint."""

    def __init__(
        self, model: PreTrainedModel, config: PretrainedConfig, layers: list[MoELayer]
    ) -> None:
        mapping = get_model_conversion_mapping(model)
        self._renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
        self._converters = [item for item in mapping if isinstance(item, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._state = dict(model.state_dict())
        ties = model.all_tied_weights_keys if config.tie_word_embeddings else {}
        self._tied = dict(ties)
        buffers = {name for name, _ in model.named_buffers()}
        self._computed = buffers - self._state.keys()
        self._ignored = [
            re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()
        ]
        self._num_layers = config.get_text_config().num_hidden_layers
        self._experts = {
            f"{layer.name}.experts.{leaf}": layer
            for layer in layers
            for leaf, _ in layer.experts.named_parameters(recurse=False)
        }
        self._routers = {
            f"{layer.name}.{name}": (layer, dim)
            for layer in layers
            for name, dim in layer.router_tensors().items()
        }

    def of(self, name: str) -> Role | None:
        """The role of this disk tensor; None for what the model never loads."""
        target, pattern = self._target(name)
        if target not in self._state or target in self._tied:
            return None
        if target in self._routers:
            layer, dim = self._routers[target]
            return Role(target, layer.position, expert_dim=dim)
        if target not in self._experts:
            return Role(target)
        position = self._experts[target].position
        number = re.search(r"experts\.(\d+)\.", name)
        if number is None:
            return Role(target, position, fused=True)
        sources = next(
            (c.source_patterns for c in self._converters if pattern in c.source_patterns), []
        )
        parts = _parts(target)
        if pattern is None or len(sources) != len(parts):
            raise UnsupportedModel(
                f"{name}: supported are experts on disk as gate, up and down each, or all fused"
            )
        part = parts[sources.index(pattern)]
        return Role(target, position, expert=int(number.group(1)), part=part)

    def needless(self, name: str) -> bool:
        """Whether the model does well without this tensor, which it does not load.

        That is a second copy of a tied weight, a table that is computed, or a head that predicts
        several tokens at once (MTP), which is stored as layers after the last.
        """
        target, _ = self._target(name)
        number = re.search(r"\.layers\.(\d+)\.", f".{target}")
        return (
            target in self._tied
            or target in self._computed
            or target.endswith("rotary_emb.inv_freq")
            or (number is not None and int(number.group(1)) >= self._num_layers)
            or any(pattern.search(name) for pattern in self._ignored)
        )

    def tied_copies(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """Pairs of tensors on disk that are one weight of the model."""
        on_disk = {self._target(name)[0]: name for name in names}
        return [
            (on_disk[first], on_disk[second])
            for second, first in self._tied.items()
            if first in on_disk and second in on_disk
        ]

    def _target(self, name: str) -> tuple[str, str | None]:
        """(name in memory, pattern that matched) of a tensor on disk."""
        target, pattern = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._state
        )
        if target not in self._state and name in self._state:
            return name, None
        return target, pattern

    def shape(self, role: Role) -> tuple[int, ...]:
        """Shape on disk of the tensor with this role."""
        whole = tuple(self._state[role.target].shape)
        if role.expert is None:
            return whole
        _, rows, *columns = whole
        return (rows if role.part not in ("gate", "up") else rows // 2, *columns)

    def provides(self, role: Role) -> set[str]:
        """Keys of `required` that a tensor with this role stands for."""
        if role.target not in self._experts:
            return {role.target}
        if role.fused:
            return self._keys(role.target)
        return {f"{role.target} {role.expert} {role.part}"}

    def required(self) -> set[str]:
        """One key for everything that the model cannot do without."""
        keys = set()
        for target in self._state.keys() - self._tied.keys():
            keys |= self._keys(target) if target in self._experts else {target}
        return keys

    def _keys(self, target: str) -> set[str]:
        experts = range(self._experts[target].num_routed)
        return {f"{target} {expert} {part}" for expert in experts for part in _parts(target)}


def _parts(target: str) -> tuple[Part, ...]:
    """What a fused expert parameter consists of where experts are on disk one by one."""
    if target.endswith("gate_up_proj"):
        return ("gate", "up")
    return ("down",) if target.endswith("down_proj") else ("whole",)
