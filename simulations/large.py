"""A large OLMoE with random weights, in the shape and layout of one that people have.

Numbers are drawn once, and every tensor is another stretch of them: 7 B parameters are written at
the speed of the disk. Tokenizer and calibration text are the shipped ones.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import OlmoeConfig

from proxymoe.common.checkpoint import INDEX, bytes_of, write_checkpoint
from proxymoe.common.files import write_json
from proxymoe.common.manifest import COMPANIONS
from proxymoe.simulations.site import ASSETS

POOL = 1 << 24
"""Numbers that are drawn."""
SCALE = 0.02
"""Their standard deviation, as a model is initialised."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of an OLMoE; the defaults are those of OLMoE-1B-7B (arXiv 2409.02060, table 1)."""

    layers: int = 16
    experts: int = 64
    hidden: int = 2048
    inner: int = 1024
    top_k: int = 8
    vocabulary: int = 50304

    def tensors(self) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
        """(file, {tensor: shape}) of every shard: one per decoder layer, and one of the rest."""
        hidden, inner = self.hidden, self.inner
        count = self.layers + 1
        for at in range(self.layers):
            name, found = f"model.layers.{at}", dict[str, tuple[int, ...]]()
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"{name}.{norm}.weight"] = (hidden,)
            for part in "qkvo":
                found[f"{name}.self_attn.{part}_proj.weight"] = (hidden, hidden)
            for part in "qk":
                found[f"{name}.self_attn.{part}_norm.weight"] = (hidden,)
            found[f"{name}.mlp.gate.weight"] = (self.experts, hidden)
            for expert in range(self.experts):
                for part in ("gate", "up"):
                    found[f"{name}.mlp.experts.{expert}.{part}_proj.weight"] = (inner, hidden)
                found[f"{name}.mlp.experts.{expert}.down_proj.weight"] = (hidden, inner)
            yield f"model-{at + 1:05}-of-{count:05}.safetensors", found
        table = (self.vocabulary, hidden)
        yield (
            f"model-{count:05}-of-{count:05}.safetensors",
            {"model.embed_tokens.weight": table, "model.norm.weight": (hidden,)}
            | {"lm_head.weight": table},
        )


def write_olmoe(folder: Path, shape: Shape, rng: np.random.Generator) -> Path:
    """Writes the checkpoint in bf16, sharded; shards that are there already are kept."""
    config = OlmoeConfig(
        num_hidden_layers=shape.layers,
        num_experts=shape.experts,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_experts_per_tok=shape.top_k,
        vocab_size=shape.vocabulary,
        num_attention_heads=shape.hidden // 128,
        num_key_value_heads=shape.hidden // 128,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    config.architectures = ["OlmoeForCausalLM"]
    config.save_pretrained(folder)
    for name in COMPANIONS:
        if (ASSETS / "tiny-moe" / name).exists():
            shutil.copyfile(ASSETS / "tiny-moe" / name, folder / name)
    seed = int(rng.integers(2**31))
    pool = SCALE * torch.randn(POOL, generator=torch.Generator().manual_seed(seed))
    numbers, places = pool.bfloat16(), dict[str, str]()
    for file, shapes in shape.tensors():
        places |= dict.fromkeys(shapes, file)
        starts = {name: int(rng.integers(POOL // 2)) for name in shapes}
        if not (folder / file).exists():
            specs = {name: ("BF16", size) for name, size in shapes.items()}
            contents = (
                [bytes_of(_tensor(numbers, starts[name], size))] for name, size in shapes.items()
            )
            write_checkpoint(folder / file, specs, contents)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": places})
    return folder


def _tensor(numbers: Tensor, start: int, shape: tuple[int, ...]) -> Tensor:
    """A stretch of the numbers, from the beginning again where they end; norms are all one."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=numbers.dtype)
    size = shape[0] * shape[1]
    if start + size > POOL:
        numbers = numbers.repeat(-(-(start + size) // POOL))
    return numbers[start : start + size].view(shape)
