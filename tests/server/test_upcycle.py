"""Dense layers become mixtures: what stays the same, what is lost, and what brings it back."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import MixtralConfig, Qwen2MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from proxymoe.common.errors import ConfigError
from proxymoe.server.clusters import balanced_groups, k_means
from proxymoe.server.recipe import ExpertKind, Recipe, RouterInit
from proxymoe.server.upcycle import (
    SPREAD,
    DenseMLP,
    copied,
    directions,
    evened,
    healed,
    ridge,
    routed_by_output,
    split,
)
from tests.laws import tried
from tests.tiny import assert_near

D, NEURONS = 16, 48
SIZES = st.sampled_from([(2, 0.0), (4, 0.0), (4, 1 / 3), (5, 0.2), (8, 0.5)])
SEEDS = st.integers(0, 1000)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(seed=0):
    return DenseMLP(
        normal(NEURONS, D, seed=seed), normal(NEURONS, D, seed=seed + 1), normal(D, NEURONS), F.silu
    )


def states(seed=0, tokens=400):
    return 0.5 + normal(tokens, D, seed=seed + 7)


def rows(num_experts, seen, init=RouterInit.HIDDEN, seed=0):
    rng = np.random.default_rng(seed)
    return evened(directions(init, num_experts, seen, normal(60, D, seed=3), rng), seen)


def layer(num_experts=4, top_k=2, shared=1 / 3, seed=0):
    seen = states(seed)
    recipe, mlp = Recipe(num_experts, top_k, shared_fraction=shared), dense(seed)
    return split(mlp, seen, mlp.neurons(seen), rows(num_experts, seen), recipe), seen


def said(made, seen):
    """What a split layer makes of the states."""
    return made(seen, made.dense.neurons(seen))


def block(weights, top_k):
    """The family's own block with these tensors."""
    num_experts, _, width = weights["experts.down_proj"].shape
    sizes: dict[str, Any] = {"hidden_size": D, "num_experts_per_tok": top_k}
    made: Any
    config: Any
    if "shared_expert_gate.weight" not in weights:
        config = MixtralConfig(intermediate_size=width, num_local_experts=num_experts, **sizes)
        made = MixtralSparseMoeBlock(config)
    else:
        config = Qwen2MoeConfig(
            moe_intermediate_size=width,
            shared_expert_intermediate_size=len(weights["shared_expert.up_proj.weight"]),
            num_experts=num_experts,
            norm_topk_prob=True,
            **sizes,
        )
        made = Qwen2MoeSparseMoeBlock(config)
    config._experts_implementation = "eager"
    made.load_state_dict(weights)
    return made.requires_grad_(False)


@given(seed=SEEDS, top_k=st.integers(1, 4), init=st.sampled_from(RouterInit))
@tried(20)
def test_copies_compute_what_the_dense_mlp_did_wherever_tokens_go(seed, top_k, init):
    mlp, seen = dense(seed), states(seed)
    router = 50 * rows(4, seen, init, seed)
    made = block(copied(mlp, router, 0.0, np.random.default_rng(0)), top_k)
    assert_near(made(seen[None])[0], mlp(seen), 1e-4)


def test_noise_tells_copies_apart():
    weights = copied(dense(), rows(4, states()), 0.1, np.random.default_rng(0))
    first, second, *_ = weights["experts.down_proj"]
    assert 0.05 < (first - second).std() / dense().down.std() < 0.2


@given(size=SIZES, seed=SEEDS)
@tried(20)
def test_split_neurons_are_each_in_one_place_and_experts_are_equal(size, seed):
    num_experts, shared = size
    found, _ = layer(num_experts, 1, shared, seed)
    assert sorted([*found.shared.tolist(), *found.experts.flatten().tolist()]) == [*range(NEURONS)]
    assert found.shared.numel() == Recipe(num_experts, 1, shared_fraction=shared).num_shared(48)


@given(size=SIZES, seed=SEEDS)
@tried(20)
def test_with_even_gates_and_every_expert_split_computes_what_the_dense_mlp_did(size, seed):
    num_experts, shared = size
    found, seen = layer(num_experts, num_experts, shared, seed)
    flat = replace(found, router=torch.zeros_like(found.router))
    assert_near(said(flat, seen), dense(seed)(seen), 1e-4)
    drift = (said(found, seen) - dense(seed)(seen)).norm() / dense(seed)(seen).norm()
    assert drift < 2 * SPREAD


@pytest.mark.parametrize("shared", [0.0, 1 / 3])
def test_the_familys_own_block_computes_what_was_planned(shared):
    found, seen = layer(4, 2, shared)
    found = routed_by_output(found, seen, dense().neurons(seen), 0.01)
    assert_near(block(found.weights(), 2)(seen[None])[0], said(found, seen), 1e-4)


def test_shared_neurons_are_those_that_say_most():
    mlp, seen = dense(), states()
    loud = mlp.down.clone()
    loud[:, [3, 17, 40]] *= 100
    recipe = Recipe(5, 2, shared_fraction=3 / NEURONS)
    found = split(replace(mlp, down=loud), seen, mlp.neurons(seen), rows(5, seen), recipe)
    assert found.shared.tolist() == [3, 17, 40]


