"""Rotating plans keep as many experts, the best of them always, and meet all in time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.config import Allocation
from proxymoe.server.rotation import rotated
from tests.server.test_extract import cut, profile_of


def scores_of(tiny):
    return profile_of(tiny).relative_energy({"domain0": 1.0})


@given(st.floats(0.15, 1), st.sampled_from(Allocation), st.floats(0, 1), st.integers(0, 9))
def test_a_rotated_plan_keeps_as_many_experts_and_the_best_of_each_layer(
    qwen, fraction, allocation, share, seed
):
    found, scores = cut(qwen, kept_fraction=fraction, allocation=allocation), scores_of(qwen)
    turned = rotated(found.plan, scores, share, np.random.default_rng(seed))
    assert qwen.base.manifest(turned).num_bytes == found.num_bytes
    assert turned == rotated(found.plan, scores, share, np.random.default_rng(seed))
    for at, layer in turned.layers.items():
        count = len(found.plan.layers[at].kept)
        assert len(layer.kept) == count
        best = np.argsort(-scores[at], kind="stable")[: count - round(share * count)]
        assert set(best.tolist()) <= set(layer.kept)


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_a_plan_of_which_nothing_rotates_is_itself(model, fraction):
    found = cut(model, kept_fraction=fraction)
    assert rotated(found.plan, scores_of(model), 0.0, np.random.default_rng(0)) == found.plan


def test_a_rotating_plan_meets_every_expert_the_likelier_the_higher_its_score(qwen):
    found, rng = cut(qwen, kept_fraction=0.25, allocation="uniform"), np.random.default_rng(0)
    met = {at: np.zeros(8) for at in found.plan.layers}
    for _ in range(400):
        for at, layer in rotated(found.plan, scores_of(qwen), 1.0, rng).layers.items():
            met[at][list(layer.kept)] += 1
    for at, scores in scores_of(qwen).items():
        assert met[at].sum() == 400 * 2
        assert met[at][scores.argmax()] == met[at].max()
        assert met[at][scores.argmin()] == met[at].min()
        assert np.all(met[at][scores > 0.02 * scores.sum()] > 0)
