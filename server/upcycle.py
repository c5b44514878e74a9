"""★ Makes a mixture-of-experts layer out of a dense one: sparse upcycling.

Two ways to make experts. `copy` (arXiv 2212.05055): every expert is the whole dense MLP; gates sum
to one, so the layer computes what the dense one did, whatever the router says. `split`
(MoEfication, arXiv 2110.01786): the neurons are dealt into E experts of equal size, after those
that matter most for every token have gone into a shared expert (as in CMoE, arXiv 2502.04416).
Of the dense sum over neurons, a token then misses those of the E - K experts it is not sent to.
Gates are kept near 1/K and `down_proj` is multiplied by K, so with K = E nothing is missing.

Three ways to begin a router, the gate modes of mergekit-moe: `random`; `cheap_embed`, the mean
token embeddings of texts, the same in every layer; `hidden`, the hidden states that enter the
layer. Public text says which token goes where by k-means, and neurons follow the tokens that use
them, so experts and router agree from the start.

Healing is two ridge regressions per layer on public text, in closed form and without a learning
rate: the router learns how much each expert would say, and `down_proj` makes up for what is
missing.

Shapes: T tokens, E experts, K top-k, D hidden size, I neurons of the dense MLP, S of them shared.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from proxymoe.server.clusters import balanced_groups, k_means
from proxymoe.server.recipe import Recipe, RouterInit

SPREAD = 0.01
"""Standard deviation of a new router's scores: small, so that gates are even; ranks count."""
SHARED_SCALE = 2.0
"""A shared expert is gated by a sigmoid; with a gate of zeros that is a half."""


@dataclass(frozen=True, slots=True)
class DenseMLP:
    """A gated MLP: down · (act(gate · x) * (up · x))."""

    gate: Tensor
    """(I, D)."""
    up: Tensor
    """(I, D)."""
    down: Tensor
    """(D, I)."""
    act: Callable[[Tensor], Tensor]

    def neurons(self, states: Tensor) -> Tensor:
        """(T, I) what each neuron has to say of the states (T, D)."""
        found: Tensor = self.act(states @ self.gate.T) * (states @ self.up.T)
        return found

    def __call__(self, states: Tensor) -> Tensor:
        """(T, D)."""
        return self.neurons(states) @ self.down.T


@dataclass(frozen=True, slots=True)
class SplitMLP:
    """A dense MLP whose neurons are dealt out: some shared, the others to experts."""

    dense: DenseMLP
    shared: Tensor
    """(S,) neurons that every token uses."""
    experts: Tensor
    """(E, (I - S) / E) the other neurons."""
    router: Tensor
    """(E, D)."""
    top_k: int

    def gates(self, states: Tensor) -> Tensor:
        """(T, E) K times the gate of each expert, 0 where the token is not sent to it."""
        chance = (states @ self.router.T.to(states.dtype)).float().softmax(-1)
        best = chance.topk(self.top_k, dim=-1)
        even = self.top_k * best.values / best.values.sum(-1, keepdim=True)
        return torch.zeros_like(chance).scatter(1, best.indices, even)

    def gated(self, states: Tensor, neurons: Tensor) -> Tensor:
        """(T, I) the dense MLP's neurons (T, I), each times the gate of its expert."""
        share = torch.ones_like(neurons)
        gates = self.gates(states).to(neurons.dtype)
        share[:, self.experts.flatten()] = gates.repeat_interleave(self.experts.shape[1], dim=1)
        return neurons * share

    def __call__(self, states: Tensor, neurons: Tensor) -> Tensor:
        """(T, D) of the states (T, D) and what the dense MLP's neurons (T, I) say of them."""
        return self.gated(states, neurons) @ self.dense.down.T

    def weights(self) -> dict[str, Tensor]:
        """The tensors of the MoE block, named and scaled as the family has them."""
        mlp, experts = self.dense, self.experts
        gate_up = torch.cat([mlp.gate[experts], mlp.up[experts]], dim=1)
        down = mlp.down[:, experts].transpose(0, 1) * self.top_k
        found = {"gate.weight": self.router.to(mlp.down.dtype)}
        found |= {"experts.gate_up_proj": gate_up, "experts.down_proj": down}
        if self.shared.numel():
            found |= {
                "shared_expert.gate_proj.weight": mlp.gate[self.shared],
                "shared_expert.up_proj.weight": mlp.up[self.shared],
                "shared_expert.down_proj.weight": mlp.down[:, self.shared] * SHARED_SCALE,
                "shared_expert_gate.weight": mlp.down.new_zeros(1, mlp.down.shape[0]),
            }
        return {name: tensor.contiguous() for name, tensor in found.items()}


