"""Choosing experts: budgets hold, floors hold, and the saliencies are what they claim."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.checkpoint import WEIGHTS, write_tensors
from proxymoe.common.config import Allocation, ExtractSettings, PlanMode
from proxymoe.common.errors import BudgetError, ConfigError, PlanError
from proxymoe.common.model import TABLES_FILE, load
from proxymoe.common.plan import RouterMode, read_plan
from proxymoe.server.extract import budget_bytes, extract
from proxymoe.server.modes import MODES
from proxymoe.server.modes.mean import SHRINKAGE_TOKENS
from proxymoe.server.profile import COLUMNS, ExpertStatistics, Profile
from proxymoe.server.relations import Relations
from tests.tiny import TinyBase, assert_near, logits

TOKENS = 1000


def statistics(seed: int) -> ExpertStatistics:
    """Plausible sums over TOKENS tokens."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(0, 500, (8,), generator=generator).float()
    mean_gate = torch.rand(8, generator=generator)
    output = torch.randn(8, 64, generator=generator)
    norm = output.norm(dim=1)
    return ExpertStatistics(
        count=count,
        gate=count * mean_gate,
        gate_squared=count * mean_gate**2,
        norm=count * mean_gate * norm,
        energy=1.5 * count * (mean_gate * norm) ** 2,
        magnitude=1.2 * count * norm,
        output=count[:, None] * mean_gate[:, None] ** 2 * output,
        stream=TOKENS * torch.rand(1, generator=generator),
    )


def relations(seed: int) -> Relations:
    """What TOKENS random tokens, outputs and logits of eight experts show."""
    generator = torch.Generator().manual_seed(seed)
    found = Relations.zeros(8, 64)
    outputs = torch.randn(8, TOKENS, 64, generator=generator)
    logits = torch.randn(TOKENS, 8, generator=generator)
    gates = logits.softmax(-1)
    routed = torch.zeros_like(gates).scatter(1, gates.topk(3).indices, 1.0)
    found.add(outputs + outputs[0], logits, (gates * routed).square())
    return found


def profile_of(tiny: TinyBase, seeds: tuple[int, ...] = (0, 10)) -> Profile:
    domains = {
        f"domain{seed}": {at: statistics(seed + at) for at in tiny.base.num_experts}
        for seed in seeds
    }
    related = {
        name: ({at: relations(at) for at in layers}, TOKENS) for name, layers in domains.items()
    }
    return Profile(tiny.base.digest, domains, dict.fromkeys(domains, TOKENS), related)


def cut(tiny: TinyBase, seed: int = 0, **fields):
    rng = np.random.default_rng(seed)
    return extract(tiny.base, profile_of(tiny), {"domain0": 1.0}, ExtractSettings(**fields), rng)


def smallest(tiny: TinyBase) -> int:
    return tiny.base.trunk_bytes + sum(tiny.base.expert_bytes.values())


def total(tiny: TinyBase) -> int:
    return tiny.base.trunk_bytes + 8 * sum(tiny.base.expert_bytes.values())


settings_of = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(PlanMode),
        "allocation": st.sampled_from(Allocation),
        "floor": st.floats(0, 1),
    }
)


@given(settings_of, st.floats(0, 1.2))
def test_any_budget_is_respected(qwen, fields, position):
    table = MODES[fields["mode"]].table_bytes(qwen.base)
    budget = int(smallest(qwen) + table + position * (total(qwen) - smallest(qwen)))
    found = cut(qwen, budget_bytes=budget, **fields)
    assert found.num_bytes <= budget
    assert found.num_bytes >= qwen.base.manifest(found.plan).num_bytes
    assert all(len(layer.kept) >= 1 for layer in found.plan.layers.values())


@given(settings_of, st.lists(st.floats(0, 1), min_size=2, max_size=2).map(sorted))
def test_more_budget_never_keeps_fewer_experts(qwen, fields, positions):
    table = MODES[fields["mode"]].table_bytes(qwen.base)
    less, more = (
        cut(
            qwen,
            budget_bytes=int(smallest(qwen) + table + p * (total(qwen) - smallest(qwen))),
            **fields,
        ).plan
        for p in positions
    )
    assert less.num_kept <= more.num_kept
    if fields["allocation"] is Allocation.UNIFORM:
        for at, layer in less.layers.items():
            assert set(layer.kept) <= set(more.layers[at].kept)


@given(st.floats(0.15, 1), st.floats(0, 1), st.sampled_from(PlanMode))
def test_every_layer_keeps_its_floor(qwen, fraction, floor, mode):
    plan = cut(qwen, kept_fraction=fraction, floor=floor, mode=mode).plan
    uniform = int(fraction * 8)
    assert min(len(layer.kept) for layer in plan.layers.values()) >= max(1, int(floor * uniform))


