"""Disk edge: a dense model that can become a mixture of experts, and the text that this takes.

The dense model is a Llama, as a Hugging Face folder or one GGUF file.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from proxymoe.common.attention import install_attention
from proxymoe.common.errors import CheckpointError, ConfigError, DataError, UnsupportedModel
from proxymoe.common.manifest import read_config
from proxymoe.common.text import Example, read_rows, tokenise

MAX_TOKENS = 256
"""Tokens of one text."""


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
