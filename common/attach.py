"""Hangs a linear adapter on a live model, without changing the model.

Linear modules get a forward hook that adds s·x·Aᵀ·Bᵀ; expert modules get the factors through the
experts backend. The model's own weights, names and files stay as they are, and many adapters can
take turns on one model by binding another vector.
"""

from functools import partial
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from proxymoe.common.adapter import SCALE, AdapterLayout, Block, frozen_factor
from proxymoe.common.errors import LayoutMismatch
from proxymoe.common.experts import ExpertAdapter, expert_state
from proxymoe.common.moe import moe_layers


class AttachedAdapter:
    """An adapter's place on one model; used as a context manager it leaves no trace.

    Args:
        model: a loaded full model or proxy submodel with our experts backend.
        layout: the blocks that this model holds (`AdapterLayout.held_under` its plan).
    """

    def __init__(self, model: nn.Module, layout: AdapterLayout) -> None:
        self.layout = layout
        self._dtype = next(model.parameters()).dtype
        self._experts = {f"{layer.name}.experts": layer.experts for layer in moe_layers(model)}
        # The scale rides on the frozen factor: one multiplication less per call and per backward.
        self._frozen = {
            block.module: (SCALE * frozen_factor(block, layout.rank, layout.seed)).to(self._dtype)
            for block in {block.module: block for block in layout.blocks}.values()
        }
        self._bound: dict[str, tuple[Block, Tensor]] = {}
        modules = dict(model.named_modules())
        linears = [block.module for block in layout.blocks if block.expert is None]
        experts = {b.module.rpartition(".")[0] for b in layout.blocks if b.expert is not None}
        if missing := [*set(linears) - set(modules), *experts - set(self._experts)]:
            raise LayoutMismatch(f"the model has no module {min(missing)}")
        self._stacks = self._stacked_experts()
        self._handles: list[RemovableHandle] = [
            modules[path].register_forward_hook(partial(self._add_delta, path)) for path in linears
        ]

    def bind(self, vector: Tensor) -> None:
        """Makes the model compute with this adapter vector (P,); gradients flow back to it."""
        flat = vector.to(self._dtype)
        parts = self.layout.trained_factors(flat)
        self._bound = {
            block.module: (block, part)
            for block, part in zip(self.layout.blocks, parts, strict=True)
            if block.expert is None
        }
        for path, experts in self._experts.items():
            up, down = f"{path}.gate_up_proj", f"{path}.down_proj"
            if up in self._stacks:
                expert_state(experts).adapter = ExpertAdapter(
                    gate_up_in=self._frozen[up],
                    gate_up_out=self._stack(flat, up),
                    down_in=self._stack(flat, down),
                    down_out=self._frozen[down],
                )

    def remove(self) -> None:
        """Takes the adapter off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._bound.clear()
        for path, experts in self._experts.items():
            if f"{path}.gate_up_proj" in self._stacks:
                expert_state(experts).adapter = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _add_delta(self, path: str, _: nn.Module, args: Any, output: Tensor) -> Tensor:
        bound = self._bound.get(path)
        if bound is None:
            return output
        block, trained = bound
        frozen = self._frozen[path]
        a, b = (trained, frozen) if block.trains == "A" else (frozen, trained)
        return output + F.linear(F.linear(args[0], a), b)

    def _stacked_experts(self) -> dict[str, tuple[int, int, tuple[int, int, int]]]:
        """{fused parameter: (start, stop, shape of the stack)} of each run of expert blocks."""
        runs: dict[str, list[int]] = {}
        for i, block in enumerate(self.layout.blocks):
            if block.expert is not None:
                runs.setdefault(block.module, []).append(i)
        stacks = {}
        for module, run in runs.items():
            num_held = self._experts[module.rpartition(".")[0]].down_proj.shape[0]  # type: ignore[index]
            if len(run) != num_held or run != list(range(run[0], run[-1] + 1)):
                raise LayoutMismatch(
                    f"{module}: adapter for {len(run)} experts, model holds {num_held}"
                )
            shape = self.layout.blocks[run[0]].trained_shape(self.layout.rank)
            bounds = self.layout.bounds
            stacks[module] = (bounds[run[0]], bounds[run[-1] + 1], (len(run), *shape))
        return stacks

    def _stack(self, flat: Tensor, module: str) -> Tensor:
        start, stop, shape = self._stacks[module]
        return flat[start:stop].view(shape)