def copied(
    mlp: DenseMLP, router: Tensor, noise: float, rng: np.random.Generator
) -> dict[str, Tensor]:
    """The tensors of a MoE block of E copies of the MLP, each with its own noise, for (E, D) rows.

    Without noise the block computes what the MLP does, whatever the gates, if they sum to one.
    """

    def copies(weight: Tensor) -> Tensor:
        stacked = weight.expand(len(router), *weight.shape)
        if not noise:
            return stacked.contiguous()
        drawn = torch.from_numpy(rng.standard_normal(stacked.shape, dtype=np.float32))
        return (stacked + noise * weight.float().std() * drawn).to(weight.dtype)

    return {
        "gate.weight": router.to(mlp.down.dtype),
        "experts.gate_up_proj": copies(torch.cat([mlp.gate, mlp.up])),
        "experts.down_proj": copies(mlp.down),
    }


def split(
    mlp: DenseMLP, states: Tensor, neurons: Tensor, directions: Tensor, recipe: Recipe
) -> SplitMLP:
    """The MLP with its neurons dealt out by what they say (T, I) of public text.

    A neuron matters by what it writes, |activation| times the norm of its column. Those that
    matter most on average are shared. Each other one goes to the expert whose tokens, by the
    states (T, D) and the router's `directions` (E, D), use it most above its average; all experts
    get as many.
    """
    said = neurons.float().abs() * mlp.down.float().norm(dim=0)
    order = said.square().mean(0).argsort(descending=True, stable=True)
    num_shared = recipe.num_shared(len(order))
    shared, others = order[:num_shared].sort().values, order[num_shared:].sort().values

    owner = F.one_hot((states.float() @ directions.T).argmax(-1), len(directions))
    sent = owner.float()
    by_owner = said[:, others].T @ sent / sent.sum(0).clamp_min(1.0)
    usual = said[:, others].mean(0)[:, None].clamp_min(torch.finfo(torch.float32).tiny)
    experts = others[balanced_groups(by_owner / usual)]
    return SplitMLP(mlp, shared, experts, directions, recipe.top_k)


def directions(
    init: RouterInit, num_experts: int, states: Tensor, embeddings: Tensor, rng: np.random.Generator
) -> Tensor:
    """(E, D) rows of a new router for the states (T, D) that enter it.

    Args:
        init: where they come from.
        num_experts: E.
        states: of public text.
        embeddings: (N, D) mean token embeddings of N texts; `cheap_embed` reads no more.
        rng: draws the rows, or where k-means begins.

    Returns:
        rows without what they share, and such that an average state prefers no expert.
    """
    mean = states.float().mean(0)
    if init is RouterInit.RANDOM:
        rows = torch.from_numpy(rng.standard_normal((num_experts, len(mean)), dtype=np.float32))
    elif init is RouterInit.CHEAP_EMBED:
        rows = k_means(embeddings.float() - embeddings.float().mean(0), num_experts, rng)
    else:
        rows = k_means(states.float() - mean, num_experts, rng)
    unit = F.normalize(mean, dim=0)
    return rows - torch.outer(rows @ unit, unit)


def evened(rows: Tensor, states: Tensor) -> Tensor:
    """The rows (E, D), scaled such that scores of the states (T, D) differ by SPREAD."""
    scores = states.float() @ rows.T
    spread = (scores - scores.mean(-1, keepdim=True)).square().mean().sqrt()
    return rows * (SPREAD / spread.clamp_min(torch.finfo(torch.float32).tiny))


def routed_by_output(layer: SplitMLP, states: Tensor, neurons: Tensor, strength: float) -> SplitMLP:
    """The layer with the router that tells best, linearly, how much each expert would say.

    Its scores are the ridge regression of the norms of the experts' outputs on the states (T, D);
    the neurons (T, I) say the outputs.
    """
    down = layer.dense.down
    norms = [(neurons[:, group] @ down[:, group].T).float().norm(dim=-1) for group in layer.experts]
    said = torch.stack(norms, dim=1)
    rows = ridge(states.float(), said - said.mean(-1, keepdim=True), strength)
    return replace(layer, router=evened(rows, states))


def healed(
    layer: SplitMLP, states: Tensor, neurons: Tensor, wanted: Tensor, strength: float
) -> SplitMLP:
    """The layer with the `down` that comes nearest to the outputs `wanted` (T, D).

    They are wanted of the states (T, D), of which the dense neurons say (T, I). What is missing is
    regressed on what neurons say behind their gates; the change is kept small where the text says
    little.
    """
    said = layer.gated(states, neurons).float()
    down = layer.dense.down
    missing = wanted.float() - said @ down.float().T
    change = ridge(said, missing, strength)
    return replace(layer, dense=replace(layer.dense, down=(down + change).to(down.dtype)))


def ridge(features: Tensor, targets: Tensor, strength: float) -> Tensor:
    """(N, F) the weights that predict targets (T, N) from features (T, F), by ridge regression.

    The penalty is `strength` times the mean square of a feature, per token.
    """
    square = features.T @ features
    penalty = strength * square.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    square.diagonal().add_(penalty)
    return torch.cholesky_solve(features.T @ targets, torch.linalg.cholesky(square)).T
