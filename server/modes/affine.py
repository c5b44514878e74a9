"""`affine`: an expert left out is imitated by a kept one, f_i ≈ a·f_s + b, chosen for coverage.

Least squares over the tokens routed to i, with weights w = g², gives
    a = Cov_w(f_i, f_s) / Var_w(f_s)    b = mean_w(f_i) − a · mean_w(f_s)
and explains of the energy of i as much as
    C[i, s] = ‖mean_w(f_i)‖² Σw + a · Cov_w(f_i, f_s).
Which experts to keep is facility location: maximise Σ_i max_s∈S C[i, s] under the budget, where
a kept expert explains itself wholly. The sum is submodular, so the lazy greedy algorithm is within
1 − 1/e of the optimum (Nemhauser et al. 1978) for experts of one size. With a = 0 this is `mean`,
and the fit falls back to it where imitation explains hardly more.
"""

import heapq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from proxymoe.common.allocation import Room
from proxymoe.common.plan import Others
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.modes.choice import Choice, Evidence, Mode, table_of_offsets
from proxymoe.server.modes.mean import trust
from proxymoe.server.relations import Relations

LARGEST_SCALE = 1.5
WORTHWHILE = 0.02
"""Share of an expert's energy that imitation must explain beyond the mean, to be used."""


def choose(evidence: Evidence, room: Room) -> Choice:
    """The experts that explain most of all, and how the others are imitated."""
    fits = {at: fit(found, trust(evidence, at)) for at, found in evidence.relations.items()}
    explained = {at: evidence.sensitivity[at] * each.explained for at, each in fits.items()}
    kept = _facilities(explained, room)
    tables: dict[str, Tensor] = {}
    stands_for: dict[int, dict[int, int]] = {}
    for at, each in fits.items():
        stands_for[at] = _imitated(each, kept[at])
        offset, scale = each.mean.clone(), torch.ones(len(each.by_mean))
        for expert, slot in stands_for[at].items():
            scale[expert] = each.scale[expert, slot]
            offset[expert] -= scale[expert] * each.mean_of_others[expert, slot]
        offset *= trust(evidence, at)[:, None]
        offset[kept[at]] = 0.0
        tables |= {f"{at}.offset": offset.to(torch.bfloat16), f"{at}.scale": scale}
    return Choice(kept, Others.AFFINE, stands_for, tables)


def table_bytes(base: BaseCheckpoint) -> int:
    """Bytes of an offset and a scale per expert."""
    return table_of_offsets(base) + sum(4 * layer.num_routed for layer in base.layers.values())


@dataclass(frozen=True, slots=True)
class Fit:
    """How well the experts of one layer imitate each other."""

    explained: np.ndarray
    """(E, E) C[i, s], energy of i that s explains; all of it on the diagonal."""
    by_mean: np.ndarray
    """(E,) energy of i that its mean explains."""
    scale: Tensor
    """(E, E) a."""
    mean: Tensor
    """(E, D) of each expert on its own tokens."""
    mean_of_others: Tensor
    """(E, E, D) of expert s on the tokens of i."""


def fit(found: Relations, trusted: Tensor) -> Fit:
    """The least-squares fit of every pair; scales are shrunk by `trusted` (E,)."""
    mass, energy = _positive(found.mass), found.square.diagonal()
    mean_of_others = found.seen / mass[:, None, None]
    mean = mean_of_others.diagonal(dim1=0, dim2=1).T
    both = found.cross / mass[:, None] - torch.einsum("id,isd->is", mean, mean_of_others)
    spread = found.square / mass[:, None] - mean_of_others.square().sum(-1)
    scale = (both / _positive(spread) * trusted[:, None]).clamp(0.0, LARGEST_SCALE)
    by_mean = mass * mean.square().sum(-1)
    explained = by_mean[:, None] + mass[:, None] * (2 * scale * both - scale.square() * spread)
    explained = explained.clamp_min(0.0).minimum(energy[:, None])
    explained.diagonal().copy_(energy)
    return Fit(explained.double().numpy(), by_mean.double().numpy(), scale, mean, mean_of_others)


def _facilities(explained: dict[int, np.ndarray], room: Room) -> dict[int, list[int]]:
    """Kept experts per layer by lazy greedy, the floor of every layer first."""
    kept: dict[int, list[int]] = {at: [] for at in explained}
    covered = {at: np.zeros(found.shape[0]) for at, found in explained.items()}
    left = room.left

    def gain(at: int, expert: int) -> float:
        return float(np.maximum(explained[at][:, expert] - covered[at], 0).sum()) / room.cost[at]

    def keep(at: int, expert: int) -> None:
        nonlocal left
        kept[at].append(expert)
        covered[at] = np.maximum(covered[at], explained[at][:, expert])
        left -= room.cost[at]

    for at, found in explained.items():
        while len(kept[at]) < min(room.least, found.shape[0]):
            rest = [e for e in range(found.shape[0]) if e not in kept[at]]
            keep(at, max(rest, key=lambda e: (gain(at, e), -e)))
    if room.uniform_only:
        return kept
    heap = [
        (-gain(at, e), at, e)
        for at, found in explained.items()
        for e in range(found.shape[0])
        if e not in kept[at]
    ]
    heapq.heapify(heap)
    while heap:
        promised, at, expert = heapq.heappop(heap)
        if room.cost[at] > left:
            continue
        if (now := -gain(at, expert)) > promised + 1e-12:  # others were kept since
            heapq.heappush(heap, (now, at, expert))
        else:
            keep(at, expert)
    return kept


def _imitated(found: Fit, kept: list[int]) -> dict[int, int]:
    """{expert: the kept one that imitates it}, where that explains more than the mean does."""
    imitated = {}
    for expert in sorted(set(range(len(found.by_mean))) - set(kept)):
        slot = max(kept, key=lambda s: (found.explained[expert, s], -s))
        more = found.explained[expert, slot] - found.by_mean[expert]
        if more > WORTHWHILE * found.explained[expert, expert]:
            imitated[expert] = slot
    return imitated


def _positive(tensor: Tensor) -> Tensor:
    return tensor.clamp_min(torch.finfo(torch.float32).tiny)


MODE = Mode(choose, table_bytes, relations=True)
