"""What is tuned for the owner alone: it starts where the rounds are, helps, and stays here."""

import numpy as np
import pytest
import torch

from proxymoe.client import local
from proxymoe.client.proxy import open_device
from proxymoe.client.service import FEDERATED
from proxymoe.common.adapter import adapter_layout
from proxymoe.common.checkpoint import read_tensors
from proxymoe.common.errors import ConfigError, DataError, Diverged
from proxymoe.common.messages import TrainTask, encode
from proxymoe.common.peft_format import import_peft
from tests.settled import SEED, enrolled, settle, write_policy


@pytest.fixture
def home(tmp_path, qwen):
    home = enrolled(tmp_path)
    settle(home, qwen)
    return home


def kept(home):
    (vector,) = read_tensors(home.personal_adapter).values()
    return vector


def receive(home, vector, **changes):
    """The adapter of a round reaches the device."""
    assignment = home.assignment()
    named = assignment.model_dump(include={"run", "device", "base", "plan", "layout", "clip_norm"})
    task = TrainTask(**{**named, "round": 5, "train": assignment.train, "seed": 0, **changes})
    (home.adapters / FEDERATED).write_bytes(encode(task, vector))


def test_it_lowers_the_loss_on_what_it_has_not_seen_and_nothing_is_sent(home):
    told = []
    found = local.personalize(home, steps=20, done=lambda *step: told.append(step))
    assert (found.num_examples, found.num_held_out, found.round) == (22, 2, None)
    assert found.after < found.before
    assert [step[:2] for step in told] == [(i + 1, 20) for i in range(20)]
    assert torch.isfinite(kept(home)).all()
    assert kept(home).any()
    assert home.ledger().totals().num_entries == 0


def test_the_same_seed_gives_the_same_adapter(home):
    local.personalize(home)
    first = kept(home)
    local.personalize(home)
    assert torch.equal(kept(home), first)


def test_it_starts_from_the_last_federated_adapter(home):
    size = kept_size(home)
    received = np.random.default_rng(0).normal(0, 1e-2, size).astype(np.float32)
    receive(home, received)
    found = local.personalize(home, steps=1, learning_rate=1e-5)
    assert found.round == 5
    assert (kept(home) - torch.from_numpy(received)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("size", "value", "changes"),
    [(None, 0.1, {"layout": "1" * 64}), (None, np.nan, {}), (3, 0.1, {})],
)
def test_an_adapter_that_does_not_fit_is_no_beginning(home, size, value, changes):
    receive(home, np.full(size or kept_size(home), value, np.float32), **changes)
    assert local.personalize(home).round is None


def test_a_training_that_diverges_is_refused_and_what_was_kept_stays(home):
    local.personalize(home)
    before = kept(home)
    with pytest.raises(Diverged):
        local.personalize(home, steps=30, learning_rate=1e5)
    assert torch.equal(kept(home), before)


def test_with_few_examples_all_are_trained_on(tmp_path, qwen):
    home = enrolled(tmp_path, rows=5)
    settle(home, qwen)
    found = local.personalize(home, steps=6)
    assert (found.num_examples, found.num_held_out) == (5, 0)


def test_the_export_is_the_adapter_for_the_full_model(home, qwen, tmp_path):
    local.personalize(home)
    folder = local.export(home, tmp_path / "peft", "acme/full")
    full = adapter_layout(qwen.full.model, ("attention", "shared"), 4, SEED)
    assert torch.equal(import_peft(full, folder), kept(home))
    assert '"acme/full"' in (folder / "adapter_config.json").read_text()


def test_what_is_missing_is_named(tmp_path, qwen, home):
    with pytest.raises(ConfigError, match="personalize first"):
        local.export(home, tmp_path / "peft")
    write_policy(home)
    with pytest.raises(DataError, match=r"data\.folder"):
        local.personalize(home)
    with pytest.raises(ConfigError, match="join first"):
        local.personalize(enrolled(tmp_path / "other"))


def test_it_does_not_train_beside_a_client_at_work(home):
    other = type(home)(home.path)
    with other.alone(), pytest.raises(ConfigError, match="second client"):
        local.personalize(home)


def kept_size(home):
    return open_device(home).layout.size
