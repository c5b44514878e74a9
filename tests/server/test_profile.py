"""Expert statistics: equal to a sum written by hand, additive, and bound to their base model."""

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.checkpoint import write_tensors
from proxymoe.common.errors import CheckpointError, DataError
from proxymoe.common.experts import expert_state
from proxymoe.common.model import load
from proxymoe.common.moe import moe_layers
from proxymoe.common.text import Example
from proxymoe.server.profile import (
    COLUMNS,
    ExpertStatistics,
    Profile,
    load_profile,
    profile_domain,
    require_tokens,
    save_domain,
)
from tests.tiny import assert_near, some_tokens

FIELDS = COLUMNS


def examples_of(seed, lengths):
    tokens = some_tokens(len(lengths), max(lengths), seed).tolist()
    return [Example(tuple(t[:n]), 1) for t, n in zip(tokens, lengths, strict=True)]


def by_hand(model, examples):
    """The same sums, one sequence and one token at a time, on the stock backend."""
    layers = moe_layers(model)
    sums = {layer.position: ExpertStatistics.zeros(8, 64) for layer in layers}

    def watch(layer):
        def hook(experts, args):
            for hidden, index, gates in zip(*args, strict=True):
                for expert, gate in zip(index.tolist(), gates, strict=True):
                    gated, up = (experts.gate_up_proj[expert] @ hidden).chunk(2)
                    output = experts.down_proj[expert] @ (experts.act_fn(gated) * up)
                    stats = sums[layer.position]
                    stats.count[expert] += 1
                    stats.gate[expert] += gate
                    stats.gate_squared[expert] += gate**2
                    stats.magnitude[expert] += output.norm()
                    stats.norm[expert] += (gate * output).norm()
                    stats.energy[expert] += (gate * output).norm() ** 2
                    stats.output[expert] += gate**2 * output

        return layer.experts.register_forward_pre_hook(hook)

    def watch_stream(layer):
        def hook(_layer, _inputs, hidden):
            sums[layer.position].stream.add_(sum(1 / h.square().sum() for h in hidden[0]))

        return layer.decoder_layer.register_forward_hook(hook)

    handles = [watch(layer) for layer in layers] + [watch_stream(layer) for layer in layers]
    with torch.no_grad():
        for example in examples:
            model(torch.tensor([example.tokens]), use_cache=False)
    for handle in handles:
        handle.remove()
    return sums


def test_statistics_equal_a_sum_by_hand_and_see_no_padding(model):
    examples = examples_of(1, [5, 11, 8])
    found, num_tokens = profile_domain(model.full, examples, max_tokens=10**6)
    expected = by_hand(model.stock, examples)
    assert num_tokens == 24
    for at, stats in found.items():
        for name in FIELDS:
            assert_near(getattr(stats, name), getattr(expected[at], name), 1e-4)


def test_every_token_is_counted_once_per_chosen_expert(model):
    found, num_tokens = profile_domain(model.full, examples_of(2, [7, 30]), max_tokens=10**6)
    for layer in moe_layers(model.full.model):
        assert int(found[layer.position].count.sum()) == num_tokens * layer.top_k


def test_statistics_add_up_over_texts(qwen):
    one, other = examples_of(3, [9, 4]), examples_of(4, [6])
    (a, _), (b, _) = (profile_domain(qwen.full, part, 10**6) for part in (one, other))
    both, _ = profile_domain(qwen.full, one + other, 10**6)
    for at in both:
        for name in FIELDS:
            summed = getattr(a[at], name) + getattr(b[at], name)
            assert_near(getattr(both[at], name), summed, 1e-4)


def test_profiling_stops_at_the_token_limit_and_tells_progress(qwen):
    seen: list[int] = []
    _, num_tokens = profile_domain(qwen.full, examples_of(5, [10] * 40), 100, seen.append)
    assert num_tokens == sum(seen) == 100


def test_the_mean_output_is_the_constant_that_loses_least_energy(qwen):
    stats = profile_domain(qwen.full, examples_of(6, [40, 40]), 10**6)[0][0]
    residual = stats.residual_energy()
    assert (residual >= 0).all()
    assert (residual <= stats.energy + 1e-6).all()
    mean = stats.mean_output()
    for other in (mean * 0.9, mean + 0.01, torch.zeros_like(mean)):
        # Σ‖g f − g c‖² = Σ‖g f‖² − 2 c·Σg²f + Σg² ‖c‖²
        loss = (
            stats.energy
            - 2 * (other * stats.output).sum(1)
            + stats.gate_squared * other.square().sum(1)
        )
        assert (loss >= residual - 1e-5).all()


