"""The base model on the server's disk: its pieces, its MoE layers, its digest.

Names on disk become names in memory, and each tensor gets its role, in `server/roles.py`.
"""

import json
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from proxymoe.common.budget import Sizes
from proxymoe.common.checkpoint import WEIGHTS, Checkpoint, tensor_from
from proxymoe.common.errors import CheckpointError, PlanError, UnsupportedModel
from proxymoe.common.files import canonical_json, digest_of
from proxymoe.common.head import output_head
from proxymoe.common.manifest import (
    COMPANIONS,
    Manifest,
    Piece,
    held_bytes,
    materialise,
    read_config,
)
from proxymoe.common.moe import moe_layers
from proxymoe.common.plan import Plan, Precision, keep_all
from proxymoe.common.sizes import sizes_of
from proxymoe.server.index import Progress, index
from proxymoe.server.roles import Roles


class BaseCheckpoint:
    """A full MoE checkpoint, indexed: its pieces, its MoE layers and its digest.

    Opening reads every byte once, to take digests and to refuse weights that are not finite; the
    result is kept in `cache`, see `server/index.py`.

    Args:
        folder: of the checkpoint.
        cache: where what is known of its shards is kept; None keeps nothing.
        progress: told how many bytes are read, and of how many.

    Raises:
        CheckpointError: missing, truncated or non-finite tensors, shards or tensors that belong
            nowhere, or a tokenizer with more tokens than the model knows.
        UnsupportedModel: a family that ProxyMoE does not handle.
    """

    def __init__(
        self, folder: Path, cache: Path | None = None, progress: Progress = lambda *_: None
    ) -> None:
        self.folder = folder
        self.config = read_config(folder)
        if getattr(self.config, "quantization_config", None) is not None:
            raise UnsupportedModel(
                f"{folder}: the weights are quantised ({self.config.model_type}); "
                "store them in bf16 first, plans and merges need the numbers themselves"
            )
        self.checkpoint = Checkpoint(folder)
        self.skeleton = meta_model(self.config)
        self.layers = {layer.position: layer for layer in moe_layers(self.skeleton)}
        for layer in self.layers.values():
            if layer.num_routed != layer.num_experts:
                raise UnsupportedModel(
                    f"{layer.name}: the router chooses among {layer.num_routed}, and there are "
                    f"{layer.num_experts} experts; supported is a router with a row per expert"
                )
        output_head(self.skeleton)  # refuses one that losses cannot be computed with
        require_vocabulary(folder, num_embeddings(self.skeleton))
        settings = json.loads(json.dumps(self.config.to_dict()))
        # Who wrote the file does not change what the model computes.
        for incidental in ("transformers_version", "_name_or_path"):
            settings.pop(incidental, None)
        roles = Roles(self.skeleton, self.config, list(self.layers.values()))
        self.pieces = index(self.checkpoint, roles, settings, cache, progress)
        # Sorted, so that it does not matter how the checkpoint is cut into shards.
        entries = [[p.target, p.expert or 0, p.part, p.digest] for p in self.pieces]
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
    def sizes(self) -> Sizes:
        """What the memory of tuning follows from."""
        return sizes_of(self.skeleton)

    @cached_property
    def expert_bytes(self) -> dict[int, int]:
        """Bytes of one expert, by decoder layer."""
        return self.held_expert_bytes(Precision.BF16)

    def held_expert_bytes(self, experts: Precision) -> dict[int, int]:
        """Bytes of one expert as a device holds it, by decoder layer."""
        sizes = dict.fromkeys(self.layers, 0)
        for layer, piece in self._first_experts:
            sizes[layer] += held_bytes(piece, experts)
        return sizes

    def expert(self, at: int, expert: int) -> dict[str, Tensor]:
        """One expert's fused parameters as they are stored: {"gate_up_proj": …, "down_proj": …}."""
        parts: dict[str, list[Tensor]] = {}
        for piece in self._expert_pieces[at, expert]:
            tensor = tensor_from(self.read_piece(piece), piece.dtype, piece.shape)
            parts.setdefault(piece.target.rpartition(".")[2], []).append(tensor)
        return {name: torch.cat(tensors) for name, tensors in parts.items()}

    @cached_property
    def _expert_pieces(self) -> dict[tuple[int, int], list[Piece]]:
        """By layer and expert, gate before up."""
        found: dict[tuple[int, int], list[Piece]] = {}
        for piece in sorted(self.pieces, key=lambda p: p.part == "up"):
            if piece.expert is not None and piece.layer is not None:
                found.setdefault((piece.layer, piece.expert), []).append(piece)
        return found

    @cached_property
    def _first_experts(self) -> list[tuple[int, Piece]]:
        return [(p.layer, p) for p in self.pieces if p.expert == 0 and p.layer is not None]

    def keep_all(self, experts: Precision = Precision.BF16) -> Plan:
        """The plan of the full model."""
        return keep_all(self.digest, self.num_experts, experts)

    def manifest(self, plan: Plan) -> Manifest:
        """The listing of the proxy submodel with this plan; PlanError if it is for another base."""
        plan.require_base(self.digest)
        planned = {position: layer.num_experts for position, layer in plan.layers.items()}
        if planned != self.num_experts:
            raise PlanError(
                f"plan {plan.digest[:12]} is for experts per layer {planned}, the base model has "
                f"{self.num_experts}; make a new plan for this base model"
            )
        config = json.loads(json.dumps(self.config.to_dict()))  # as it will be read back
        if not plan.is_base:
            config["proxy_moe"] = {
                "version": 1,
                "base": self.digest,
                "plan": plan.digest,
                "router": plan.router.value,
                "experts": plan.experts.value,
                "layers": {str(at): len(layer.kept) for at, layer in plan.layers.items()},
            }
        pieces = self.pieces_of(plan)
        return Manifest(plan=plan, config=config, pieces=pieces, companions=self._companions)

    def pieces_of(self, plan: Plan) -> tuple[Piece, ...]:
        """The pieces of trunk and kept experts."""
        kept = {position: frozenset(layer.kept) for position, layer in plan.layers.items()}
        return tuple(
            piece
            for piece in self.pieces
            if piece.expert is None
            or (piece.layer is not None and piece.expert in kept[piece.layer])
        )

    @cached_property
    def _companions(self) -> dict[str, str]:
        return {
            name: digest_of((self.folder / name).read_bytes())
            for name in COMPANIONS
            if (self.folder / name).exists()
        }

    def materialise(self, plan: Plan, folder: Path) -> Path:
        """Writes the submodel of a plan for a local device, or the full model; see `manifest`.

        Digests were taken from these very files, and a file that was written to since is refused:
        they are not taken again.
        """
        return materialise(
            self.manifest(plan),
            folder,
            self.read_piece,
            self.read_companion,
            lambda piece: self.checkpoint.span(piece.source, piece.offset, piece.num_bytes),
        )

    def materialised_full(self, cache: Path) -> Path:
        """The folder of the full model in this cache; written if it is not there."""
        folder = cache / f"full-{self.digest[:24]}"
        if not (folder / WEIGHTS).exists():
            self.materialise(self.keep_all(), folder)
        return folder

    def read_piece(self, piece: Piece) -> bytes:
        """The bytes of a piece, straight from the checkpoint."""
        return self.checkpoint.read_bytes(piece.source, piece.offset, piece.num_bytes)

    def read_companion(self, name: str) -> bytes:
        """The bytes of a small file beside the weights."""
        return (self.folder / name).read_bytes()


def num_embeddings(model: PreTrainedModel) -> int:
    """Tokens that a model knows, whether its tokenizer has them or not."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return int(weight.shape[0])


def require_vocabulary(folder: Path, count: int) -> None:
    """Raises CheckpointError if the tokenizer beside a checkpoint has tokens without embedding."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return
    try:
        vocabulary = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path}: no tokenizer ({error})") from error
    largest = max(vocabulary.values(), default=0)
    if largest >= count:
        raise CheckpointError(
            f"{path}: has a token {largest}, the model's embeddings end at {count - 1}; "
            "take the tokenizer that the model was trained with"
        )


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
