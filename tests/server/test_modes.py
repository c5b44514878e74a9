"""The modes that imitate or merge are what their papers say."""

from itertools import permutations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.allocation import Room
from proxymoe.common.config import Allocation
from proxymoe.server.modes import affine, hcsmoe, msmoe, ptse
from proxymoe.server.modes.affine import fit
from proxymoe.server.modes.choice import Evidence
from proxymoe.server.profile import profile_domain
from proxymoe.server.relations import Relations, relate_domain
from tests.server.test_extract import relations
from tests.server.test_profile import examples_of


def evidence_of(tiny, examples) -> Evidence:
    statistics, tokens = profile_domain(tiny.full, examples, 10**6)
    related, _ = relate_domain(tiny.full, examples)
    alike = dict.fromkeys(statistics, 1.0)
    return Evidence(tiny.base, statistics, related, alike, tokens, np.random.default_rng(0))


def room_for(tiny, count: int) -> Room:
    cost = tiny.base.expert_bytes
    return Room(cost, count * sum(cost.values()), Allocation.UNIFORM, 0.0)


@given(st.integers(0, 50), st.integers(1, 2))
def test_matching_has_the_largest_total_similarity(seed, degree):
    similarity = np.random.default_rng(seed).random((7, 7))
    moderate, hot = [0, 2, 5, 6], [1, 3]
    found = ptse.matched(similarity, moderate, hot, degree)
    assert len(found) == min(len(moderate), degree * len(hot))
    assert all(list(found.values()).count(h) <= degree for h in hot)
    nobody = len(similarity)
    padded = np.pad(similarity, (0, 1))
    places = [h for h in hot for _ in range(degree)]
    places += [nobody] * (len(moderate) - len(places))
    best = max(
        sum(padded[m, h] for m, h in zip(moderate, order, strict=False))
        for order in permutations(places)
    )
    assert np.isclose(sum(similarity[m, h] for m, h in found.items()), best)


def test_ptse_drops_what_is_hardly_ever_likely(qwen):
    evidence = evidence_of(qwen, examples_of(1, [60, 50]))
    least = ptse.ALPHA / 8
    for at, found in evidence.relations.items():
        found.probability.fill_(1 / 8)
        found.probability[3] = 0.9 * least
        found.probability[at] = 1.1 / 8
    chosen = ptse.choose(evidence, room_for(qwen, 1))
    for at, groups in chosen.stands_for.items():
        assert chosen.kept[at] == [at]
        assert 3 not in groups
        assert len(groups) == ptse.MAX_DEGREE


def test_msmoe_joins_everybody_to_the_core_with_the_most_similar_logits(qwen):
    evidence = evidence_of(qwen, examples_of(2, [60, 50]))
    for found in evidence.relations.values():
        found.logits.fill_(0.1)
        found.logits.fill_diagonal_(1.0)
        found.logits[:, 5] = found.logits[5, :] = 0.9
        found.logits[5, 5] = 1.0
    for stats in evidence.statistics.values():
        stats.count[5] = stats.count[2] = 1e6
    chosen = msmoe.choose(evidence, room_for(qwen, 2))
    for at, cores in chosen.kept.items():
        assert sorted(cores) == [2, 5]
        assert chosen.stands_for[at] == dict.fromkeys([0, 1, 3, 4, 6, 7], 5)


def test_hcsmoe_clusters_experts_with_near_outputs(qwen):
    evidence = evidence_of(qwen, examples_of(3, [60, 50]))
    near = {0: 0.0, 1: 0.1, 2: 5.0, 3: 5.1, 4: 5.2, 5: 9.0, 6: 9.1, 7: 0.2}
    for found in evidence.relations.values():
        found.output.zero_()
        found.output[:, 0] = torch.tensor([near[e] for e in range(8)])
    chosen = hcsmoe.choose(evidence, room_for(qwen, 3))
    for at, cores in chosen.kept.items():
        groups = {core: {core} for core in cores}
        for expert, core in chosen.stands_for[at].items():
            groups[core].add(expert)
        assert {frozenset(g) for g in groups.values()} == {
            frozenset({0, 1, 7}),
            frozenset({2, 3, 4}),
            frozenset({5, 6}),
        }


def test_the_affine_fit_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(3, 200, 4, generator=generator)
    outputs[0] = 0.7 * outputs[1] + 2.0 + 0.1 * outputs[0]
    weights = torch.rand(200, 3, generator=generator)
    found = Relations.zeros(3, 4)
    found.add(outputs, torch.zeros(200, 3), weights)
    each = fit(found, torch.ones(3))
    w = weights[:, 0].double()
    target, source = outputs[0].double(), outputs[1].double()
    centred = [(x - (w[:, None] * x).sum(0) / w.sum()) for x in (target, source)]
    a = (w[:, None] * centred[0] * centred[1]).sum() / (w[:, None] * centred[1] ** 2).sum()
    assert np.isclose(float(each.scale[0, 1]), float(a), rtol=1e-3)
    left = (w[:, None] * (centred[0] - a * centred[1]) ** 2).sum()
    energy = (w[:, None] * target**2).sum()
    assert np.isclose(each.explained[0, 1], float(energy - left), rtol=1e-3)
    assert np.isclose(each.explained[0, 0], float(energy), rtol=1e-3)


def test_affine_never_explains_less_than_the_mean_with_full_trust():
    for seed in range(5):
        each = fit(relations(seed), torch.ones(8))
        assert (each.explained >= each.by_mean[:, None] - 1e-3 * each.explained.max()).all()


def test_a_twin_is_imitated_by_its_twin(qwen):
    evidence = evidence_of(qwen, examples_of(4, [60, 50, 40]))
    for at in evidence.relations:
        generator = torch.Generator().manual_seed(at)
        outputs = torch.randn(8, 400, 64, generator=generator)
        outputs[6] = 1.2 * outputs[3]
        seen = Relations.zeros(8, 64)
        weights = 0.01 * torch.rand(400, 8, generator=generator)
        weights[:, 3] *= 100
        weights[:, 6] *= 50
        seen.add(outputs, torch.randn(400, 8, generator=generator), weights)
        evidence.relations[at] = seen
    for stats in evidence.statistics.values():
        stats.count.fill_(1e6)
    chosen = affine.choose(evidence, room_for(qwen, 1))
    for at, kept in chosen.kept.items():
        twin = {3: 6, 6: 3}[kept[0]]
        assert chosen.stands_for[at] == {twin: kept[0]}
        factor = 1.2 if kept[0] == 3 else 1 / 1.2
        assert np.isclose(float(chosen.tables[f"{at}.scale"][twin]), factor, rtol=1e-2)
