"""A dense model in, a mixture-of-experts checkpoint out, layer by layer.

The mixture is a Qwen2-MoE where experts share a part, and a Mixtral where they do not: both have
Llama's attention, norms and gated MLP, and gates that sum to one, so everything but the MLPs is
taken over as it is. `server/upcycle.py` has the maths of one layer.

Shapes: T tokens, D hidden size.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)

from proxymoe.common.attention import install_attention
from proxymoe.common.errors import CheckpointError, DataError
from proxymoe.common.experts import install_backend
from proxymoe.common.loss import token_quality
from proxymoe.common.text import Batch, Example, packed_batches
from proxymoe.server.dense import DenseModel
from proxymoe.server.recipe import ExpertKind, Recipe
from proxymoe.server.upcycle import (
    DenseMLP,
    copied,
    directions,
    evened,
    healed,
    routed_by_output,
    split,
)

MIN_TOKENS_PER_EXPERT = 64
"""Text that k-means needs for every expert."""
SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""Settings that mean the same in the dense family and in the mixtures."""

Progress = Callable[[int, int], None]


def upcycle(
    dense: DenseModel,
    text: Sequence[Example],
    recipe: Recipe,
    rng: np.random.Generator,
    target: Path,
    progress: Progress = lambda _done, _total: None,
) -> Path:
    """Writes the dense model as a mixture of experts to `target`, and returns it.

    The folder appears whole or not at all. One layer is worked on at a time.

    Raises:
        CheckpointError: `target` exists already.
        ConfigError: the recipe does not fit the model.
        DataError: too little text for so many experts.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists; upcycle into a new folder")
    wanted = recipe.num_experts * MIN_TOKENS_PER_EXPERT
    if (tokens := sum(len(example.tokens) for example in text)) < wanted:
        raise DataError(
            f"{tokens} tokens of text for {recipe.num_experts} experts; at least {wanted} are "
            "needed to tell which tokens belong together"
        )
    config = mixture_config(dense.model.config, recipe)
    weights = {n: t for n, t in dense.model.state_dict().items() if ".mlp." not in n}
    layers = _upcycled_layers(dense.model, packed_batches(text), recipe, rng)
    total = len(_decoder(dense.model).layers)
    for number, block in enumerate(layers):
        weights |= {f"model.layers.{number}.mlp.{name}": t for name, t in block.items()}
        progress(number + 1, total)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dense.model.dtype)
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        dense.tokenizer.save_pretrained(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def losses(dense: DenseModel, mixture: Path, text: Sequence[Example]) -> tuple[float, float]:
    """The losses of the dense model and of the mixture in a folder, nats per token of the text."""
    made = AutoModelForCausalLM.from_pretrained(
        mixture, attn_implementation="eager", dtype="auto", local_files_only=True
    )
    made.requires_grad_(False).eval()
    install_backend(made)
    install_attention(made)
    batches = packed_batches(text)
    return token_quality(dense.model, batches).loss, token_quality(made, batches).loss


def mixture_config(dense: PretrainedConfig, recipe: Recipe) -> PretrainedConfig:
    """The config of the mixture that a dense config becomes.

    Raises:
        ConfigError: the recipe does not fit the number of neurons.
    """
    settings = {name: getattr(dense, name) for name in SAME if hasattr(dense, name)}
    neurons, top_k = int(dense.intermediate_size), recipe.top_k
    shared = recipe.num_shared(neurons)
    each = neurons
    if recipe.expert is ExpertKind.SPLIT:
        each = (neurons - shared) // recipe.num_experts
    if not shared:
        return MixtralConfig(
            **settings,
            intermediate_size=each,
            num_local_experts=recipe.num_experts,
            num_experts_per_tok=top_k,
            sliding_window=None,
        )
    return Qwen2MoeConfig(
        **settings,
        intermediate_size=neurons,
        moe_intermediate_size=each,
        shared_expert_intermediate_size=shared,
        num_experts=recipe.num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        qkv_bias=False,
    )


def _upcycled_layers(
    model: PreTrainedModel, batches: Sequence[Batch], recipe: Recipe, rng: np.random.Generator
) -> Iterator[dict[str, Tensor]]:
    """The MoE tensors of each layer in turn.

    Two streams of hidden states go up through the layers, the dense model's and the mixture's.
    A layer is healed such that the second comes back to the first, errors of lower layers
    included.
    """
    decoder = _decoder(model)
    valid = torch.cat([batch.valid.flatten() for batch in batches])
    embedded = torch.cat([decoder.embed_tokens(batch.tokens).flatten(0, 1) for batch in batches])
    texts = _text_means(embedded, batches)
    masks = [batch.attention_mask(embedded.dtype) for batch in batches]
    dense = mixed = embedded
    for layer in decoder.layers:
        mlp = _dense_mlp(layer.mlp)
        layer.mlp, own = _Recorder(), layer.mlp
        try:
            dense, states = _before_mlp(decoder, layer, batches, masks, dense)
            dense = dense + mlp(states)
            if recipe.expert is ExpertKind.SPLIT:
                mixed, states = _before_mlp(decoder, layer, batches, masks, mixed)
        finally:
            layer.mlp = own
        seen = states[valid]
        rows = evened(directions(recipe.router, recipe.num_experts, seen, texts, rng), seen)
        if recipe.expert is ExpertKind.COPY:
            yield copied(mlp, rows, recipe.noise, rng)
            continue
        neurons = mlp.neurons(seen)
        found = split(mlp, seen, neurons, rows, recipe)
        if recipe.heal:
            found = routed_by_output(found, seen, neurons, recipe.ridge)
            found = healed(found, seen, neurons, (dense - mixed)[valid], recipe.ridge)
        mixed[valid] += found(seen, neurons)
        yield found.weights()


class _Recorder(nn.Module):
    """Stands where an MLP was: remembers what goes in, and adds nothing."""

    def forward(self, states: Tensor) -> Tensor:
        self.states = states
        return torch.zeros_like(states)


@torch.no_grad()
def _before_mlp(
    decoder: Any, layer: Any, batches: Sequence[Batch], masks: Sequence[Tensor], stream: Tensor
) -> tuple[Tensor, Tensor]:
    """(T, D) each: the stream after attention, and what enters the MLP."""
    residual, states, first = [], [], 0
    for batch, mask in zip(batches, masks, strict=True):
        hidden = stream[first : first + batch.tokens.numel()].unflatten(0, batch.tokens.shape)
        first += batch.tokens.numel()
        output = layer(
            hidden,
            attention_mask=mask,
            position_ids=batch.positions,
            position_embeddings=decoder.rotary_emb(hidden, batch.positions),
        )
        residual.append(output.flatten(0, 1))
        states.append(layer.mlp.states.flatten(0, 1))
    return torch.cat(residual), torch.cat(states)


def _text_means(embedded: Tensor, batches: Sequence[Batch]) -> Tensor:
    """(N, D) the mean token embedding of every text."""
    means, first = [], 0
    for batch in batches:
        rows = embedded[first : first + batch.tokens.numel()].float()
        first += batch.tokens.numel()
        most = int(batch.owners.max()) + 1
        text = (batch.owners + most * torch.arange(len(batch.owners))[:, None]).flatten()
        texts, text = text[batch.valid.flatten()].unique(return_inverse=True)
        sums = rows.new_zeros(len(texts), rows.shape[1])
        sums.index_add_(0, text, rows[batch.valid.flatten()])
        means.append(sums / torch.bincount(text)[:, None])
    return torch.cat(means)


def _dense_mlp(mlp: Any) -> DenseMLP:
    gate, up, down = (getattr(mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
    return DenseMLP(gate, up, down, mlp.act_fn)


def _decoder(model: Any) -> Any:
    return model.model
