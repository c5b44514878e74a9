"""Merges experts into slots, and brings adapters of merged slots home to their members.

A slot is the weighted mean of its members after their neurons were put in the order of the kept
expert's: neuron p of the slot is Σ_i w_i · (neuron n_i[p] of member i). What an adapter changes in
neuron p of the slot, it changes in neuron n_i[p] of member i, whole and not divided: if the
members are equal up to the order of their neurons, tuning the slot is tuning all of them, exactly.

Shapes: E experts, S slots, I inner size, D hidden size, R adapter rank.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from proxymoe.common.adapter import AdapterLayout
from proxymoe.common.errors import ConfigError
from proxymoe.common.model import NEURONS
from proxymoe.common.moe import MoELayer
from proxymoe.common.plan import Others, Plan
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.neurons import Fused, Neurons, aligned, averaged, read_neurons, write_neurons


def merged_tables(
    base: BaseCheckpoint,
    kept: Mapping[int, list[int]],
    stands_for: Mapping[int, Mapping[int, int]],
    weights: Mapping[int, np.ndarray],
    *,
    align: bool,
) -> dict[str, Tensor]:
    """The slots' parameters and who went where, by layer; see `common.model.TABLES_FILE`.

    One layer's slots and one group's members are in memory at a time, besides what is returned.

    Args:
        base: whose experts they are.
        kept: kept experts by layer; slots are in ascending order of them.
        stands_for: {layer: {expert: the kept one that it is merged into}}.
        weights: (E,) by layer, how much an expert counts in the mean.
        align: whether members' neurons are put in the kept expert's order first.
    """
    tables: dict[str, Tensor] = {}
    for at, cores in kept.items():
        fused = fused_of(base.layers[at])
        inner, count = base.layers[at].inner_size, base.num_experts[at]
        neurons = torch.arange(inner, dtype=torch.int32).repeat(count, 1)
        slots: list[dict[str, Tensor]] = []
        for core in sorted(cores):
            group = [core, *sorted(e for e, slot in stands_for[at].items() if slot == core)]
            stored = [base.expert(at, e) for e in group]
            members = [read_neurons(each, fused) for each in stored]
            if align:
                for place, expert in enumerate(group[1:], start=1):
                    order = aligned(members[0], members[place])
                    neurons[expert] = order.int()
                    members[place] = members[place].reordered(order)
            slot = averaged(members, [float(weights[at][e]) for e in group])
            whole = stored[0] if len(group) == 1 else _like(slot, fused, stored[0])
            slots.append(whole)
        for name in slots[0]:
            tables[f"{at}.{name}"] = torch.stack([slot[name] for slot in slots])
        tables[f"{at}.{NEURONS}"] = neurons
    return tables


def fused_of(layer: MoELayer) -> Fused:
    """How this layer's family lays its experts out."""
    return Fused(layer.transposed, bool(getattr(layer.experts, "is_concatenated", True)))


def returned_home(
    plan: Plan,
    layout: AdapterLayout,
    update: Tensor,
    neurons: Mapping[int, Tensor],
    layers: Mapping[int, MoELayer],
) -> Tensor:
    """The update (P,) of the full layout with each slot's part given to all of its members.

    Args:
        plan: of the submodel it was learned on, with merged experts.
        layout: of the full model's adapter.
        update: changes of the kept experts' blocks stand for their slots; members' are ignored.
        neurons: (E, I) by layer, see `common.model.NEURONS`.
        layers: the full model's, by position.
    """
    result = update.clone()
    place = {(b.module, b.expert): i for i, b in enumerate(layout.blocks)}
    parts = layout.trained_factors(update)
    for i, block in enumerate(layout.blocks):
        if block.expert is None:
            continue
        core = plan.layers[block.layer].stands_for.get(block.expert)
        if core is None:
            continue
        order = neurons[block.layer][block.expert].long()
        learned = parts[place[block.module, core]]
        gave = torch.empty_like(learned)
        if block.trains == "A":  # down projection: (R, I), a column per neuron
            gave[:, order] = learned
        else:
            gave[_rows(order, fused_of(layers[block.layer]))] = learned
        result[layout.bounds[i] : layout.bounds[i + 1]] = gave.reshape(-1)
    return result


def merges_adapters(plan: Plan, layout: AdapterLayout) -> bool:
    """Whether an adapter learned under this plan has to be brought home by `returned_home`."""
    adapts_experts = any(block.expert is not None for block in layout.blocks)
    return adapts_experts and plan.others is Others.MERGE


def require_identity(plan: Plan, layout: AdapterLayout) -> None:
    """Raises ConfigError if a federation could not average what devices with this plan learn."""
    if merges_adapters(plan, layout):
        raise ConfigError(
            f"mode = '{plan.mode}' merges experts, and a federation averages adapters of experts "
            "one by one; leave 'experts' out of adapter.targets, or use mode = 'drop'"
        )


def _rows(order: Tensor, fused: Fused) -> Tensor:
    """(2I,) rows of gate and up of neurons in this order, as they are fused."""
    if fused.concatenated:
        return torch.cat([order, order + len(order)])
    return torch.stack([2 * order, 2 * order + 1], dim=1).flatten()


def _like(slot: Neurons, fused: Fused, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    written = write_neurons(slot, fused, next(iter(stored.values())).dtype)
    return {name: written[name] for name in stored}
