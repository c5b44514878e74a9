"""How experts relate: equal to sums written by hand, and additive."""

import pytest
import torch

from proxymoe.common.checkpoint import write_tensors
from proxymoe.common.errors import CheckpointError
from proxymoe.common.moe import moe_layers
from proxymoe.server.profile import profile_domain
from proxymoe.server.relations import (
    Relations,
    load_relations,
    mixed,
    relate_domain,
    save_relations,
)
from tests.server.test_profile import examples_of
from tests.tiny import assert_near

FIELDS = ("probability", "together", "logits", "output", "mass", "cross", "square", "seen")


def by_hand(model, examples):
    """The same sums, one sequence and one token at a time, on the stock backend."""
    layers = moe_layers(model)
    sums = {layer.position: Relations.zeros(8, 64) for layer in layers}
    scores = dict[int, torch.Tensor]()

    def hook(layer):
        def watch(experts, args):
            for hidden, index, gates, logits in zip(*args, scores[layer.position], strict=True):
                outputs = []
                for expert in range(8):
                    gated, up = (experts.gate_up_proj[expert] @ hidden).chunk(2)
                    outputs.append(experts.down_proj[expert] @ (experts.act_fn(gated) * up))
                found, p = sums[layer.position], logits.softmax(-1)
                for i in range(8):
                    weight = sum(float(g) ** 2 for e, g in zip(index, gates, strict=True) if e == i)
                    found.probability[i] += p[i]
                    found.output[i] += outputs[i]
                    found.mass[i] += weight
                    for j in range(8):
                        found.together[i, j] += p[i] * p[j]
                        found.logits[i, j] += logits[i] * logits[j]
                        found.cross[i, j] += weight * outputs[i] @ outputs[j]
                        found.square[i, j] += weight * outputs[j] @ outputs[j]
                        found.seen[i, j] += weight * outputs[j]

        return watch

    for layer in layers:

        def keep(_router, _inputs, output, layer=layer):
            scores[layer.position] = output[0].reshape(-1, 8)

        layer.router.register_forward_hook(keep)
        layer.experts.register_forward_pre_hook(hook(layer))
    with torch.no_grad():
        for example in examples:
            model(torch.tensor([example.tokens]), use_cache=False)
    return sums


def test_relations_equal_sums_by_hand_and_see_no_padding(qwen):
    examples = examples_of(1, [5, 11, 8])
    found, num_tokens = relate_domain(qwen.full, examples)
    expected = by_hand(qwen.stock, examples)
    assert num_tokens == 24
    for at, relations in found.items():
        for name in FIELDS:
            assert_near(getattr(relations, name), getattr(expected[at], name), 1e-4)


def test_an_experts_own_energy_is_that_of_the_profile(model):
    examples = examples_of(2, [7, 30])
    found, _ = relate_domain(model.full, examples)
    statistics, _ = profile_domain(model.full, examples, 10**6)
    for at, relations in found.items():
        assert_near(relations.square.diagonal(), statistics[at].energy, 1e-4)
        assert_near(relations.cross.diagonal(), statistics[at].energy, 1e-4)
        assert_near(relations.mass, statistics[at].gate_squared, 1e-4)
        assert_near(relations.seen.diagonal(dim1=0, dim2=1).T, statistics[at].output, 1e-4)


def test_relations_add_up_over_texts_and_survive_the_disk(qwen, tmp_path):
    one, other = examples_of(3, [9, 4]), examples_of(4, [6])
    parts = [relate_domain(qwen.full, part)[0] for part in (one, other)]
    both, num_tokens = relate_domain(qwen.full, one + other)
    save_relations(tmp_path / "both.safetensors", both, num_tokens)
    again, tokens = load_relations(tmp_path / "both.safetensors")
    summed = mixed([(1.0, parts[0]), (1.0, parts[1])])
    assert tokens == num_tokens == 19
    for at in both:
        for name in FIELDS:
            assert_near(getattr(summed[at], name), getattr(both[at], name), 1e-4)
            assert torch.equal(getattr(again[at], name), getattr(both[at], name))


def test_looking_leaves_no_trace(qwen):
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in qwen.full.model.modules()]
    relate_domain(qwen.full, examples_of(1, [5]))
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in qwen.full.model.modules()]
    assert before == after


def test_a_file_without_relations_is_refused(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"0.cross": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"no 0\.logits; remove it and profile"):
        load_relations(tmp_path / "x.safetensors")
