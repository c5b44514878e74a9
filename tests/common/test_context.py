"""Examples see themselves only, however far the model's layers look and whatever they carry."""

import pytest
import torch

from proxymoe.common.context import carries_state, rows_for
from proxymoe.common.loss import completion_loss
from proxymoe.common.text import IGNORED, collate
from tests.reference import LENGTHS, examples_of, mean_loss_alone
from tests.tiny import TinyBase, assert_near, save_tiny


def test_layers_that_only_attend_share_rows(qwen):
    batch = collate(examples_of())
    assert not carries_state(qwen.base.skeleton)
    assert rows_for(qwen.base.skeleton, batch) is batch


@pytest.mark.parametrize("family", ["minimax", "qwen3_next", "lfm2_moe", "jamba"])
def test_layers_that_carry_a_state_get_a_row_per_example(tiny, family):
    model, batch = tiny(family).base.skeleton, collate(examples_of())
    assert carries_state(model)
    rows = rows_for(model, batch)
    assert rows.tokens.shape == (len(LENGTHS), batch.tokens.shape[1])
    assert int(rows.owners.max()) == 1
    assert rows_for(model, rows) is rows
    real = batch.targets != IGNORED
    assert torch.equal(rows.targets[rows.targets != IGNORED], batch.targets[real])
    for field in ("tokens", "positions"):
        at = [getattr(b, field).flatten()[b.where[b.targets != IGNORED]] for b in (rows, batch)]
        assert torch.equal(*at)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"sliding_window": 8}),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ],
)
def test_a_sliding_window_is_kept_where_examples_are_longer(tmp_path, family, changes):
    folder = save_tiny(family, tmp_path / "published", **changes)
    windowed = TinyBase(family, tmp_path)
    windowed.folder = folder
    loss = completion_loss(windowed.full.model, collate(examples_of()))
    assert_near(loss, mean_loss_alone(windowed.stock, examples_of()))
