"""The families that laws are tried on; names only, so that naming them loads no model code."""

FAMILIES = ("qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "deepseek_v2", "deepseek_v3")
"""The families that run through every test of every law."""
MORE_FAMILIES = (
    "glm4_moe",
    "dots1",
    "ernie4_5_moe",
    "hunyuan_v1_moe",
    "minimax",
    "phimoe",
    "qwen3_next",
    "granitemoe",
    "granitemoeshared",
    "lfm2_moe",
    "jamba",
    "gpt_oss",
)
"""The other families; `tests/test_families.py` holds each to every law once."""
SOME = ("qwen2_moe", "mixtral", "deepseek_v3")
"""With gated shared experts, without any, with group-limited routing: for laws that cost more."""