@given(st.floats(0.15, 1), st.sampled_from(PlanMode))
def test_uniform_keeps_the_same_number_in_every_layer(qwen, fraction, mode):
    plan = cut(qwen, kept_fraction=fraction, mode=mode, allocation="uniform").plan
    assert len({len(layer.kept) for layer in plan.layers.values()}) == 1


@pytest.mark.parametrize("mode", ["drop", "mean", "affine"])
def test_a_budget_too_small_names_the_smallest_that_fits(model, mode):
    with pytest.raises(BudgetError, match="a budget of 1,000 bytes") as refused:
        cut(model, budget_bytes=1000, mode=mode)
    named = int(
        re.findall(r"smallest that fits is ([\d,]+)", str(refused.value))[0].replace(",", "")
    )
    found = cut(model, budget_bytes=named, mode=mode)
    assert found.plan.num_kept == len(model.base.num_experts)
    assert found.num_bytes <= named
    with pytest.raises(BudgetError):
        cut(model, budget_bytes=named - 1, mode=mode)


def test_a_fraction_too_small_is_refused_like_a_budget(qwen):
    with pytest.raises(BudgetError, match="smallest that fits"):
        cut(qwen, kept_fraction=0.01)


def test_keeping_everything_keeps_everything(model):
    found = cut(model, kept_fraction=1.0)
    assert found.plan.keeps_all
    assert found.num_bytes == total(model)


def test_the_budget_in_bytes_wins_over_the_fraction(qwen):
    settings = ExtractSettings(kept_fraction=0.5)
    assert budget_bytes(qwen.base, settings) == (total(qwen) + qwen.base.trunk_bytes) // 2
    settings = ExtractSettings(kept_fraction=0.5, budget_bytes=123)
    assert budget_bytes(qwen.base, settings) == 123


def test_drop_keeps_the_largest_shares_of_the_stream_over_all_layers(qwen):
    plan = cut(qwen, kept_fraction=0.5, floor=0.0).plan
    domains = profile_of(qwen).domains
    energies = {
        (at, e): float(
            domains["domain0"][at].energy[e] * sum(d[at].stream for d in domains.values())
        )
        for at in (0, 1)
        for e in range(8)
    }
    kept = {(at, e) for at, layer in plan.layers.items() for e in layer.kept}
    assert kept == set(sorted(energies, key=lambda key: -energies[key])[:8])


@pytest.mark.parametrize(
    ("mode", "saliency"),
    [
        ("drop", lambda s: s.energy),
        ("mean", lambda s: s.energy - s.output.square().sum(1) / s.gate_squared),
        ("frequency", lambda s: s.count),
        ("reap", lambda s: s.norm / s.count),
        ("ean", lambda s: s.magnitude),
        ("msmoe", lambda s: s.count),
    ],
)
def test_modes_keep_what_their_formula_ranks_first(qwen, mode, saliency):
    plan = cut(qwen, mode=mode, kept_fraction=0.5, allocation="uniform").plan
    for at, layer in plan.layers.items():
        best = saliency(statistics(at)).argsort(descending=True)[: len(layer.kept)]
        assert set(layer.kept) == set(best.tolist())


@pytest.mark.parametrize("mode", ["drop", "mean", "reap", "ean", "frequency"])
def test_experts_never_routed_to_come_last(qwen, mode):
    profile = profile_of(qwen)
    for stats in profile.domains["domain0"].values():
        for column in set(COLUMNS) - {"stream"}:
            getattr(stats, column)[2] = 0.0
    settings = ExtractSettings(mode=mode, kept_fraction=0.875, allocation="uniform")
    rng = np.random.default_rng(0)
    plan = extract(qwen.base, profile, {"domain0": 1.0}, settings, rng).plan
    assert all(2 not in layer.kept for layer in plan.layers.values())


@pytest.mark.parametrize("mode", ["drop", "mean", "affine"])
def test_a_layer_whose_stream_and_outputs_are_larger_alike_keeps_the_same_experts(qwen, mode):
    profile = profile_of(qwen)
    settings = ExtractSettings(mode=mode, kept_fraction=0.5, floor=0.0)
    before = extract(qwen.base, profile, {"domain0": 1.0}, settings, np.random.default_rng(0)).plan
    for name, layers in profile.domains.items():
        for column, power in (("norm", 1), ("magnitude", 1), ("output", 1), ("energy", 2)):
            getattr(layers[1], column).mul_(64**power)
        layers[1].stream.div_(64**2)
        related = profile.relations[name][0][1]
        for column, power in (("output", 1), ("cross", 2), ("square", 2), ("seen", 1)):
            getattr(related, column).mul_(64**power)
    larger = Profile(profile.base, profile.domains, profile.num_tokens, profile.relations)
    after = extract(qwen.base, larger, {"domain0": 1.0}, settings, np.random.default_rng(0)).plan
    assert after.kept == before.kept


