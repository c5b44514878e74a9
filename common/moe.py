"""What a mixture-of-experts layer is, for every family that ProxyMoE handles.

transformers 5 gives nearly every MoE family the same shape: a block with a router child that
returns (logits, weights, index), and an experts child that holds all experts in fused 3-D
parameters. This file finds those blocks by structure, asserts what it found, and refuses what
does not fit, by name; there is no table of families.

Shapes: T tokens, E experts, K = top-k, D hidden size, I expert inner size.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from proxymoe.common.errors import UnsupportedModel
from proxymoe.common.quantised import QuantisedWeight

ROUTER_NAMES = ("gate", "router")
SHARED_EXPERT_NAMES = ("shared_expert", "shared_experts", "shared_mlp")
ATTENTION_NAMES = ("self_attn", "attention", "attn", "linear_attn")
STATE_MIXER_NAMES = ("conv", "mamba")
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "down_proj", "wo", "w2", "output_linear")
"""Leaf names of the projections that write into the residual stream."""
NEEDS_TWO = {"group-limited": "topk_group", "sparse-mixer": "router_jitter_noise"}
"""Routers that break with one row, by an attribute that tells them: one ranks groups by their two
best experts, the other picks two whatever top-k says."""
LAYOUT_FLAGS = {"has_gate": True, "has_post_expert_norm": False}
"""What transformers' decorator says of an experts class that we can compute."""


@dataclass(frozen=True, slots=True)
class MoELayer:
    """A live view of one MoE block; it works on meta models too and holds no tensor itself."""

    name: str
    """Full module path of the block, such as `model.layers.3.mlp`."""
    position: int
    """Index of the decoder layer in the model: the first number in the path."""
    block: nn.Module
    router_name: str
    decoder_layer: nn.Module
    """What the block is a child of; some families keep the shared expert there, beside it."""

    @property
    def router(self) -> nn.Module:
        """The router module; its tensors indexed by expert are `router_tensors`."""
        return self.block.get_submodule(self.router_name)

    @property
    def experts(self) -> nn.Module:
        """The experts module with `gate_up_proj` (E, 2I, D) and `down_proj` (E, D, I)."""
        return self.block.get_submodule("experts")

    @property
    def transposed(self) -> bool:
        """Whether the fused weights are stored as (E, in, out) instead of (E, out, in)."""
        return bool(getattr(self.experts, "is_transposed", False))

    @property
    def num_experts(self) -> int:
        """Experts held by the block at this moment: all of them, or those a plan kept."""
        return self._down_shape[0]

    @property
    def num_routed(self) -> int:
        """E, the experts that the router chooses among."""
        return int(self._router_weight()[1].shape[0])

    @property
    def top_k(self) -> int:
        """K, the experts that one token is sent to."""
        for owner in (self.router, self.block):
            value = getattr(owner, "top_k", None)
            if isinstance(value, int):
                return value
        raise UnsupportedModel(f"{self.name}: neither router nor block has an integer top_k")

    @property
    def hidden_size(self) -> int:
        """D."""
        return self._down_shape[2 if self.transposed else 1]

    @property
    def inner_size(self) -> int:
        """I."""
        return self._down_shape[1 if self.transposed else 2]

    @property
    def _down_shape(self) -> tuple[int, ...]:
        return _tensor_shapes(self.experts)["down_proj"]

    def router_tensors(self) -> dict[str, int]:
        """{name relative to the block: dimension indexed by expert} of every router tensor.

        That is the weight, and what else has one number per expert: a bias, wherever it hangs.
        """
        weight = f"{self.router_name}.{self._router_weight()[0]}"
        found = {weight: 0}
        for prefix, module in ((f"{self.router_name}.", self.router), ("", self.block)):
            recurse = bool(prefix)
            tensors = [
                *module.named_parameters(recurse=recurse),
                *module.named_buffers(recurse=recurse),
            ]
            for name, tensor in tensors:
                if tensor.numel() == self.num_routed and self.num_routed in tensor.shape:
                    found[prefix + name] = tensor.shape.index(self.num_routed)
        return found

    def shared_expert_linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """(full module path, module) of every linear of the shared expert, if there is one."""
        beside = self.name.rpartition(".")[0]
        for path, owner in ((self.name, self.block), (beside, self.decoder_layer)):
            for child, module in owner.named_children():
                if child in SHARED_EXPERT_NAMES:
                    yield from _linears(f"{path}.{child}", module)

    def _router_weight(self) -> tuple[str, torch.Tensor]:
        """(name relative to the router, tensor) of the one weight (E, D) that scores experts."""
        found = [
            (name, tensor)
            for name, tensor in self.router.named_parameters()
            if name.rpartition(".")[2] == "weight" and tensor.shape[1:] == (self.hidden_size,)
        ]
        if len(found) != 1:
            raise UnsupportedModel(
                f"{self.name}: router {type(self.router).__name__} has no (E, D) weight, or several"
            )
        return found[0]


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The model's MoE layers in order of depth.

    Raises:
        UnsupportedModel: there is none, or one has a layout that cannot be cut into experts.
    """
    found = []
    for name, block in model.named_modules():
        children = dict(block.named_children())
        router = next((child for child in ROUTER_NAMES if child in children), None)
        if router is None or "experts" not in children:
            continue
        number = re.search(r"\.(\d+)\.", f"{name}.")
        if number is None:
            raise UnsupportedModel(f"{name}: no layer number in the path of this MoE block")
        decoder_layer = model.get_submodule(name.rpartition(".")[0])
        layer = MoELayer(name, int(number.group(1)), block, router, decoder_layer)
        _assert_supported(layer)
        found.append(layer)
    if not found:
        raise UnsupportedModel(
            f"{type(model).__name__} has no mixture-of-experts layer with a router and fused "
            "experts; ProxyMoE needs a decoder MoE such as Qwen2-MoE, Mixtral or DeepSeek-V3"
        )
    return found


def last_block(model: nn.Module) -> nn.Module | None:
    """The MoE block that ends the model's last decoder layer; None if that layer is dense."""
    last = moe_layers(model)[-1]
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    return last.block if last.position == count - 1 else None


