"""The loss is cross entropy on completions, whatever chunks it is computed in."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from proxymoe.common.adapter import adapter_layout
from proxymoe.common.attach import AttachedAdapter
from proxymoe.common.experts import only_valid_tokens
from proxymoe.common.loss import CHUNK_ROWS, completion_loss, only_predicted, token_quality
from proxymoe.common.moe import moe_layers
from proxymoe.common.text import IGNORED, Example, collate, packed_batches
from tests.tiny import assert_near, some_tokens

LENGTHS = [(30, 1), (96, 90), (120, 7), (5, 4), (120, 1)]


def examples_of(lengths=LENGTHS):
    tokens = some_tokens(len(lengths), max(length for length, _ in lengths)).tolist()
    return [Example(tuple(t[:n]), at) for t, (n, at) in zip(tokens, lengths, strict=True)]


def by_hand(model, examples):
    """(summed loss, right tokens, tokens), one sequence at a time from whole logits."""
    total, right, count = torch.zeros(()), 0, 0
    for example in examples:
        tokens = torch.tensor([example.tokens])
        logits = model(tokens, use_cache=False).logits[0, example.start - 1 : -1]
        goal = tokens[0, example.start :]
        total = total + F.cross_entropy(logits, goal, reduction="sum")
        right += int((logits.argmax(-1) == goal).sum())
        count += len(goal)
    return total, right, count


def test_the_loss_is_the_mean_cross_entropy_of_completion_tokens(model):
    batch = collate(examples_of())
    assert batch.targets.numel() > CHUNK_ROWS
    total, _, count = by_hand(model.stock, examples_of())
    assert_near(completion_loss(model.full.model, batch), total / count)


def loss_and_gradient(model, examples, narrow, checkpointed=False):
    layout = adapter_layout(model.base.skeleton, ("attention", "shared", "experts"), 4, 0)
    start = 0.05 * torch.randn(layout.size, generator=torch.Generator().manual_seed(2))
    vector, batch, network = start.requires_grad_(), collate(examples), model.full.model
    if checkpointed:
        network.activation_checkpointing_enable({"use_reentrant": False})
        network.disable_input_require_grads()  # only reentrant checkpoints need it
        network.train()
    narrowed = only_predicted(network, batch) if narrow else contextlib.nullcontext()
    try:
        with AttachedAdapter(network, layout) as adapter, only_valid_tokens(batch.valid), narrowed:
            adapter.bind(vector)
            loss = completion_loss(network, batch)
            loss.backward()
    finally:
        network.activation_checkpointing_disable()
        network.eval()
    assert vector.grad is not None
    return loss.detach(), vector.grad / vector.grad.norm()


@pytest.mark.parametrize(
    ("lengths", "checkpointed"),
    [([(60, 50), (60, 1)], False), ([(64, 60)] * 8, False), (LENGTHS, False), (LENGTHS, True)],
)
def test_the_last_block_is_only_needed_where_a_token_is_predicted(model, lengths, checkpointed):
    whole, narrow = (
        loss_and_gradient(model, examples_of(lengths), narrow, checkpointed)
        for narrow in (False, True)
    )
    assert_near(narrow[0], whole[0])
    assert_near(narrow[1], whole[1], 1e-6)


def test_the_last_block_sees_fewer_tokens(model):
    batch = collate(examples_of([(64, 60)] * 8))
    rows = []
    layers = moe_layers(model.full.model)
    handles = [
        layer.router.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[-2]))
        for layer in layers
    ]
    with only_predicted(model.full.model, batch):
        completion_loss(model.full.model, batch)
    completion_loss(model.full.model, batch)
    for handle in handles:
        handle.remove()
    half = len(layers)
    assert rows[half - 1] == batch.where.numel() < rows[-1]
    assert rows[: half - 1] == rows[half:-1]


def test_the_gradient_is_that_of_the_mean_cross_entropy(model):
    layout = adapter_layout(model.base.skeleton, ("attention", "experts"), 4, 0)
    start = 0.05 * torch.randn(layout.size, generator=torch.Generator().manual_seed(2))
    gradients = []
    for chunked in (True, False):
        vector = start.clone().requires_grad_()
        with AttachedAdapter(model.full.model, layout) as adapter:
            adapter.bind(vector)
            if chunked:
                loss = completion_loss(model.full.model, collate(examples_of()))
            else:
                total, _, count = by_hand(model.full.model, examples_of())
                loss = total / count
            loss.backward()
        assert vector.grad is not None
        gradients.append(vector.grad)
    ours, expected = gradients
    assert_near(ours / expected.norm(), expected / expected.norm(), 1e-5)


def test_a_scaled_loss_has_a_scaled_gradient(qwen):
    layout = adapter_layout(qwen.base.skeleton, ("attention",), 4, 0)
    gradients = []
    for scale in (1.0, 4.0):
        vector = layout.zeros().requires_grad_()
        with AttachedAdapter(qwen.full.model, layout) as adapter:
            adapter.bind(vector)
            (scale * completion_loss(qwen.full.model, collate(examples_of()))).backward()
        assert vector.grad is not None
        gradients.append(scale * vector.grad)
    assert torch.equal(16.0 * gradients[0], gradients[1])


def test_quality_is_the_mean_over_tokens_however_they_are_batched(model):
    total, right, count = by_hand(model.stock, examples_of())
    for size in (1, 256, 4096):
        found = token_quality(model.full.model, packed_batches(examples_of(), size))
        assert found.loss == pytest.approx(float(total / count), rel=1e-5)
        assert found.accuracy == right / count


def test_quality_and_loss_agree_on_one_batch(model):
    batch = collate(examples_of())
    found = token_quality(model.full.model, [batch])
    assert found.loss == pytest.approx(float(completion_loss(model.full.model, batch)), rel=1e-6)


def test_a_model_that_is_always_right_has_accuracy_one(qwen):
    tokens = some_tokens(1, 20)
    picks = qwen.stock(tokens, use_cache=False).logits[0].argmax(-1)
    batch = collate([Example(tuple(tokens[0].tolist()), 1)])
    real = batch.targets != IGNORED
    batch.targets[real] = picks[:-1]
    assert token_quality(qwen.full.model, [batch]).accuracy == 1.0


def test_one_token_is_enough(qwen):
    batch = collate([Example((5, 6), 1)])
    assert torch.isfinite(completion_loss(qwen.full.model, batch))
    assert token_quality(qwen.full.model, [batch]).accuracy in (0.0, 1.0)
