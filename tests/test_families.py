"""The laws of a family, each once, for the families that the other tests leave out.

What the tests beside the code say of the representative families in detail, is said here of every
other family in short: one small model each, made once.
"""

from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel
from torch.func import functional_call

from proxymoe.client.train import tune
from proxymoe.common.adapter import adapter_layout
from proxymoe.common.attach import AttachedAdapter
from proxymoe.common.checkpoint import WEIGHTS, read_tensors, write_tensors
from proxymoe.common.config import TrainSettings
from proxymoe.common.errors import UnsupportedModel
from proxymoe.common.experts import install_backend, only_valid_tokens
from proxymoe.common.loss import completion_loss, token_quality
from proxymoe.common.model import TABLES_FILE, load
from proxymoe.common.moe import attention_linears, moe_layers, slice_router, writes_to_stream
from proxymoe.common.peft_format import export_peft, import_peft
from proxymoe.common.plan import LayerPlan, Others, Plan, RouterMode
from proxymoe.common.text import collate
from proxymoe.server.base import BaseCheckpoint, meta_model
from proxymoe.server.merge import merge
from proxymoe.server.profile import profile_domain
from proxymoe.server.streamed import Streamed
from tests.families import MORE_FAMILIES
from tests.reference import (
    LENGTHS,
    examples_of,
    mean_loss_alone,
    merged_weights,
    same_statistics,
)
from tests.tiny import (
    assert_near,
    logits,
    some_tokens,
    stock,
    tiny_model,
)

KEPT = (1, 2, 4, 7)
OTHERS = tuple(expert for expert in range(8) if expert not in KEPT)

EXPECTED = {
    # family: (decoder layers, block, K, I, {router tensor: dimension of the experts}, shared)
    "glm4_moe": ([1, 2], "mlp", 2, 32, {"gate.weight": 0, "gate.e_score_correction_bias": 0}, 3),
    "dots1": ([1, 2], "mlp", 2, 32, {"gate.weight": 0, "gate.e_score_correction_bias": 0}, 3),
    "ernie4_5_moe": (
        [1, 2],
        "mlp",
        3,
        32,
        {"gate.weight": 0, "gate.moe_statics.e_score_correction_bias": 1},
        3,
    ),
    "hunyuan_v1_moe": ([0, 1], "mlp", 2, 32, {"gate.wg.weight": 0}, 3),
    "minimax": ([0, 1], "mlp", 2, 48, {"gate.weight": 0}, 0),
    "phimoe": ([0, 1], "mlp", 2, 48, {"router.weight": 0}, 0),
    "qwen3_next": ([0, 1], "mlp", 4, 32, {"gate.weight": 0}, 3),
    "granitemoe": ([0, 1], "block_sparse_moe", 3, 48, {"router.weight": 0}, 0),
    "granitemoeshared": ([0, 1], "block_sparse_moe", 3, 48, {"router.weight": 0}, 2),
    "lfm2_moe": ([1, 2], "feed_forward", 2, 32, {"gate.weight": 0, "expert_bias": 0}, 0),
    "jamba": ([1, 3], "feed_forward", 2, 48, {"router.weight": 0}, 0),
    "gpt_oss": ([0, 1], "mlp", 2, 48, {"router.weight": 0, "router.bias": 0}, 0),
}


@pytest.fixture(params=MORE_FAMILIES)
def model(request, tiny):
    """The tiny checkpoint of each of these families in turn."""
    return tiny(request.param)


def plan_of(model, **fields):
    layers = {at: LayerPlan(num_experts=8, kept=KEPT) for at in model.base.num_experts}
    return Plan(base=model.base.digest, layers=layers, **fields)


def layout_of(model, rank=4):
    return adapter_layout(model.base.skeleton, ("attention", "shared", "experts"), rank, 3)


def random_vector(layout):
    return 0.1 * torch.randn(layout.size, generator=torch.Generator().manual_seed(0))


def one_expert(experts, expert, hidden):
    """(T, D) outputs of one expert before gating, written out."""
    gate_up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
    if not experts.is_transposed:
        gate_up, down = gate_up.T, down.T
    inner = hidden @ gate_up
    if experts.has_bias:
        inner = inner + experts.gate_up_proj_bias[expert]
    output = experts._apply_gate(inner) @ down
    return output + experts.down_proj_bias[expert] if experts.has_bias else output