def attention_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(full module path, module) of every linear that mixes tokens, in attention or its stead.

    Of mixers that carry a state only what goes in and comes out: the rest is not always called.
    """
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in ATTENTION_NAMES:
            yield from _linears(name, module)
        elif leaf in STATE_MIXER_NAMES:
            for path, linear in _linears(name, module):
                if path in (f"{name}.in_proj", f"{name}.out_proj"):
                    yield path, linear


def writes_to_stream(module_path: str) -> bool:
    """Whether this projection's output, not its input, is the residual stream."""
    return module_path.rpartition(".")[2] in OUTPUT_PROJECTIONS


def layer_number(module_path: str) -> int:
    """The decoder layer that a module belongs to."""
    number = re.search(r"\.(\d+)\.", module_path)
    if number is None:
        raise UnsupportedModel(f"{module_path}: no layer number in this module path")
    return int(number.group(1))


def keep_experts(layer: MoELayer, num_kept: int) -> None:
    """Gives the block fresh expert parameters for `num_kept` experts; the router stays whole."""
    for name, old in list(layer.experts.named_parameters(recurse=False)):
        shape = (num_kept, *old.shape[1:])
        new = nn.Parameter(old.new_empty(shape), requires_grad=False)
        layer.experts.register_parameter(name, new)
    layer.experts.num_experts = num_kept  # type: ignore[assignment]


