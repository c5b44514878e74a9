"""One layer at a time, a model says the same bits as whole; what cannot be cut so is refused."""

import pytest
import torch

from proxymoe.common.checkpoint import Checkpoint
from proxymoe.common.errors import UnsupportedModel
from proxymoe.common.experts import expert_state
from proxymoe.common.model import load
from proxymoe.common.moe import moe_layers
from proxymoe.common.text import TOKENS_PER_BATCH, packed_batches
from proxymoe.server import streamed as module
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.profile import profile_domain
from proxymoe.server.streamed import Streamed
from tests.families import MORE_FAMILIES, SOME
from tests.reference import same_statistics
from tests.server.test_profile import examples_of
from tests.tiny import save_tiny

EXAMPLES = examples_of(1, [128] * 8 + [100, 7])
"""Two batches."""
TOKENS = 8 * 128 + 107


def profiled(streamed, **fields):
    return profile_domain(streamed.loaded, EXAMPLES, 10**6, read=streamed.read, **fields)


@pytest.fixture
def streamed(qwen):
    return Streamed(qwen.base, torch.float32)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in SOME), ("deepseek_v3", torch.bfloat16)],
)
def test_a_streamed_profile_has_the_bits_of_the_whole_models(tiny, family, dtype):
    model = tiny(family)
    expected = profile_domain(load(model.full_folder, dtype), EXAMPLES, 10**6)
    found = profiled(Streamed(model.base, dtype))
    assert found[1] == expected[1] == TOKENS > TOKENS_PER_BATCH
    assert same_statistics(found[0], expected[0])


@pytest.mark.slow
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_a_streamed_profile_has_the_bits_of_every_family_in_a_narrow_type(tiny, family):
    model = tiny(family)
    expected = profile_domain(load(model.full_folder, torch.bfloat16), EXAMPLES, 10**6)
    assert same_statistics(profiled(Streamed(model.base, torch.bfloat16))[0], expected[0])


def test_a_checkpoint_in_a_narrow_type_can_be_profiled_in_a_wide_one(tmp_path):
    folder = save_tiny("deepseek_v3", tmp_path / "bf16", torch.bfloat16, max_shard_size="60KB")
    base = BaseCheckpoint(folder)
    full = load(base.materialise(base.keep_all(), tmp_path / "full"), torch.float32)
    found = profiled(Streamed(base, torch.float32))
    assert same_statistics(found[0], profile_domain(full, EXAMPLES, 10**6)[0])


def test_bits_do_not_depend_on_how_many_batches_share_a_reading(qwen, streamed, monkeypatch):
    together = profiled(streamed)
    monkeypatch.setattr(module, "STATE_BYTES", 1)
    alone = Streamed(qwen.base, torch.float32)
    assert same_statistics(profiled(alone)[0], together[0])


def test_each_weight_is_read_once_for_many_batches_and_then_given_back(qwen, monkeypatch):
    reads: list[str] = []
    read_into = Checkpoint.read_into

    def counted(self, name, buffer, first=0):
        reads.append(name)
        read_into(self, name, buffer, first)

    monkeypatch.setattr(Checkpoint, "read_into", counted)
    streamed = Streamed(qwen.base, torch.float32)
    profiled(streamed)
    assert len(reads) == len(set(reads))
    assert set(reads) == set(qwen.base.checkpoint.ranges) - {"lm_head.weight"}
    layers = streamed.loaded.model.model.layers
    assert all(weight.is_meta for weight in layers.parameters())
    assert all("forward" not in vars(layer) for layer in layers)


def test_only_one_layer_has_weights_at_a_time(qwen, streamed):
    layers, most = streamed.loaded.model.model.layers, []

    def look(*_):
        held = [not next(layer.parameters()).is_meta for layer in layers]
        most.append(sum(held))

    for layer in moe_layers(streamed.loaded.model):
        layer.block.register_forward_hook(look)
    profiled(streamed)
    assert set(most) == {1}


def test_progress_counts_every_batch_in_every_layer(streamed):
    seen = []

    def read(model, batches):
        return streamed.read(model, batches, lambda done, total: seen.append((done, total)))

    profile_domain(streamed.loaded, EXAMPLES, 10**6, read=read)
    assert seen == [(done, 4) for done in (1, 2, 3, 4)]


def test_no_observer_is_left_behind_and_a_second_text_can_follow(streamed):
    first, second = profiled(streamed), profiled(streamed)
    assert same_statistics(first[0], second[0])
    layers = moe_layers(streamed.loaded.model)
    assert all(expert_state(layer.experts).observer is None for layer in layers)


def test_an_interrupted_reading_gives_its_weights_back(streamed):
    def interrupt(_done, _total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(streamed.read(streamed.loaded.model, packed_batches(EXAMPLES), interrupt))
    layers = streamed.loaded.model.model.layers
    assert all(weight.is_meta for weight in layers.parameters())
    assert profiled(streamed)[1] == TOKENS


def test_a_layer_that_depends_on_more_than_it_is_given_is_refused(streamed):
    inner = streamed.loaded.model.model.layers[1].self_attn
    moods = iter(range(100))
    inner.register_forward_hook(lambda _m, _i, out: (out[0] + next(moods), *out[1:]))
    with pytest.raises(UnsupportedModel, match=r"Qwen2MoeForCausalLM: layer 1 is told more.*whole"):
        profiled(streamed)


def test_layers_that_are_asked_in_another_order_are_refused(streamed):
    layers = streamed.loaded.model.model.layers
    layers._modules = dict(reversed(list(layers._modules.items())))
    with pytest.raises(UnsupportedModel, match="layer 0 comes after layer 1"):
        profiled(streamed)


def test_a_layer_that_is_never_asked_is_refused(streamed, monkeypatch):
    monkeypatch.setattr(streamed.loaded.model.model.config, "num_hidden_layers", 1)
    with pytest.raises(UnsupportedModel, match="layer 1 is never asked"):
        profiled(streamed)