def test_random_is_seeded(qwen):
    draws = [cut(qwen, seed, mode="random").plan for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1]
    assert len({plan.digest for plan in draws}) == 3


@pytest.mark.parametrize("mode", [mode for mode in PlanMode if mode is not PlanMode.RANDOM])
def test_what_is_not_random_does_not_depend_on_the_seed(qwen, mode):
    assert cut(qwen, 0, mode=mode).plan == cut(qwen, 1, mode=mode).plan


def test_the_mixture_decides_which_experts_are_kept(qwen):
    profile, rng = profile_of(qwen), np.random.default_rng(0)
    plans = [
        extract(qwen.base, profile, mixture, ExtractSettings(), rng).plan
        for mixture in ({"domain0": 1.0}, {"domain0": 5.0}, {"domain10": 1.0})
    ]
    assert plans[0] == plans[1] != plans[2]


def test_mean_offsets_are_shrunk_means_of_the_others_and_zero_for_the_kept(qwen, tmp_path):
    found = cut(qwen, mode="mean", kept_fraction=0.5)
    for at, layer in found.plan.layers.items():
        stats, offsets = statistics(at), found.tables[f"{at}.offset"].float()
        for expert in range(8):
            if expert in layer.kept:
                assert offsets[expert].eq(0).all()
            else:
                trust = stats.count[expert] / (stats.count[expert] + SHRINKAGE_TOKENS)
                mean = stats.output[expert] / stats.gate_squared[expert]
                assert_near(offsets[expert], trust * mean, 1e-2)
    write_tensors(tmp_path / TABLES_FILE, found.tables)
    loaded = load(qwen.base.materialise(found.plan, tmp_path))
    assert bool(torch.isfinite(logits(loaded.model)).all())


def test_a_mean_plan_differs_from_one_with_other_means(qwen):
    one = cut(qwen, mode="mean", kept_fraction=0.5)
    profile, rng = profile_of(qwen), np.random.default_rng(0)
    for layer in profile.domains["domain0"].values():
        layer.output.neg_()
    settings = ExtractSettings(mode="mean", kept_fraction=0.5)
    other = extract(qwen.base, profile, {"domain0": 1.0}, settings, rng)
    tables = sum(o.numel() * o.element_size() for o in one.tables.values())
    assert one.num_bytes == qwen.base.manifest(one.plan).num_bytes + tables
    assert one.plan.layers == other.plan.layers
    assert one.plan.digest != other.plan.digest


def test_a_sliced_plan_fits_into_less_than_its_budget(qwen, tmp_path):
    found = cut(qwen, router="sliced", kept_fraction=0.5)
    assert found.plan.router is RouterMode.SLICED
    assert found.num_bytes < budget_bytes(qwen.base, ExtractSettings(kept_fraction=0.5))
    folder = qwen.base.materialise(found.plan, tmp_path)
    assert (folder / WEIGHTS).stat().st_size >= found.num_bytes
    assert read_plan(folder) == found.plan


def test_a_profile_of_another_base_model_is_refused(qwen, tiny):
    with pytest.raises(PlanError, match=r"profile of \w{12} used with base model \w{12}"):
        extract(
            tiny("olmoe").base,
            profile_of(qwen),
            {"domain0": 1.0},
            ExtractSettings(),
            np.random.default_rng(0),
        )


@pytest.mark.parametrize(
    ("mixture", "reason"),
    [
        ({"unknown": 1.0}, r"\['unknown'\] are not in the profile; known: \['domain0'"),
        ({"domain0": -1.0, "domain10": 2.0}, "needs weights >= 0"),
        ({"domain0": 0.0}, "some above 0"),
        ({}, "some above 0"),
    ],
)
def test_an_impossible_mixture_is_refused(qwen, mixture, reason):
    with pytest.raises(ConfigError, match=reason):
        extract(qwen.base, profile_of(qwen), mixture, ExtractSettings(), np.random.default_rng(0))


def test_a_mode_that_looks_at_relations_asks_for_them(qwen):
    bare = profile_of(qwen)
    bare = Profile(bare.base, bare.domains, bare.num_tokens)
    settings = ExtractSettings(mode="ptse")
    with pytest.raises(PlanError, match=r"no relations of experts on the domains \['domain0'\]"):
        extract(qwen.base, bare, {"domain0": 1.0}, settings, np.random.default_rng(0))


@pytest.mark.parametrize("mode", ["drop", "mean", "affine"])
def test_probabilities_are_summed_only_where_experts_are_merged(qwen, mode):
    with pytest.raises(PlanError, match=f"'{mode}', which merges no experts; use 'full'"):
        cut(qwen, mode=mode, router="summed")
