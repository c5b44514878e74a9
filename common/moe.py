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

ROUTER_NAMES = ("gate", "router")
SHARED_EXPERT_NAMES = ("shared_expert", "shared_experts", "shared_mlp")
ATTENTION_NAMES = ("self_attn", "attention", "attn", "linear_attn")
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "down_proj", "wo", "w2", "output_linear")
"""Leaf names of the projections that write into the residual stream."""


@dataclass(frozen=True, slots=True)
class MoELayer:
    """A live view of one MoE block; it works on meta models too and holds no tensor itself."""

    name: str
    """Full module path of the block, such as `model.layers.3.mlp`."""
    position: int
    """Index of the decoder layer in the model: the first number in the path."""
    block: nn.Module
    router_name: str

    @property
    def router(self) -> nn.Module:
        """The router module; its tensors indexed by expert are `router_tensors`."""
        return self.block.get_submodule(self.router_name)

    @property
    def experts(self) -> nn.Module:
        """The experts module with `gate_up_proj` (E, 2I, D) and `down_proj` (E, D, I)."""
        return self.block.get_submodule("experts")

    @property
    def num_experts(self) -> int:
        """Experts held by the block at this moment: all of them, or those a plan kept."""
        return int(_parameter(self.experts, "down_proj").shape[0])

    @property
    def num_routed(self) -> int:
        """E, the experts that the router chooses among."""
        return int(_parameter(self.router, "weight").shape[0])

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
        return int(_parameter(self.experts, "down_proj").shape[1])

    @property
    def inner_size(self) -> int:
        """I."""
        return int(_parameter(self.experts, "down_proj").shape[2])

    def router_tensors(self) -> dict[str, int]:
        """{name relative to the block: dimension indexed by expert} of every router tensor."""
        found: dict[str, int] = {}
        for prefix, module in ((f"{self.router_name}.", self.router), ("", self.block)):
            recurse = bool(prefix)
            tensors = [
                *module.named_parameters(recurse=recurse),
                *module.named_buffers(recurse=recurse),
            ]
            for name, tensor in tensors:
                if self.num_routed in tensor.shape:
                    found[prefix + name] = tensor.shape.index(self.num_routed)
        return found

    def shared_expert_linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """(full module path, module) of every linear of the shared expert, if there is one."""
        for child, module in self.block.named_children():
            if child in SHARED_EXPERT_NAMES:
                yield from _linears(f"{self.name}.{child}", module)


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
        layer = MoELayer(name, int(number.group(1)), block, router)
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
    """(full module path, module) of every linear in the model's attention modules."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ATTENTION_NAMES:
            yield from _linears(name, module)


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
        UnsupportedModel: one row left for a group-limited router, which ranks groups by two.
    """
    num_routed, top_k = layer.num_routed, min(layer.top_k, num_kept)
    if num_kept < 2 and any(hasattr(m, "topk_group") for m in (layer.router, layer.block)):
        raise UnsupportedModel(
            f"{layer.name}: a sliced group-limited router needs at least 2 kept experts, "
            f"got {num_kept}; keep more, or set router = 'full'"
        )
    for name, dim in layer.router_tensors().items():
        path, _, leaf = name.rpartition(".")
        owner = layer.block.get_submodule(path)
        old = getattr(owner, leaf)
        new = old.new_empty([num_kept if i == dim else n for i, n in enumerate(old.shape)])
        if leaf in owner._parameters:
            owner.register_parameter(leaf, nn.Parameter(new, requires_grad=False))
        else:
            owner.register_buffer(leaf, new)
    for module in (layer.router, layer.block):
        for attribute in ("num_experts", "n_routed_experts", "num_local_experts", "out_features"):
            if getattr(module, attribute, None) == num_routed:
                setattr(module, attribute, num_kept)
        for attribute in ("num_group", "n_group", "topk_group"):
            if isinstance(getattr(module, attribute, None), int):
                setattr(module, attribute, 1)
        if isinstance(getattr(module, "top_k", None), int):
            module.top_k = top_k  # type: ignore[assignment]


def _assert_supported(layer: MoELayer) -> None:
    experts, router = layer.experts, layer.router
    parameters = dict(experts.named_parameters(recurse=False))
    if set(parameters) != {"gate_up_proj", "down_proj"}:
        raise UnsupportedModel(
            f"{layer.name}: experts hold {sorted(parameters)}; "
            "supported are gated experts fused as gate_up_proj and down_proj without biases"
        )
    gate_up, down = parameters["gate_up_proj"], parameters["down_proj"]
    expected = (down.shape[0], 2 * down.shape[2], down.shape[1])
    if down.ndim != 3 or tuple(gate_up.shape) != expected:
        raise UnsupportedModel(
            f"{layer.name}: gate_up_proj {tuple(gate_up.shape)} does not match "
            f"down_proj {tuple(down.shape)}; expected (E, 2I, D) and (E, D, I)"
        )
    for flag, wanted in (("is_transposed", False), ("is_concatenated", True)):
        if getattr(experts, flag, wanted) is not wanted:
            raise UnsupportedModel(f"{layer.name}: experts with {flag}={not wanted}")
    weight = getattr(router, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        raise UnsupportedModel(f"{layer.name}: router {type(router).__name__} has no (E, D) weight")
    if not hasattr(experts, "act_fn"):
        raise UnsupportedModel(f"{layer.name}: experts without an activation function act_fn")


def _parameter(module: nn.Module, name: str) -> torch.Tensor:
    tensor = getattr(module, name)
    if not isinstance(tensor, torch.Tensor):
        raise UnsupportedModel(f"{type(module).__name__}.{name} is no tensor")
    return tensor


def _linears(prefix: str, root: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in root.named_modules():
        if isinstance(module, nn.Linear):
            yield f"{prefix}.{name}", module