@contextmanager
def parametrised(module, tensors):
    """Within the block, the module has these tensors in place of its own."""
    own = {name: getattr(module, name).data for name in tensors}
    for name, tensor in tensors.items():
        getattr(module, name).data = tensor
    yield
    for name, tensor in own.items():
        getattr(module, name).data = tensor


def replaced(model, contribution):
    """Logits of stock transformers with another sum over experts.

    Args:
        model: the tiny checkpoint.
        contribution: (layer number, experts, expert, tokens) to outputs before gating.
    """

    def forward_of(layer):
        def forward(hidden, index, gates):
            total = torch.zeros_like(hidden)
            for expert in range(8):
                gate = (gates * (index == expert)).sum(-1, keepdim=True)
                total += gate * contribution(layer.position, layer.experts, expert, hidden)
            return total

        return forward

    other = stock(model.folder)
    for layer in moe_layers(other):
        layer.experts.forward = forward_of(layer)
    return logits(other)


SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
REFUSED = [
    (
        transformers.Llama4TextConfig(num_local_experts=4, intermediate_size_mlp=16, **SMALL),
        r"feed_forward: experts Llama4TextExperts with has_gate=unknown",
    ),
    (
        transformers.Gemma4TextConfig(
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=16,
            vocab_size_per_layer_input=32,
            **SMALL,
        ),
        r"layers\.0: router and experts are children of the decoder layer itself",
    ),
    (
        transformers.DbrxConfig(
            d_model=16,
            n_heads=2,
            n_layers=2,
            vocab_size=32,
            attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
        ),
        r"ffn: experts hold \[\]; supported are gated experts fused",
    ),
]


@pytest.mark.parametrize(("config", "reason"), REFUSED, ids=lambda value: str(value)[:14])
def test_other_families_are_refused_with_the_reason(config, reason):
    with pytest.raises(UnsupportedModel, match=reason):
        moe_layers(meta_model(config))


def test_a_family_of_sequence_to_sequence_is_refused():
    with pytest.raises(UnsupportedModel, match="switch_transformers: no causal language model"):
        meta_model(transformers.SwitchTransformersConfig())


def test_every_family_is_expected():
    assert set(EXPECTED) == set(MORE_FAMILIES)


def test_layers_and_shapes_are_found(model):
    positions, name, top_k, inner, router, shared = EXPECTED[model.family]
    for network in (model.full.model, model.base.skeleton):
        layers = moe_layers(network)
        assert [layer.position for layer in layers] == positions
        for layer in layers:
            assert layer.name == f"model.layers.{layer.position}.{name}"
            assert (layer.num_experts, layer.num_routed, layer.top_k) == (8, 8, top_k)
            assert (layer.hidden_size, layer.inner_size) == (64, inner)
            assert layer.router_tensors() == router
            assert len(list(layer.shared_expert_linears())) == shared
    paths = [path for path, _ in attention_linears(model.base.skeleton)]
    assert sum(map(writes_to_stream, paths)) == model.base.config.num_hidden_layers


def test_every_tensor_on_disk_is_held_once(model):
    base = model.base
    sizes = dict.fromkeys(base.checkpoint.ranges, 0)
    for piece in base.pieces:
        sizes[piece.source] += piece.num_bytes
    assert sizes == {name: place.num_bytes for name, place in base.checkpoint.ranges.items()}
    experts = sum(base.num_experts[at] * size for at, size in base.expert_bytes.items())
    assert base.trunk_bytes + experts == base.num_bytes


def test_keeping_all_reproduces_the_stock_logits(model):
    reference = stock(model.folder)
    assert_near(logits(model.full.model), logits(reference))
    install_backend(reference)
    assert torch.equal(logits(model.full.model), logits(reference))


def test_kept_weights_are_byte_identical(model, tmp_path):
    folder = model.base.materialise(plan_of(model), tmp_path / "cut")
    found, full = read_tensors(folder / WEIGHTS), read_tensors(model.full_folder / WEIGHTS)
    assert set(found) == set(full)
    state = model.stock.state_dict()
    for name, tensor in found.items():
        expected = full[name][list(KEPT)] if ".experts." in name else full[name]
        assert torch.equal(tensor, expected), name
        assert torch.equal(full[name], state[name]), name


def test_dropped_experts_are_silent(model, tmp_path):
    cut = load(model.base.materialise(plan_of(model), tmp_path / "cut"))

    def silent(_, experts, expert, hidden):
        output = one_expert(experts, expert, hidden)
        return output if expert in KEPT else torch.zeros_like(output)

    assert_near(logits(cut.model), replaced(model, silent))