@cache
def two_domains(tiny):
    domains, num_tokens = {}, {}
    for name, seed in (("a", 1), ("b", 2)):
        domains[name], num_tokens[name] = profile_domain(
            tiny.full, examples_of(seed, [12, 9]), 10**6
        )
    return domains, num_tokens


def test_a_mixture_is_the_weighted_mean_per_token(qwen):
    domains, num_tokens = two_domains(qwen)
    profile = Profile(qwen.base.digest, domains, num_tokens)
    mixed = profile.mix({"a": 3.0, "b": 1.0})
    for at in (0, 1):
        expected = 0.75 * domains["a"][at].energy / 21 + 0.25 * domains["b"][at].energy / 21
        assert_near(mixed[at].energy, expected)
        assert float(mixed[at].count.sum()) == pytest.approx(4.0)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=2).filter(lambda w: sum(w) > 0.1))
def test_shares_of_the_stream_are_linear_in_the_mixture(qwen, weights):
    profile = Profile(qwen.base.digest, *two_domains(qwen))
    mixed = profile.relative_energy(dict(zip("ab", weights, strict=True)))
    alone = [profile.relative_energy({name: 1.0}) for name in "ab"]
    for at, found in mixed.items():
        expected = (weights[0] * alone[0][at] + weights[1] * alone[1][at]) / sum(weights)
        assert found == pytest.approx(expected, rel=1e-5)


def test_profiling_leaves_nothing_behind(qwen):
    profile_domain(qwen.full, examples_of(7, [5]), 10**6)
    for layer in moe_layers(qwen.full.model):
        assert expert_state(layer.experts).observer is None
        assert not layer.decoder_layer._forward_hooks


def test_a_profile_survives_the_disk(qwen, tmp_path):
    stats, num_tokens = profile_domain(qwen.full, examples_of(8, [10]), 10**6)
    save_domain(tmp_path / "math.safetensors", qwen.base.digest, stats, num_tokens)
    profile = load_profile(tmp_path, qwen.base.digest)
    assert profile.num_tokens == {"math": num_tokens}
    assert profile.uniform() == {"math": 1.0}
    for at, found in profile.domains["math"].items():
        assert all(torch.equal(getattr(found, n), getattr(stats[at], n)) for n in FIELDS)


def test_a_profile_of_another_base_model_is_refused(qwen, tmp_path):
    stats = {0: ExpertStatistics.zeros(8, 64)}
    save_domain(tmp_path / "math.safetensors", "ab" * 32, stats, 1)
    with pytest.raises(CheckpointError, match=r"math.*profile of base model abababababab, not"):
        load_profile(tmp_path, qwen.base.digest)


def test_a_folder_without_a_profile_says_what_to_do(qwen, tmp_path):
    with pytest.raises(CheckpointError, match="no profile here; profile the base model first"):
        load_profile(tmp_path, qwen.base.digest)


def test_a_file_that_is_no_profile_is_refused_by_name(qwen, tmp_path):
    write_tensors(tmp_path / "math.safetensors", {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"math\.safetensors"):
        load_profile(tmp_path, qwen.base.digest)


def test_damaged_weights_are_found_while_profiling(qwen):
    loaded = load(qwen.full_folder, torch.float32)
    moe_layers(loaded.model)[1].experts.get_parameter("down_proj").data = torch.full(
        (8, 64, 32), float("nan")
    )
    with pytest.raises(CheckpointError, match="statistics are not finite"):
        profile_domain(loaded, examples_of(9, [10]), 10**6)


def test_text_that_is_too_short_for_a_plan_is_refused(qwen):
    # Eight experts, of which a token picks four: 64 tokens are 32 picks per expert.
    require_tokens("math", examples_of(1, [64]), 10**6, qwen.full)
    with pytest.raises(
        DataError, match=r"'math': 63 tokens.*a plan needs 64 tokens, and 256 to be"
    ):
        require_tokens("math", examples_of(1, [63]), 10**6, qwen.full)
    with pytest.raises(DataError, match=r"'math': 40 tokens.*or raise calibration_tokens"):
        require_tokens("math", examples_of(1, [40, 40]), 32, qwen.full)
