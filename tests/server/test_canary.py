"""The canary reads a few public rows, from the end, and says how well."""

import pytest
import torch

from proxymoe.common.adapter import adapter_layout
from proxymoe.common.errors import CheckpointError, DataError, LayoutMismatch
from proxymoe.common.loss import token_quality
from proxymoe.common.text import collate, tokenise
from proxymoe.server.canary import Canary
from tests.worlds import write_rows

ROWS = {
    "code": [{"text": f"f{i} = {i}"} for i in range(5)],
    "math": [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(5)],
}


@pytest.fixture(scope="module")
def layout(qwen):
    return adapter_layout(qwen.base.skeleton, ("attention", "shared"), 2, 0)


@pytest.fixture
def texts(tmp_path):
    for name, rows in ROWS.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    return [tmp_path / f"{name}.jsonl" for name in ROWS]


@pytest.fixture
def canary(qwen, layout, texts):
    return Canary(qwen.full_folder, layout, texts, rows=2, tokens=32)


def test_it_reads_the_last_rows_of_every_domain_in_one_batch(qwen, canary):
    rows = [row for found in ROWS.values() for row in found[-2:]]
    batch = collate(tokenise(rows, qwen.full.tokenizer, 32).examples)
    assert canary(None) == token_quality(qwen.full.model, [batch]).loss


def test_an_adapter_of_zeros_changes_nothing_and_another_leaves_no_trace(canary, layout):
    before = canary(None)
    assert canary(layout.zeros()) == before
    generator = torch.Generator().manual_seed(0)
    assert canary(torch.randn(layout.size, generator=generator)) != before
    assert canary(None) == before


def test_an_adapter_that_is_not_finite_does_not_pass(canary, layout):
    assert not canary(torch.full((layout.size,), torch.nan)) <= 100.0


def test_nothing_is_loaded_before_it_is_asked(tmp_path, layout, texts):
    canary = Canary(tmp_path / "gone", layout, texts, rows=2, tokens=32)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        canary(None)


def test_what_cannot_be_read_is_refused(qwen, canary, layout, tmp_path):
    with pytest.raises(LayoutMismatch):
        canary(torch.zeros(3))
    missing = Canary(qwen.full_folder, layout, [tmp_path / "gone.jsonl"], rows=2, tokens=32)
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        missing(None)