def test_mean_vectors_stand_in_for_experts(model, tmp_path):
    generator = torch.Generator().manual_seed(3)
    offsets = {f"{at}.offset": torch.randn(8, 64, generator=generator) for at in model.base.layers}
    for table in offsets.values():
        table[list(KEPT)] = 0.0
    plan = plan_of(model, others=Others.MEAN, tables="00")
    folder = model.base.materialise(plan, tmp_path / "cut")
    write_tensors(folder / TABLES_FILE, offsets)

    def constant(at, experts, expert, hidden):
        return (
            one_expert(experts, expert, hidden)
            if expert in KEPT
            else offsets[f"{at}.offset"][expert]
        )

    assert_near(logits(load(folder).model), replaced(model, constant))


def test_kept_experts_imitate_others_and_are_adapted_for_their_own_tokens(model, tmp_path):
    generator = torch.Generator().manual_seed(4)
    scale, offset = torch.ones(8), torch.randn(8, 64, generator=generator)
    scale[list(OTHERS)] = torch.tensor([0.5, -0.7, 1.1, 2.0])
    offset[list(KEPT)] = 0.0
    stands_for = dict(zip(OTHERS, (1, 1, 7, 4), strict=True))
    layers = {
        at: LayerPlan(num_experts=8, kept=KEPT, stands_for=stands_for) for at in model.base.layers
    }
    plan = Plan(base=model.base.digest, layers=layers, others=Others.AFFINE, tables="00")
    folder = model.base.materialise(plan, tmp_path / "cut")
    tables = {f"{at}.scale": scale for at in layers} | {f"{at}.offset": offset for at in layers}
    write_tensors(folder / TABLES_FILE, tables)
    cut = load(folder)

    def imitated(_, experts, expert, hidden):
        stand = stands_for.get(expert, expert)
        return scale[expert] * one_expert(experts, stand, hidden) + offset[expert]

    assert_near(logits(cut.model), replaced(model, imitated))
    layout = adapter_layout(model.base.skeleton, ("experts",), 4, 3)
    held, vector = layout.held_under(plan), random_vector(layout)
    weights = merged_weights(model.stock, layout, vector)

    def adapted(at, experts, expert, hidden):
        if expert not in KEPT:
            return imitated(at, experts, expert, hidden)
        path = f"{model.base.layers[at].name}.experts"
        changed = {leaf: weights[f"{path}.{leaf}"] for leaf in ("gate_up_proj", "down_proj")}
        with parametrised(experts, changed):
            return one_expert(experts, expert, hidden)

    with AttachedAdapter(cut.model, held) as adapter:
        adapter.bind(held.take_from(layout, vector))
        assert_near(logits(cut.model), replaced(model, adapted))


def test_a_sliced_router_chooses_among_the_kept(model, tmp_path):
    folder = model.base.materialise(plan_of(model, router=RouterMode.SLICED), tmp_path / "cut")
    cut, chosen = load(folder), []
    for layer, whole in zip(moe_layers(cut.model), moe_layers(model.full.model), strict=True):
        assert (layer.num_experts, layer.num_routed) == (len(KEPT), len(KEPT))
        for name, dim in whole.router_tensors().items():
            rows = whole.block.state_dict()[name].index_select(dim, torch.tensor(KEPT))
            assert torch.equal(layer.block.state_dict()[name], rows)
        layer.router.register_forward_hook(lambda *call: chosen.append(call[-1][-1]))
    assert bool(torch.isfinite(logits(cut.model)).all())
    assert len(chosen) == 2
    assert all(0 <= int(ids.min()) <= int(ids.max()) < len(KEPT) for ids in chosen)


@pytest.mark.parametrize(
    ("family", "kind"), [("glm4_moe", "group-limited"), ("phimoe", "sparse-mixer")]
)
def test_a_router_that_looks_at_two_is_not_sliced_down_to_one_row(family, kind):
    layer = moe_layers(tiny_model(family))[0]
    with pytest.raises(UnsupportedModel, match=rf"a sliced {kind} router needs at least 2"):
        slice_router(layer, 1)


def test_padding_never_changes_a_valid_token(model):
    valid = torch.ones(2, 32, dtype=torch.bool)
    valid[:, 20:] = False
    tokens = some_tokens(2, 32).masked_fill(~valid, 0)
    with only_valid_tokens(valid):
        beside_padding = logits(model.full.model, tokens)[:, :20]
    assert_near(beside_padding, logits(model.full.model, tokens[:, :20]))


