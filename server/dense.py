"""Disk edge of upcycling: a dense checkpoint in, a mixture-of-experts checkpoint out.

The dense model is a Llama, as a Hugging Face folder or one GGUF file. The mixture is a Qwen2-MoE
where experts share a part, and a Mixtral where they do not: both have the same attention, norms
and gated experts, and gates that sum to one, so everything but the MLPs is taken over as it is.

Shapes: T tokens, D hidden size.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2MoeConfig,
)
from transformers.utils import logging as transformers_logging

from proxymoe.common.attention import install_attention
from proxymoe.common.errors import CheckpointError, ConfigError, DataError, UnsupportedModel
from proxymoe.common.manifest import read_config
from proxymoe.common.text import Batch, Example, packed_batches, read_rows, tokenise
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

MAX_TOKENS = 256
"""Tokens of one text."""
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


@dataclass(frozen=True, slots=True)
class DenseModel:
    """A dense model that can become a mixture, frozen, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def open_dense(path: Path) -> DenseModel:
    """The dense model in a checkpoint folder, or in one GGUF file, whose weights become bf16.

    Raises:
        CheckpointError: nothing that can be read there.
        UnsupportedModel: it is no Llama, or one with biases or quantised weights.
        ConfigError: the package that reads GGUF files is missing.
    """
    transformers_logging.disable_progress_bar()
    folder, options = path, dict[str, Any](dtype="auto", local_files_only=True)
    if path.suffix == ".gguf":
        folder, gguf = path.parent, {"gguf_file": path.name}
        options = gguf | {"dtype": torch.bfloat16}
        options["quantization_config"] = GgufConfig(dequantize=True)
        _require_gguf(path)
    else:
        gguf = {}
        _require_dense(path, read_config(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **gguf)
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {str(error).splitlines()[0]}") from error
    _require_dense(path, model.config)
    model.requires_grad_(False).eval()
    install_attention(model)
    return DenseModel(model, tokenizer)


def public_text(folder: Path, tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[Example]:
    """At least `tokens` tokens of the public text in a folder, a row of each domain in turn.

    All text counts, prompts too; a domain may run out before the others.

    Raises:
        DataError: there is no text, or not as much.
    """
    files = sorted(folder.glob("*.jsonl"))
    found = [tokenise(read_rows(path), tokenizer, MAX_TOKENS).examples for path in files]
    taken, total = list[Example](), 0
    for row in range(max((len(examples) for examples in found), default=0)):
        for examples in found:
            if row < len(examples) and total < tokens:
                taken.append(Example(examples[row].tokens, 1))
                total += len(examples[row].tokens)
    if total < tokens:
        raise DataError(
            f"{folder}: {total} tokens of text in {len(files)} files, {tokens} are wanted; give "
            "more <domain>.jsonl, or ask for less with --tokens"
        )
    return taken


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
    total = len(dense.model.model.layers)
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
    decoder = model.model
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


def _require_dense(path: Path, config: PretrainedConfig) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(f"{path}: the weights are quantised; store them in bf16 first")
    if config.model_type != "llama":
        raise UnsupportedModel(
            f"{path}: {config.model_type}; dense models that can be upcycled are of the family "
            "llama, whose attention, norms and gated MLP the mixtures share"
        )
    for bias in ("attention_bias", "mlp_bias"):
        if getattr(config, bias, False):
            raise UnsupportedModel(f"{path}: {bias}; the mixtures have no such bias")


def _require_gguf(path: Path) -> None:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if find_spec("gguf") is None:
        raise ConfigError(f"{path}: reading it needs the package gguf: pip install gguf")
