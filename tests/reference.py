"""What plain transformers makes of an adapter, of examples one by one, and of a gradient.

And what equal means for two profiles.
"""

from dataclasses import fields

import torch
import torch.nn.functional as F

from proxymoe.common.adapter import delta_weight
from proxymoe.common.moe import moe_layers
from proxymoe.common.text import Example
from proxymoe.server.profile import ExpertStatistics
from tests.tiny import logits, some_tokens

LENGTHS = [(30, 1), (41, 33), (9, 4), (5, 4)]
"""Tokens of each example, and where its completion starts."""


def examples_of():
    """Short and long examples, with long and short completions."""
    tokens = some_tokens(len(LENGTHS), 41).tolist()
    return [Example(tuple(t[:n]), at) for t, (n, at) in zip(tokens, LENGTHS, strict=True)]


def mean_loss_alone(network, examples):
    """Nats per completion token, with every example in a batch of its own."""
    total, count = torch.zeros(()), 0
    for example in examples:
        tokens = torch.tensor([example.tokens])
        scores = logits(network, tokens)[0, example.start - 1 : -1]
        total += F.cross_entropy(scores, tokens[0, example.start :], reduction="sum")
        count += example.num_targets
    return total / count


def merged_weights(network, layout, vector):
    """W + ΔW by name, differentiable in the vector."""
    own = dict(network.named_parameters())
    transposed = {f"{at.name}.experts": at.transposed for at in moe_layers(network)}
    weights, stacks = dict[str, torch.Tensor](), dict[str, list[torch.Tensor]]()
    for block, trained in zip(layout.blocks, layout.trained_factors(vector), strict=True):
        delta = delta_weight(block, trained, layout.rank, layout.seed)
        if block.expert is None:
            weights[f"{block.module}.weight"] = own[f"{block.module}.weight"] + delta
        else:
            turned = transposed[block.module.rpartition(".")[0]]
            stacks.setdefault(block.module, []).append(delta.T if turned else delta)
    return weights | {name: own[name] + torch.stack(parts) for name, parts in stacks.items()}


def direction_of_gradient(network):
    """The gradient of the squared logits by the embedded tokens, of length 1."""
    embedded = network.get_input_embeddings()(some_tokens()).detach().requires_grad_()
    network(inputs_embeds=embedded, use_cache=False).logits.square().sum().backward()
    return embedded.grad / embedded.grad.norm()


def same_statistics(one, other):
    """Whether two layers-to-statistics maps hold the same bits."""
    names = [field.name for field in fields(ExpertStatistics)]
    return set(one) == set(other) and all(
        torch.equal(getattr(one[at], name), getattr(other[at], name))
        for at in one
        for name in names
    )
