"""Loading: types, and what a machine's `auto` means."""

import torch

from proxymoe.common.model import compute_dtype, load
from tests.tiny import logits


def test_named_types_are_those_types_and_auto_is_one_of_them():
    assert compute_dtype("bfloat16") == torch.bfloat16
    assert compute_dtype("float32") == torch.float32
    assert compute_dtype("auto") in (torch.bfloat16, torch.float32)


def test_a_model_loads_in_its_stored_type_or_in_another(qwen):
    assert load(qwen.full_folder).model.dtype == torch.float32
    narrow = load(qwen.full_folder, torch.bfloat16).model
    assert logits(narrow).dtype == narrow.dtype == torch.bfloat16
    assert (logits(narrow) - logits(qwen.full.model)).abs().mean() < 0.1


def test_a_loaded_model_is_frozen_and_evaluates(model):
    assert not model.full.model.training
    assert not any(parameter.requires_grad for parameter in model.full.model.parameters())
