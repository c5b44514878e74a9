"""Tiny random models of every family, on disk in the family's own layout.

Two MoE layers each, hidden size 64, eight experts. The tokenizer has one token per printable
ASCII character, so token counts in tests are string lengths.
"""

import copy
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from proxymoe.common.model import LoadedModel, load
from proxymoe.server.base import BaseCheckpoint

VOCABULARY = 128
PAD, BOS, EOS, UNKNOWN, FIRST_CHARACTER = 0, 1, 2, 3, 4
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
LATENT_ATTENTION = {
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
DENSE_FIRST = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
}
GROUPED = {
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    **DENSE_FIRST,
}
GRANITE = {
    "intermediate_size": 48,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "logits_scaling": 4.0,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "num_experts": 8,
            "num_experts_per_tok": 4,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "head_dim": 16,
        },
    ),
    "olmoe": ("Olmoe", {"intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 4}),
    "mixtral": (
        "Mixtral",
        {"intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {
            "n_shared_experts": 2,
            "num_experts_per_tok": 3,
            "topk_method": "greedy",
            **DENSE_FIRST,
            **LATENT_ATTENTION,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 4,
            "topk_group": 2,
            **DENSE_FIRST,
            **LATENT_ATTENTION,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "intermediate_size": 48,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "phimoe": (
        "Phimoe",
        {
            "intermediate_size": 48,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "lm_head_bias": True,
            "attention_bias": True,
            "input_jitter_noise": 0.1,
        },
    ),
    "llama": ("Llama", {"intermediate_size": 96}),
    "glm4_moe": ("Glm4Moe", {"head_dim": 16, "use_qk_norm": True, **GROUPED}),
    "dots1": ("Dots1", {"head_dim": 16, **GROUPED}),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {
            "num_hidden_layers": 3,
            "moe_layer_start_index": 1,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "moe_num_experts": 8,
            "moe_num_shared_experts": 2,
            "moe_k": 3,
        },
    ),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1",
        {"intermediate_size": 32, "num_experts": 8, "moe_topk": 2, "head_dim": 16},
    ),
    "minimax": (
        "MiniMax",
        {
            "intermediate_size": 48,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "block_size": 16,
            "mlp_alpha_factor": 1.5,
            "router_jitter_noise": 0.1,
        },
    ),
    "qwen3_next": (
        "Qwen3Next",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 16,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "num_experts": 8,
            "num_experts_per_tok": 4,
        },
    ),
    "granitemoe": ("GraniteMoe", GRANITE),
    "granitemoeshared": ("GraniteMoeShared", {"shared_intermediate_size": 40, **GRANITE}),
    "lfm2_moe": (
        "Lfm2Moe",
        {
            "num_hidden_layers": 3,
            "layer_types": ["conv", "conv", "full_attention"],
            "num_dense_layers": 1,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "jamba": (
        "Jamba",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "intermediate_size": 48,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
}


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """A random model of the family in fp32, the same at every call; it may be changed."""
    if changes:  # seldom the same ones twice
        return _random_model(family, **changes)
    return copy.deepcopy(_plain_model(family))


@cache
def _plain_model(family: str) -> PreTrainedModel:
    return _random_model(family)


def _random_model(family: str, **changes: Any) -> PreTrainedModel:
    name, own = CONFIGS[family]
    config = getattr(transformers, f"{name}Config")(**{**SHARED, **own, **changes})
    model: PreTrainedModel = getattr(transformers, f"{name}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(1)
    constants = {name for name, _ in model.named_buffers() if "bias" not in name}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in constants:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if "bias" in name:
                tensor.copy_(0.05 * noise)
            elif tensor.ndim == 1:
                # Norms begin at one, those that add one themselves at zero.
                tensor.copy_(float(tensor.any()) + 0.1 * noise)
            else:
                tensor.copy_(0.15 * noise)
    model.requires_grad_(False).eval()
    return model


def tiny_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character: `chr(c)` is token `c - 32 + FIRST_CHARACTER`."""
    specials = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, "<unk>": UNKNOWN}
    characters = {chr(c): c - 32 + FIRST_CHARACTER for c in range(32, 127)}
    tokenizer = Tokenizer(models.WordLevel({**specials, **characters}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def save_tiny(
    family: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **changes: Any,
) -> Path:
    """Writes a tiny checkpoint with its tokenizer, as the family's publisher would."""
    model: Any = tiny_model(family, **changes)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def stock(folder: Path) -> PreTrainedModel:
    """What plain transformers makes of a checkpoint: the reference for every equality."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        experts_implementation="eager",
        dtype="auto",
        local_files_only=True,
    )
    model.requires_grad_(False).eval()
    return model


def some_tokens(rows: int = 2, length: int = 24, seed: int = 7) -> torch.Tensor:
    """(rows, length) random tokens without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_CHARACTER, 99, (rows, length), generator=generator)


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """(B, L, V) of `tokens`, by default of `some_tokens`."""
    found: torch.Tensor = model(some_tokens() if tokens is None else tokens, use_cache=False).logits
    return found


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Every number within `tolerance`, relative or absolute."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


class TinyBase:
    """One family's tiny checkpoint and what follows from it, each made on first use.

    Shared by all tests of a session: attach, bind and remove, but change no weight.
    """

    def __init__(self, family: str, root: Path) -> None:
        self.family = family
        self._root = root

    @cached_property
    def folder(self) -> Path:
        """The checkpoint as published."""
        return save_tiny(self.family, self._root / "published")

    @cached_property
    def base(self) -> BaseCheckpoint:
        """The checkpoint as the server indexes it."""
        return BaseCheckpoint(self.folder)

    @cached_property
    def full_folder(self) -> Path:
        """The full model, materialised."""
        return self.base.materialise(self.base.keep_all(), self._root / "full")

    @cached_property
    def full(self) -> LoadedModel:
        """The full model on our experts backend."""
        return load(self.full_folder)

    @cached_property
    def stock(self) -> PreTrainedModel:
        """The full model in plain transformers."""
        return stock(self.folder)

    def own_stock(self) -> PreTrainedModel:
        """A copy of `stock` that may be changed."""
        return copy.deepcopy(self.stock)
