"""Loads a materialised model, full or proxy, mapped from disk and ready for adapters.

A proxy submodel is the stock model class with fewer experts: a dynamic subclass resizes the MoE
blocks right after construction, and transformers' own loading does the rest. The weights stay
mapped file pages, so many virtual devices on one machine share them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from proxymoe.common.attention import install_attention
from proxymoe.common.checkpoint import Checkpoint, read_tensors
from proxymoe.common.errors import CheckpointError
from proxymoe.common.experts import Redirect, expert_state, install_backend
from proxymoe.common.manifest import read_config
from proxymoe.common.moe import keep_experts, moe_layers, slice_router
from proxymoe.common.norm import install_norms
from proxymoe.common.plan import LayerPlan, Others, Plan, Precision, RouterMode, read_plan
from proxymoe.common.quantised import hold_quantised
from proxymoe.common.summed_router import install_summed_router

TABLES_FILE = "tables.safetensors"
"""What goes with a plan beside its weights: `<layer>.offset` (E, D) and `<layer>.scale` (E,) of
experts that are imitated; where experts were merged, `<layer>.<parameter>` of the slots, and
`<layer>.neurons` (E, I), which neuron of an expert went into which neuron of its slot."""
NEURONS = "neurons"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with our experts backend, frozen, in evaluation mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: Plan

    @property
    def max_positions(self) -> int:
        """Tokens of context that the model was made for."""
        return int(self.model.config.max_position_embeddings)


def load(folder: Path, dtype: torch.dtype | None = None) -> LoadedModel:
    """The model in a folder made by `manifest.materialise`.

    Args:
        folder: holds config, plan, fused weights and tokenizer.
        dtype: None keeps the stored type and maps the file; another type copies.

    Raises:
        CheckpointError: a file is missing or truncated, or plan and weights do not match.
    """
    transformers_logging.disable_progress_bar()
    config, plan = read_config(folder), read_plan(folder)
    Checkpoint(folder)  # reads the headers only, and refuses what is not whole
    stock = AutoModelForCausalLM._model_mapping[type(config)]
    model = _proxy_class(stock).from_pretrained(
        folder,
        config=config,
        dtype=dtype or config.dtype or torch.float32,
        attn_implementation="eager",
        local_files_only=True,
    )
    install(model)
    _install_plan(model, plan, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return LoadedModel(model, tokenizer, plan)


def install(model: PreTrainedModel) -> None:
    """Freezes a model and gives it our experts, norms and attention."""
    model.requires_grad_(False).eval()
    install_backend(model)
    install_norms(model)
    install_attention(model)


def compute_dtype(wanted: str) -> torch.dtype:
    """The type that `auto`, `bfloat16` or `float32` means on this machine.

    `auto` is bf16 where the CPU multiplies it natively, else fp32.
    """
    if wanted != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[wanted]
    capabilities = torch.cpu.get_capabilities()
    native = any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def redirects(plan: Plan, folder: Path) -> dict[int, Redirect]:
    """What routed ids mean on this plan's submodel, by layer; empty where all ids are slots.

    Args:
        plan: of the submodel.
        folder: of the materialised submodel; it holds the tables if there are any.
    """
    if plan.keeps_all or plan.router is not RouterMode.FULL:
        return {}
    imitated = plan.others in (Others.MEAN, Others.AFFINE)
    tables = read_tensors(folder / TABLES_FILE) if imitated else {}
    return {
        at: Redirect(
            slot=torch.tensor(planned.slots()),
            offset=tables.get(f"{at}.offset"),
            scale=tables.get(f"{at}.scale"),
            native=_native(planned) if plan.others is Others.AFFINE else None,
        )
        for at, planned in plan.layers.items()
    }


def merged_experts(plan: Plan, folder: Path) -> dict[int, dict[str, Tensor]]:
    """{layer: {expert parameter: its slots}} of a plan that merges experts; empty for others."""
    found: dict[int, dict[str, Tensor]] = {}
    if plan.others is not Others.MERGE or plan.keeps_all:
        return found
    for name, tensor in read_tensors(folder / TABLES_FILE).items():
        at, _, parameter = name.partition(".")
        if parameter != NEURONS:
            found.setdefault(int(at), {})[parameter] = tensor
    return found


def _native(planned: LayerPlan) -> Tensor:
    kept = torch.zeros(planned.num_experts, dtype=torch.bool)
    kept[list(planned.kept)] = True
    return kept


def _install_plan(model: nn.Module, plan: Plan, folder: Path) -> None:
    if plan.keeps_all:
        return
    found, merged = redirects(plan, folder), merged_experts(plan, folder)
    for layer in moe_layers(model):
        planned = plan.layers[layer.position]
        if layer.num_experts != len(planned.kept):
            raise CheckpointError(
                f"{folder}: {layer.num_experts} experts in layer {layer.position}, "
                f"the plan keeps {len(planned.kept)}"
            )
        expert_state(layer.experts).redirect = found.get(layer.position)
        for name, slots in merged.get(layer.position, {}).items():
            weight = slots.to(layer.experts.get_parameter(name).dtype)
            layer.experts.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        if plan.router is RouterMode.SUMMED:
            install_summed_router(layer, torch.tensor(planned.slots()))


class _ProxyMixin:
    """Resizes MoE blocks to what `config.proxy_moe` says, before any weight is loaded."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        cut = getattr(config, "proxy_moe", None)
        if not cut:
            return
        assert isinstance(self, nn.Module)
        for layer in moe_layers(self):
            num_kept = cut["layers"][str(layer.position)]
            if cut["router"] == RouterMode.SLICED.value:
                slice_router(layer, num_kept)
            keep_experts(layer, num_kept)
            if (precision := Precision(cut.get("experts", Precision.BF16))) is not Precision.BF16:
                hold_quantised(layer.experts, precision)


_proxy_classes: dict[Any, Any] = {}


def _proxy_class(stock: Any) -> Any:
    """The stock class with the mixin.

    Its module stays the stock one, so that transformers' checkpoint conversions and experts
    backends treat it as the family it is.
    """
    if stock not in _proxy_classes:
        body = {"__module__": stock.__module__, "__doc__": stock.__doc__}
        _proxy_classes[stock] = type(f"Proxy{stock.__name__}", (_ProxyMixin, stock), body)
    return _proxy_classes[stock]