def test_the_loss_is_that_of_every_example_alone(model):
    batch = collate(examples_of())
    assert batch.tokens.shape[0] < len(LENGTHS)
    expected = mean_loss_alone(model.stock, examples_of())
    assert_near(completion_loss(model.full.model, batch), expected)
    assert token_quality(model.full.model, [batch]).loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_tuning_step_follows_the_gradient_of_the_changed_weights(model, checkpointing):
    layout = layout_of(model)
    start = random_vector(layout)
    settings = TrainSettings(
        steps=1,
        batch_size=len(LENGTHS),
        optimizer="sgd",
        learning_rate=1.0,
        gradient_clip=1e9,
        warmup_steps=0,
        decay=False,
        gradient_checkpointing=checkpointing,
    )
    tuned = tune(model.full, layout, start, examples_of(), settings, np.random.default_rng(0))
    vector = start.clone().requires_grad_()
    weights = merged_weights(model.stock, layout, vector)
    total, count = torch.zeros(()), 0
    for example in examples_of():
        tokens = torch.tensor([example.tokens])
        output = functional_call(model.stock, weights, (tokens,), {"use_cache": False})
        scores = output.logits[0, example.start - 1 : -1]
        total = total + F.cross_entropy(scores, tokens[0, example.start :], reduction="sum")
        count += example.num_targets
    (total / count).backward()
    assert tuned.losses[0] == pytest.approx(float(total.detach()) / count, rel=1e-5)
    assert vector.grad is not None
    norm = vector.grad.norm()
    assert_near((start - tuned.vector) / norm, vector.grad / norm, 2e-6)
    assert not any(module.training for module in model.full.model.modules())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_adapter_equals_plain_peft(model, tmp_path):
    layout = layout_of(model)
    vector = random_vector(layout)
    folder = export_peft(layout, vector, tmp_path, str(model.folder))
    loaded = PeftModel.from_pretrained(stock(model.folder), folder)
    with AttachedAdapter(model.full.model, layout) as adapter:
        adapter.bind(vector)
        found = logits(model.full.model)
    assert (found - logits(model.stock)).abs().max() > 0.05
    assert_near(logits(loaded), found)
    assert torch.equal(import_peft(layout, folder), vector)


def test_the_merged_model_reloads_in_plain_transformers(model, tmp_path):
    layout = layout_of(model)
    vector = random_vector(layout)
    with AttachedAdapter(model.full.model, layout) as adapter:
        adapter.bind(vector)
        expected = logits(model.full.model)
    folder = merge(model.base, layout, vector, tmp_path / "merged")
    assert_near(logits(stock(folder)), expected, 2e-5)
    untouched = merge(model.base, layout, layout.zeros(), tmp_path / "zero")
    assert BaseCheckpoint(untouched).digest == model.base.digest


def test_a_layer_at_a_time_the_profile_has_the_same_bits(model):
    streamed = Streamed(model.base, torch.float32)
    found, _ = profile_domain(streamed.loaded, examples_of(), 10**6, read=streamed.read)
    assert same_statistics(found, profile_domain(model.full, examples_of(), 10**6)[0])


def test_the_profile_is_a_sum_over_routed_tokens(model):
    examples = examples_of()
    found, num_tokens = profile_domain(model.full, examples, max_tokens=10**6)
    energy = {at: torch.zeros(8) for at in found}
    stream = {at: torch.zeros(1) for at in found}

    def watch(experts, args, at):
        hidden, index, gates = args
        for expert in range(8):
            gate = (gates * (index == expert)).sum(-1, keepdim=True)
            energy[at][expert] += (gate * one_expert(experts, expert, hidden)).square().sum()

    def leave(_layer, _inputs, output, at):
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        stream[at] += hidden.square().sum(-1).reciprocal().sum()

    handles = [
        hook(partial(watched, at=layer.position))
        for layer in moe_layers(model.stock)
        for hook, watched in (
            (layer.experts.register_forward_pre_hook, watch),
            (layer.decoder_layer.register_forward_hook, leave),
        )
    ]
    for example in examples:
        logits(model.stock, torch.tensor([example.tokens]))
    for handle in handles:
        handle.remove()
    for layer in moe_layers(model.stock):
        stats = found[layer.position]
        assert int(stats.count.sum()) == num_tokens * layer.top_k
        assert_near(stats.energy, energy[layer.position], 1e-4)
        assert_near(stats.stream, stream[layer.position], 1e-4)