def slice_router(layer: MoELayer, num_kept: int) -> None:
    """Cuts the router down to `num_kept` rows, as most pruning methods do.

    Group-limited routing needs equal groups, which an arbitrary kept set does not have, so the
    groups are merged into one. Top-k is clamped to the rows left.

    Raises:
        UnsupportedModel: one row left for a router that always looks at two.
    """
    num_routed, top_k = layer.num_routed, min(layer.top_k, num_kept)
    _require_sliceable(layer, num_kept)
    owners = {layer.router, layer.block}
    for name, dim in layer.router_tensors().items():
        path, _, leaf = name.rpartition(".")
        owner = layer.block.get_submodule(path)
        owners.add(owner)
        old = getattr(owner, leaf)
        new = old.new_empty([num_kept if i == dim else n for i, n in enumerate(old.shape)])
        if leaf in owner._parameters:
            owner.register_parameter(leaf, nn.Parameter(new, requires_grad=False))
        else:
            owner.register_buffer(leaf, new)
    for module in owners:
        for attribute in ("num_experts", "n_routed_experts", "num_local_experts", "out_features"):
            if getattr(module, attribute, None) == num_routed:
                setattr(module, attribute, num_kept)
        for attribute in ("num_group", "n_group", "topk_group"):
            if isinstance(getattr(module, attribute, None), int):
                setattr(module, attribute, 1)
        if isinstance(getattr(module, "top_k", None), int):
            module.top_k = top_k  # type: ignore[assignment]


def _require_sliceable(layer: MoELayer, num_kept: int) -> None:
    for kind, attribute in NEEDS_TWO.items():
        if num_kept < 2 and any(hasattr(m, attribute) for m in (layer.router, layer.block)):
            raise UnsupportedModel(
                f"{layer.name}: a sliced {kind} router needs at least 2 kept experts, "
                f"got {num_kept}; keep more, or set router = 'full'"
            )


def _assert_supported(layer: MoELayer) -> None:
    experts = layer.experts
    if mixers := sorted({name for name, _ in layer.block.named_children()} & {*ATTENTION_NAMES}):
        raise UnsupportedModel(
            f"{layer.name}: router and experts are children of the decoder layer itself, beside "
            f"{mixers[0]}; supported are those in a block of their own"
        )
    found = _tensor_shapes(experts)
    weights = {"gate_up_proj", "down_proj"}
    if set(found) not in (weights, weights | {f"{name}_bias" for name in weights}):
        raise UnsupportedModel(
            f"{layer.name}: experts hold {sorted(found)}; supported are gated experts fused "
            "as gate_up_proj and down_proj, with a bias each or without"
        )
    for flag, wanted in LAYOUT_FLAGS.items():
        if getattr(experts, flag, None) is not wanted:
            raise UnsupportedModel(
                f"{layer.name}: experts {type(experts).__name__} with {flag}="
                f"{getattr(experts, flag, 'unknown')}; supported is {wanted}, as transformers' "
                "use_experts_implementation says it"
            )
    shapes = {name: found[name] for name in sorted(weights)}
    if any(len(shape) != 3 for shape in shapes.values()) or shapes != _expert_shapes(layer):
        wanted_shapes = (
            "(E, D, 2I) and (E, I, D)" if layer.transposed else "(E, 2I, D) and (E, D, I)"
        )
        raise UnsupportedModel(
            f"{layer.name}: gate_up_proj {shapes['gate_up_proj']} does not match "
            f"down_proj {shapes['down_proj']}; expected {wanted_shapes}"
        )
    _ = layer.num_routed  # refuses a router without a row per expert


def _expert_shapes(layer: MoELayer) -> dict[str, tuple[int, ...]]:
    """The shapes that the fused weights of this block must have, judged by `down_proj`."""
    held, hidden, inner = layer.num_experts, layer.hidden_size, layer.inner_size
    if layer.transposed:
        return {"down_proj": (held, inner, hidden), "gate_up_proj": (held, hidden, 2 * inner)}
    return {"down_proj": (held, hidden, inner), "gate_up_proj": (held, 2 * inner, hidden)}


def _tensor_shapes(experts: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of an experts module's tensors, quantised or not: what they stand for."""
    held = {n: m for n, m in experts.named_children() if isinstance(m, QuantisedWeight)}
    plain = dict(experts.named_parameters(recurse=False))
    return {name: tuple(map(int, tensor.shape)) for name, tensor in (plain | held).items()}


def _linears(prefix: str, root: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in root.named_modules():
        if isinstance(module, nn.Linear):
            yield f"{prefix}.{name}", module
