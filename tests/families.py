"""The families that laws are tried on; names only, so that naming them loads no model code."""

FAMILIES = ("qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "deepseek_v2", "deepseek_v3")
"""The families that every law holds for."""
SOME = ("qwen2_moe", "mixtral", "deepseek_v3")
"""With gated shared experts, without any, with group-limited routing: for laws that cost more."""
