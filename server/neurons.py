"""Experts as sets of neurons, for merging: what one neuron of an expert is, and who matches whom.

An expert computes D·[σ(G·x) * (U·x)]. Neuron p of its I inner ones is row p of G, row p of U,
column p of D, and its biases; the order of the neurons is nobody's business, so two experts must
be aligned before their weights can be averaged.

Shapes: D hidden size, I inner size, N = 3D numbers per neuron (3D + 2 with biases).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Fused:
    """How a family lays the weights of one expert out."""

    transposed: bool
    """Whether matrices are stored as (in, out)."""
    concatenated: bool
    """Whether gate and up lie one after the other, and not row by row in turns."""


@dataclass(frozen=True, slots=True)
class Neurons:
    """One expert, neuron by neuron, in fp32."""

    rows: Tensor
    """(I, N)."""
    output_bias: Tensor | None
    """(D,) added to the expert's output, where the family has biases."""

    def reordered(self, order: Tensor) -> "Neurons":
        """The same function with neuron `order[p]` in place p."""
        return Neurons(self.rows[order], self.output_bias)


def read_neurons(weights: dict[str, Tensor], fused: Fused) -> Neurons:
    """The neurons of one expert from its fused parameters.

    Args:
        weights: `gate_up_proj` (2I, D) and `down_proj` (D, I), or both transposed, and
            `gate_up_proj_bias` (2I,) and `down_proj_bias` (D,) where there are biases.
        fused: how they are laid out.
    """
    gate_up, down = weights["gate_up_proj"].float(), weights["down_proj"].float()
    if fused.transposed:
        gate_up, down = gate_up.T, down.T
    parts = [*_halves(gate_up, fused), down.T]
    if (bias := weights.get("gate_up_proj_bias")) is not None:
        parts += [half[:, None] for half in _halves(bias.float(), fused)]
    output_bias = weights.get("down_proj_bias")
    return Neurons(torch.cat(parts, 1), None if output_bias is None else output_bias.float())


def write_neurons(neurons: Neurons, fused: Fused, dtype: torch.dtype) -> dict[str, Tensor]:
    """The fused parameters of these neurons: what `read_neurons` takes apart."""
    hidden = neurons.rows.shape[1] // 3
    gate, up, down = neurons.rows[:, : 3 * hidden].split(hidden, dim=1)
    gate_up, down = _joined(gate, up, fused), down.T
    if fused.transposed:
        gate_up, down = gate_up.T, down.T
    weights = {"gate_up_proj": gate_up, "down_proj": down}
    if neurons.output_bias is not None:
        gate_bias, up_bias = neurons.rows[:, 3 * hidden :].T
        weights["gate_up_proj_bias"] = _joined(gate_bias, up_bias, fused)
        weights["down_proj_bias"] = neurons.output_bias
    return {name: weight.to(dtype).contiguous() for name, weight in weights.items()}


def aligned(reference: Neurons, member: Neurons) -> Tensor:
    """(I,) the order of the member's neurons that is nearest to the reference's.

    It minimises Σ_p ½‖reference_p − member_order[p]‖² exactly (Hungarian method), which is the cost
    of LiteMoE's alignment and, since norms do not depend on the order, the one of M-SMoE, which
    maximises Σ_p ⟨reference_p, member_order[p]⟩.
    """
    gain = reference.rows.double() @ member.rows.double().T
    _, order = linear_sum_assignment(gain.numpy(), maximize=True)
    return torch.from_numpy(np.asarray(order, dtype=np.int64))


def averaged(members: Sequence[Neurons], weights: Sequence[float]) -> Neurons:
    """Their weighted mean, neuron by neuron; the weights are scaled to a sum of one.

    Weights that are all zero count as equal.
    """
    share = torch.tensor(weights, dtype=torch.float32)
    share = share / share.sum() if share.sum() > 0 else torch.full_like(share, 1 / len(members))
    rows = torch.stack([m.rows for m in members])
    biases = [m.output_bias for m in members if m.output_bias is not None]
    bias = torch.einsum("m,md->d", share, torch.stack(biases)) if biases else None
    return Neurons(torch.einsum("m,mpn->pn", share, rows), bias)


def _halves(gate_up: Tensor, fused: Fused) -> tuple[Tensor, Tensor]:
    if fused.concatenated:
        gate, up = gate_up.chunk(2, dim=0)
        return gate, up
    return gate_up[0::2], gate_up[1::2]


def _joined(gate: Tensor, up: Tensor, fused: Fused) -> Tensor:
    if fused.concatenated:
        return torch.cat([gate, up])
    return torch.stack([gate, up], dim=1).flatten(0, 1)
