"""Merged experts are means of their members, and what a slot learns goes home to all of them."""

import numpy as np
import pytest
import torch

from proxymoe.common.adapter import adapter_layout
from proxymoe.common.attach import AttachedAdapter
from proxymoe.common.checkpoint import read_tensors, write_tensors
from proxymoe.common.errors import ConfigError
from proxymoe.common.model import NEURONS, TABLES_FILE, load
from proxymoe.common.moe import moe_layers
from proxymoe.common.plan import LayerPlan, Others, Plan, RouterMode
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.merging import (
    fused_of,
    merged_tables,
    merges_adapters,
    require_identity,
    returned_home,
)
from proxymoe.server.neurons import read_neurons, write_neurons
from tests.families import MORE_FAMILIES
from tests.tiny import assert_near, logits

CORES = (1, 6)
GROUPS = {0: 1, 4: 1, 2: 6}
EVEN = np.ones(8)


@pytest.fixture(params=["qwen2_moe", "deepseek_v3", *MORE_FAMILIES])
def model(request, tiny):
    """A tiny checkpoint of each family in turn."""
    return tiny(request.param)


def plan_of(base: BaseCheckpoint, **fields) -> Plan:
    layers = {at: LayerPlan(num_experts=8, kept=CORES, stands_for=GROUPS) for at in base.layers}
    return Plan(base=base.digest, layers=layers, others=Others.MERGE, tables="00", **fields)


def tables_of(base: BaseCheckpoint, *, align: bool = True) -> dict[str, torch.Tensor]:
    everywhere = dict.fromkeys(base.layers)
    return merged_tables(
        base,
        {at: list(CORES) for at in everywhere},
        dict.fromkeys(everywhere, GROUPS),
        dict.fromkeys(everywhere, EVEN),
        align=align,
    )


def with_twins(model, folder) -> BaseCheckpoint:
    """The base model with every member of a group a reordered copy of the kept expert."""
    tensors = read_tensors(model.full_folder / "model.safetensors")
    for layer in moe_layers(model.base.skeleton):
        fused, order = fused_of(layer), torch.randperm(layer.inner_size)
        names = {n: f"{layer.name}.experts.{n}" for n, _ in layer.experts.named_parameters()}
        for member, core in GROUPS.items():
            one = {leaf: tensors[name][core] for leaf, name in names.items()}
            twin = read_neurons(one, fused).reordered(order)
            for leaf, weight in write_neurons(twin, fused, torch.float32).items():
                tensors[names[leaf]][member] = weight
    model.base.materialise(model.base.keep_all(), folder)
    write_tensors(folder / "model.safetensors", tensors)
    return BaseCheckpoint(folder)


def cut(base: BaseCheckpoint, folder, **fields):
    plan = plan_of(base, **fields)
    base.materialise(plan, folder)
    write_tensors(folder / TABLES_FILE, tables_of(base))
    return plan, load(folder)


def test_slots_are_means_of_their_members(model):
    tables = tables_of(model.base, align=False)
    for at in model.base.layers:
        for slot, core in enumerate(CORES):
            group = [core, *(e for e, c in GROUPS.items() if c == core)]
            members = [model.base.expert(at, e) for e in group]
            for name, weight in members[0].items():
                mean = torch.stack([m[name].float() for m in members]).mean(0)
                assert_near(tables[f"{at}.{name}"][slot].float(), mean)
                assert tables[f"{at}.{name}"].dtype == weight.dtype


def test_an_expert_nobody_joined_stays_as_it_is(qwen):
    base = qwen.base
    everywhere = {at: [3, 5] for at in base.layers}
    tables = merged_tables(
        base, everywhere, {at: {} for at in everywhere}, dict.fromkeys(everywhere, EVEN), align=True
    )
    for at in base.layers:
        for name, weight in base.expert(at, 5).items():
            assert torch.equal(tables[f"{at}.{name}"][1], weight)


def test_merging_reordered_copies_changes_nothing(model, tmp_path):
    base = with_twins(model, tmp_path / "twins")
    plan, proxy = cut(base, tmp_path / "cut")
    kept = (*CORES, *GROUPS)
    layers = {at: LayerPlan(num_experts=8, kept=tuple(sorted(kept))) for at in base.layers}
    other = Plan(base=base.digest, layers=layers)
    expected = load(base.materialise(other, tmp_path / "all"))
    assert plan.num_kept * 5 == other.num_kept * 2
    assert_near(logits(proxy.model), logits(expected.model))


def test_what_slots_learn_is_the_same_for_all_their_members(model, tmp_path):
    """Tuning the merged slot is tuning each of its members, exactly, if they are alike."""
    base = with_twins(model, tmp_path / "twins")
    plan, proxy = cut(base, tmp_path / "cut")
    full = adapter_layout(base.skeleton, ("experts",), 4, 3)
    held = full.held_under(plan)
    assert merges_adapters(plan, full)
    learned = 0.1 * torch.randn(held.size, generator=torch.Generator().manual_seed(1))
    spread = held.put_into(full, full.zeros(), learned)
    tables = tables_of(base)
    neurons = {at: tables[f"{at}.{NEURONS}"] for at in base.layers}
    home = returned_home(plan, full, spread, neurons, base.layers)

    kept = tuple(sorted((*CORES, *GROUPS)))
    layers = {at: LayerPlan(num_experts=8, kept=kept) for at in base.layers}
    other = Plan(base=base.digest, layers=layers)
    members = load(base.materialise(other, tmp_path / "all"))
    layout = full.held_under(other)
    with AttachedAdapter(proxy.model, held) as adapter:
        adapter.bind(learned)
        on_proxy = logits(proxy.model)
    with AttachedAdapter(members.model, layout) as adapter:
        adapter.bind(layout.take_from(full, home))
        at_home = logits(members.model)
        adapter.bind(layout.take_from(full, spread))
        without = logits(members.model)
    assert_near(on_proxy, at_home)
    assert (at_home - without).abs().max() > 10 * (at_home - on_proxy).abs().max()


def test_attention_and_shared_experts_go_home_by_identity(qwen):
    layout = adapter_layout(qwen.base.skeleton, ("attention", "shared"), 4, 3)
    assert not merges_adapters(plan_of(qwen.base), layout)
    require_identity(plan_of(qwen.base), layout)


def test_a_federation_does_not_average_adapters_of_merged_experts(qwen):
    layout = adapter_layout(qwen.base.skeleton, ("experts",), 4, 3)
    with pytest.raises(ConfigError, match="merges experts, and a federation averages"):
        require_identity(plan_of(qwen.base), layout)


def test_summing_before_top_k_differs_from_summing_after(qwen, tmp_path):
    found = [
        logits(cut(qwen.base, tmp_path / mode, router=mode)[1].model)
        for mode in (RouterMode.FULL, RouterMode.SUMMED, RouterMode.SLICED)
    ]
    assert all(bool(torch.isfinite(each).all()) for each in found)
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    assert not torch.allclose(found[1], found[2], atol=1e-3)