def test_neurons_go_to_the_expert_whose_tokens_use_them():
    seen = torch.eye(4).repeat_interleave(8, dim=0) @ (4 * torch.eye(4, D))
    gate = torch.eye(4, D).repeat(3, 1)
    mlp = DenseMLP(gate, gate, normal(D, 12), F.relu)
    found = split(mlp, seen, mlp.neurons(seen), torch.eye(4, D), Recipe(4, 1, shared_fraction=0.0))
    assert found.experts.tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]


def test_the_fitted_router_finds_more_of_the_output_than_the_first_one():
    found, seen = layer(8, 2, 0.0)
    wanted = dense()(seen)
    fitted = routed_by_output(found, seen, dense().neurons(seen), 0.01)
    lost = [(said(made, seen) - wanted).norm().item() for made in (found, fitted)]
    assert lost[1] < 0.97 * lost[0]


@given(top_k=st.integers(1, 3), strength=st.sampled_from([1e-4, 0.01, 1.0]), seed=SEEDS)
@tried(20)
def test_healing_brings_the_layer_nearer_to_what_is_wanted(top_k, strength, seed):
    found, seen = layer(4, top_k, 0.0, seed)
    wanted = dense(seed)(seen)
    after = healed(found, seen, dense(seed).neurons(seen), wanted, strength)
    assert (said(after, seen) - wanted).norm() < (said(found, seen) - wanted).norm()
    unseen = states(seed + 5000)
    assert (said(after, unseen) - dense(seed)(unseen)).norm() < 1.05 * (
        said(found, unseen) - dense(seed)(unseen)
    ).norm()


def test_nothing_is_healed_where_nothing_is_missing():
    found, seen = layer(4, 4)
    assert_near(
        healed(found, seen, dense().neurons(seen), said(found, seen), 0.01).dense.down,
        found.dense.down,
    )


def test_ridge_finds_the_weights_and_shrinks_them_with_its_strength():
    weights, features = normal(3, D), normal(500, D, seed=1)
    assert_near(ridge(features, features @ weights.T, 1e-7), weights, 1e-4)
    norms = [ridge(features, features @ weights.T, each).norm() for each in (1e-7, 0.1, 10.0)]
    assert norms == sorted(norms, reverse=True)


@pytest.mark.parametrize("init", RouterInit)
def test_an_average_token_prefers_no_expert_of_a_new_router(init):
    seen = states()
    scores = rows(6, seen, init) @ seen.mean(0)
    assert scores.abs().max() < 1e-4 * SPREAD * 100


def test_hidden_rows_point_to_the_clusters_of_the_states():
    centres = 3 * F.normalize(normal(4, D), dim=-1)
    seen = centres.repeat_interleave(50, dim=0) + 0.1 * normal(200, D, seed=9)
    owner = (seen @ rows(4, seen).T).argmax(-1).reshape(4, 50)
    assert sorted(owner[:, 0].tolist()) == [0, 1, 2, 3]
    assert bool((owner == owner[:, :1]).all())


def test_a_cluster_without_points_keeps_its_centroid():
    points = torch.ones(6, D)
    assert torch.isfinite(k_means(points, 3, np.random.default_rng(0))).all()


@given(groups=st.sampled_from([1, 2, 3, 6]), seed=SEEDS)
@tried(30)
def test_balanced_groups_are_a_partition_and_better_than_any_drawn_one(groups, seed):
    affinity = normal(12, groups, seed=seed)
    found = balanced_groups(affinity)
    assert found.shape == (groups, 12 // groups)
    assert sorted(found.flatten().tolist()) == [*range(12)]

    def sum_of(partition):
        return sum(affinity[group, number].sum() for number, group in enumerate(partition))

    drawn = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).reshape(groups, -1)
    assert sum_of(found) >= sum_of(drawn) - 1e-5


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_experts": 4, "top_k": 5}, "4 experts with top_k 5"),
        ({"num_experts": 1, "top_k": 1}, "at least two"),
        ({"top_k": 0}, "top_k 0"),
        ({"shared_fraction": 1.0}, "shared_fraction 1.0"),
        ({"shared_fraction": -0.1}, "shared_fraction -0.1"),
        ({"noise": -1.0}, "noise -1.0"),
        ({"ridge": 0.0}, "ridge 0.0"),
    ],
)
def test_impossible_recipes_are_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        Recipe(**settings)


def test_neurons_that_cannot_be_split_evenly_are_refused():
    with pytest.raises(ConfigError, match="48 neurons cannot be split evenly into 5 experts"):
        Recipe(5, 2, shared_fraction=0.0).num_shared(48)


def test_experts_without_neurons_are_refused():
    with pytest.raises(ConfigError, match="48 neurons are too few for 40 experts"):
        Recipe(40, 2, shared_fraction=0.5).num_shared(48)


def test_copies_share_nothing():
    assert Recipe(5, 2, ExpertKind.COPY).num_shared(48) == 0
