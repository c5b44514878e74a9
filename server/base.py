"""The base model on the server's disk: its pieces, its MoE layers, its digest.

The conversion from names on disk to names in memory is transformers' own, so it follows every
family; what we add is the role of each tensor: trunk, router, or a part of one expert.
"""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from proxymoe.common.checkpoint import WEIGHTS, Checkpoint, tensor_from
from proxymoe.common.errors import CheckpointError, PlanError, UnsupportedModel
from proxymoe.common.files import canonical_json, digest_of, write_json
from proxymoe.common.manifest import COMPANIONS, Manifest, Part, Piece, materialise, read_config
from proxymoe.common.moe import MoELayer, moe_layers
from proxymoe.common.plan import Plan, keep_all


class BaseCheckpoint:
    """A full MoE checkpoint, indexed: its pieces, its MoE layers and its digest.

    Opening reads every byte once, to take digests and to refuse weights that are not finite; the
    result is kept in `cache` under the sizes and times of the files.

    Raises:
        CheckpointError: missing, truncated or non-finite tensors.
        UnsupportedModel: a family that ProxyMoE does not handle.
    """

    def __init__(self, folder: Path, cache: Path | None = None) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.checkpoint = Checkpoint(folder)
        self.skeleton = meta_model(self.config)
        self.layers = {layer.position: layer for layer in moe_layers(self.skeleton)}
        _require_plain_head(self.skeleton)
        self.pieces = self._cached_pieces(cache)
        # Sorted, so that it does not matter how the checkpoint is cut into shards.
        entries = [[p.target, p.expert or 0, p.part, p.digest] for p in self.pieces]
        settings = json.loads(json.dumps(self.config.to_dict()))
        # Who wrote the file does not change what the model computes.
        for incidental in ("transformers_version", "_name_or_path"):
            settings.pop(incidental, None)
        self.digest = digest_of(canonical_json([settings, sorted(entries)]))

    @property
    def num_experts(self) -> dict[int, int]:
        """Experts per MoE layer, by number of the decoder layer."""
        return {position: layer.num_routed for position, layer in self.layers.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole model."""
        return sum(piece.num_bytes for piece in self.pieces)

    @cached_property
    def trunk_bytes(self) -> int:
        """Bytes that every proxy submodel holds: everything but the routed experts."""
        return sum(piece.num_bytes for piece in self.pieces if piece.expert is None)

    @cached_property
    def expert_bytes(self) -> dict[int, int]:
        """Bytes of one expert, by decoder layer."""
        sizes = dict.fromkeys(self.layers, 0)
        for piece in self.pieces:
            if piece.expert == 0 and piece.layer is not None:
                sizes[piece.layer] += piece.num_bytes
        return sizes

    def keep_all(self) -> Plan:
        """The plan of the full model."""
        return keep_all(self.digest, self.num_experts)

    def manifest(self, plan: Plan) -> Manifest:
        """The listing of the proxy submodel with this plan; PlanError if it is for another base."""
        plan.require_base(self.digest)
        planned = {position: layer.num_experts for position, layer in plan.layers.items()}
        if planned != self.num_experts:
            raise PlanError(
                f"plan {plan.digest[:12]} is for experts per layer {planned}, the base model has "
                f"{self.num_experts}; make a new plan for this base model"
            )
        kept = {position: frozenset(layer.kept) for position, layer in plan.layers.items()}
        pieces = [
            piece
            for piece in self.pieces
            if piece.expert is None
            or (piece.layer is not None and piece.expert in kept[piece.layer])
        ]
        config = json.loads(json.dumps(self.config.to_dict()))  # as it will be read back
        if not plan.keeps_all:
            config["proxy_moe"] = {
                "version": 1,
                "base": self.digest,
                "plan": plan.digest,
                "router": plan.router.value,
                "layers": {str(at): len(layer.kept) for at, layer in plan.layers.items()},
            }
        return Manifest(plan=plan, config=config, pieces=tuple(pieces), companions=self._companions)

    @cached_property
    def _companions(self) -> dict[str, str]:
        return {
            name: digest_of((self.folder / name).read_bytes())
            for name in COMPANIONS
            if (self.folder / name).exists()
        }

    def materialise(self, plan: Plan, folder: Path) -> Path:
        """Writes the submodel of a plan for a local device, or the full model; see `manifest`."""
        return materialise(self.manifest(plan), folder, self.read_piece, self.read_companion)

    def materialised_full(self, cache: Path) -> Path:
        """The folder of the full model in this cache; written if it is not there."""
        folder = cache / f"full-{self.digest[:24]}"
        if not (folder / WEIGHTS).exists():
            self.materialise(self.keep_all(), folder)
        return folder

    def read_piece(self, piece: Piece) -> bytes:
        """The bytes of a piece, straight from the checkpoint."""
        return self.checkpoint.read_bytes(piece.source)

    def read_companion(self, name: str) -> bytes:
        """The bytes of a small file beside the weights."""
        return (self.folder / name).read_bytes()

    def _cached_pieces(self, cache: Path | None) -> tuple[Piece, ...]:
        if cache is None:
            return tuple(self._pieces())
        files = sorted({place.file for place in self.checkpoint.ranges.values()})
        stats = [(self.folder / name).stat() for name in files]
        seen = [[n, s.st_size, s.st_mtime_ns] for n, s in zip(files, stats, strict=True)]
        path = cache / f"pieces-{digest_of(canonical_json([str(self.folder), seen]))[:24]}.json"
        if path.exists():
            return tuple(Piece.model_validate(entry) for entry in json.loads(path.read_bytes()))
        pieces = tuple(self._pieces())
        write_json(path, [piece.model_dump(exclude_defaults=True) for piece in pieces])
        return pieces

    def _pieces(self) -> Iterator[Piece]:
        roles = _Roles(self.skeleton, self.config, list(self.layers.values()))
        found: set[str] = set()
        for name, place in self.checkpoint.ranges.items():
            role = roles.of(name)
            if role is None:
                continue
            if place.shape != (expected := roles.shape(role)):
                raise CheckpointError(
                    f"{self.folder}: tensor {name} has shape {place.shape}, config.json asks for "
                    f"{expected}; is it of another model?"
                )
            content = self.checkpoint.read_bytes(name)
            tensor = tensor_from(content, place.dtype, place.shape)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(
                    f"{self.folder}: tensor {name} holds NaN or infinity; fetch it again"
                )
            found.add(f"{role['target']} {role.get('expert', '')} {role.get('part', '')}")
            yield Piece(
                source=name,
                dtype=place.dtype,
                shape=place.shape,
                num_bytes=place.num_bytes,
                digest=digest_of(content),
                **role,
            )
        if missing := sorted(roles.required() - found):
            raise CheckpointError(
                f"{self.folder}: {len(missing)} tensors are missing, the first is {missing[0]}; "
                "is a shard absent, or config.json of another model?"
            )


class _Roles:
    """Which parameter, and which part of it, each tensor on disk is."""

    def __init__(
        self, model: PreTrainedModel, config: PretrainedConfig, layers: list[MoELayer]
    ) -> None:
        mapping = get_model_conversion_mapping(model)
        self.renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
        self.converters = [item for item in mapping if isinstance(item, WeightConverter)]
        self.prefix = model.base_model_prefix
        self.state = dict(model.state_dict())
        self.tied = set(model._tied_weights_keys or {}) if config.tie_word_embeddings else set()
        self.experts = {
            f"{layer.name}.experts.{leaf}": layer
            for layer in layers
            for leaf in ("gate_up_proj", "down_proj")
        }
        self.routers = {
            f"{layer.name}.{name}": (layer, dim)
            for layer in layers
            for name, dim in layer.router_tensors().items()
        }

    def of(self, name: str) -> dict[str, Any] | None:
        """Fields of the Piece that this disk tensor is; None for what the model never loads."""
        target, pattern = rename_source_key(
            name, self.renamings, self.converters, self.prefix, self.state
        )
        if target not in self.state and name in self.state:
            target, pattern = name, None
        if target not in self.state or target in self.tied:
            return None
        if target in self.routers:
            layer, dim = self.routers[target]
            return {"target": target, "layer": layer.position, "expert_dim": dim}
        if target in self.experts:
            number = re.search(r"experts\.(\d+)\.", name)
            if number is None or pattern is None:
                raise UnsupportedModel(
                    f"{name}: experts stored fused on disk are not supported yet"
                )
            parts: tuple[Part, ...] = ("down",)
            if target.endswith("gate_up_proj"):
                parts = ("gate", "up")
            converter = next(c for c in self.converters if pattern in c.source_patterns)
            part = parts[converter.source_patterns.index(pattern)]
            position = self.experts[target].position
            return {
                "target": target,
                "part": part,
                "layer": position,
                "expert": int(number.group(1)),
            }
        return {"target": target}

    def shape(self, role: dict[str, Any]) -> tuple[int, ...]:
        """Shape on disk of the tensor with this role."""
        whole = tuple(self.state[role["target"]].shape)
        if "part" not in role:
            return whole
        _, rows, columns = whole
        return (rows if role["part"] == "down" else rows // 2, columns)

    def required(self) -> set[str]:
        """Keys, as made in `BaseCheckpoint._pieces`, of everything the model cannot do without."""
        keys = set()
        for target in self.state:
            if target in self.tied:
                continue
            if target not in self.experts:
                keys.add(f"{target}  ")
                continue
            parts = ("gate", "up") if target.endswith("gate_up_proj") else ("down",)
            keys |= {
                f"{target} {expert} {part}"
                for expert in range(self.experts[target].num_routed)
                for part in parts
            }
        return keys


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model's structure without any memory for its weights."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedModel(
            f"{config.model_type}: no causal language model ({reason})"
        ) from error
    return model


def _require_plain_head(model: PreTrainedModel) -> None:
    """Losses are computed from the head's weight alone: logits must be that, and nothing else."""
    names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    settings = {name: getattr(model.config, name, None) for name in names}
    extras = [f"{name}={value}" for name, value in settings.items() if value not in (None, 1.0)]
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        extras.append("bias")
    if head is None or extras:
        raise UnsupportedModel(
            f"{type(model).__name__}: supported is a plain output head, found an output head with "
            f"{', '.join(extras) or 'no weight'}"
        )
