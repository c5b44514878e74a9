"""The sizes that memory follows from, read off a model's structure; meta models will do."""

import math
import re
from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from proxymoe.common.adapter import AdapterLayout, Block
from proxymoe.common.budget import Held, LayerSizes, Sizes
from proxymoe.common.manifest import Piece, held_bytes
from proxymoe.common.moe import MoELayer, attention_linears, moe_layers, writes_to_stream
from proxymoe.common.plan import Plan, Precision


def sizes_of(model: PreTrainedModel) -> Sizes:
    """The sizes of a full base model."""
    config = model.config.get_text_config()
    layers, num_layers = moe_layers(model), int(config.num_hidden_layers)
    return Sizes(
        hidden=layers[0].hidden_size,
        vocabulary=int(config.vocab_size),
        num_layers=num_layers,
        heads=num_layers * int(config.num_attention_heads),
        trunk=2 * num_layers * layers[0].hidden_size
        + _mixers_keep(model)
        + _dense_layers_keep(model, layers)
        + sum(_shared_keeps(layer) for layer in layers),
        layers={
            layer.position: LayerSizes(layer.num_routed, layer.top_k, layer.inner_size)
            for layer in layers
        },
    )


def held_under(
    pieces: Sequence[Piece],
    plan: Plan,
    sizes: Sizes,
    layout: AdapterLayout,
    picks: Mapping[int, float],
    width: int,
) -> Held:
    """What a device holds under a plan.

    Args:
        pieces: of the submodel.
        plan: says which experts are kept, and how they are held.
        sizes: of the base model.
        layout: of the adapter on this submodel.
        picks: kept experts that a token is sent to, by number of the decoder layer.
        width: bytes of a number while computing; weights are widened to it, codes are not.
    """
    rank = layout.rank
    is_narrow = plan.experts is not Precision.BF16
    trunk = [piece for piece in pieces if piece.expert is None]
    experts = [piece for piece in pieces if piece.expert is not None]
    linears = [block for block in layout.blocks if block.expert is None]
    in_experts = {b.module: b for b in layout.blocks if b.expert is not None}.values()
    modules = {block.module: block for block in layout.blocks}.values()
    return Held(
        trunk_bytes=width * sum(math.prod(piece.shape) for piece in trunk),
        expert_bytes=sum(
            held_bytes(piece, plan.experts) if is_narrow else width * math.prod(piece.shape)
            for piece in experts
        ),
        kept={at: len(layer.kept) for at, layer in plan.layers.items()},
        picks=dict(picks),
        trained=layout.size,
        frozen=sum(rank * _frozen_side(block) for block in modules),
        adapted=sum(_adapter_keeps(block, rank) for block in linears)
        + sum(picks[block.layer] * _adapter_keeps(block, rank) for block in in_experts),
        widest=max(2 * sizes.hidden * layer.inner for layer in sizes.layers.values())
        if is_narrow
        else 0,
    )


def _mixers_keep(model: PreTrainedModel) -> int:
    """Numbers per token: queries, keys and values, and once more each where it is normed."""
    modules, numbers = dict(model.named_modules()), 0
    for name, linear in attention_linears(model):
        if not writes_to_stream(name):
            norm = modules.get(name.removesuffix("proj") + "norm")
            numbers += linear.out_features * (1 if norm is None else 2)
    return numbers


def _dense_layers_keep(model: PreTrainedModel, layers: list[MoELayer]) -> int:
    """Numbers per token of the MLPs of layers without experts: gate, SiLU(gate), up."""
    mixers, routed = dict(attention_linears(model)), {layer.position for layer in layers}
    inner = [
        module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in mixers and not writes_to_stream(name)
        if (number := re.search(r"\.(\d+)\.", name)) and int(number.group(1)) not in routed
    ]
    return 3 * sum(inner) // 2


def _shared_keeps(layer: MoELayer) -> int:
    """Numbers per token: gate, SiLU(gate) and up, and the output where that has a gate, too."""
    shared = layer.shared_expert_linears()
    inner = sum(linear.out_features for name, linear in shared if not writes_to_stream(name))
    is_gated = hasattr(layer.block, "shared_expert_gate")
    return 3 * inner // 2 + (layer.hidden_size if is_gated else 0)


def _frozen_side(block: Block) -> int:
    return block.in_features if block.trains == "B" else block.out_features


def _adapter_keeps(block: Block, rank: int) -> int:
    """Numbers per token: the slope of A needs the input, that of B the low-rank state."""
    return block.in_features if block.trains == "A" else rank
