"""A dense checkpoint becomes a mixture that everything else takes for any other checkpoint."""

import json
import re
import sys
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from proxymoe.common.checkpoint import Checkpoint
from proxymoe.common.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    UnsupportedModel,
)
from proxymoe.common.model import load
from proxymoe.common.text import Example
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.cli import app
from proxymoe.server.dense import open_dense, public_text
from proxymoe.server.recipe import ExpertKind, Recipe, RouterInit
from proxymoe.server.upcycled import upcycle
from tests.tiny import assert_near, logits, save_tiny, some_tokens, stock, tiny_tokenizer

TEXT = [Example(tuple(row), 1) for row in some_tokens(60, 24, seed=3).tolist()]
WORDS = "Now is the winter of our discontent"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("dense") / "llama")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    made = tmp_path_factory.mktemp("text")
    for name, shift in (("one", 1), ("two", 2)):
        rows = [{"text": WORDS[shift * i % 9 :] + "!" * (i % 7)} for i in range(30)]
        (made / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return made


def made(folder, target, **recipe):
    given = {"num_experts": 8, "top_k": 4} | recipe
    return upcycle(open_dense(folder), TEXT, Recipe(**given), np.random.default_rng(0), target)


def away(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("router", RouterInit)
def test_copies_of_a_dense_model_are_the_same_model(folder, router, tmp_path):
    target = made(folder, tmp_path / "m", expert=ExpertKind.COPY, router=router)
    assert_near(logits(stock(target)), logits(stock(folder)), 1e-4)


@pytest.mark.parametrize("shared", [0.0, 1 / 3])
def test_sent_to_every_expert_a_split_model_is_the_dense_one(folder, shared, tmp_path):
    target = made(folder, tmp_path / "m", top_k=8, shared_fraction=shared, heal=False)
    assert away(logits(stock(target)), logits(stock(folder))) < 0.03


def test_healing_brings_the_model_nearer_to_the_dense_one(folder, tmp_path):
    seen = torch.tensor([example.tokens for example in TEXT])
    expected = logits(stock(folder), seen)
    lost = [
        away(logits(stock(made(folder, tmp_path / f"{heal}", heal=heal)), seen), expected)
        for heal in (False, True)
    ]
    assert lost[1] < 0.8 * lost[0]


@pytest.mark.parametrize(("shared", "family"), [(0.0, "mixtral"), (1 / 3, "qwen2_moe")])
def test_the_mixture_is_a_base_model_like_any_other(folder, shared, family, tmp_path):
    target = made(folder, tmp_path / "m", shared_fraction=shared)
    base = BaseCheckpoint(target)
    assert (base.config.model_type, base.num_experts) == (family, {0: 8, 1: 8})
    loaded = load(base.materialise(base.keep_all(), tmp_path / "full"))
    assert_near(logits(loaded.model), logits(stock(target)))
    assert loaded.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_a_head_of_its_own_size_and_tied_embeddings_are_taken_over(tmp_path):
    changes: dict[str, Any] = {"head_dim": 24, "tie_word_embeddings": True}
    folder = save_tiny("llama", tmp_path / "d", dtype=torch.bfloat16, **changes)
    target = made(folder, tmp_path / "m", expert=ExpertKind.COPY)
    assert away(logits(stock(target)).float(), logits(stock(folder)).float()) < 0.02
    assert {place.dtype for place in Checkpoint(target).ranges.values()} == {"BF16"}
    assert stock(target).config.head_dim == 24


def test_the_same_seed_makes_the_same_checkpoint(folder, tmp_path):
    digests = {BaseCheckpoint(made(folder, tmp_path / name)).digest for name in "ab"}
    assert len(digests) == 1


def test_the_dense_model_is_left_as_it_was(folder, tmp_path):
    dense = open_dense(folder)
    before = logits(dense.model)
    upcycle(dense, TEXT, Recipe(8, 4), np.random.default_rng(0), tmp_path / "m")
    assert torch.equal(logits(dense.model), before)


def test_an_interrupted_upcycling_leaves_nothing(folder, tmp_path):
    def interrupt(done, _total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upcycle(
            open_dense(folder),
            TEXT,
            Recipe(8, 4),
            np.random.default_rng(0),
            tmp_path / "m",
            interrupt,
        )
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_refused_and_left_alone(folder, tmp_path):
    (tmp_path / "precious").write_text("data")
    with pytest.raises(CheckpointError, match="exists; upcycle into a new folder"):
        made(folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_too_little_text_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match="48 tokens of text for 8 experts; at least 512"):
        upcycle(
            open_dense(folder), TEXT[:2], Recipe(8, 4), np.random.default_rng(0), tmp_path / "m"
        )


def test_neurons_that_cannot_be_split_evenly_are_refused_before_any_work(folder, tmp_path):
    with pytest.raises(ConfigError, match="96 neurons cannot be split evenly into 7 experts"):
        made(folder, tmp_path / "m", num_experts=7, shared_fraction=0.0)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_model_that_is_no_llama_is_refused_by_family(family, tiny):
    with pytest.raises(UnsupportedModel, match=f"{family}; dense models that can be upcycled"):
        open_dense(tiny(family).folder)


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_a_bias_is_refused_by_name(bias, tmp_path):
    biased: dict[str, Any] = {bias: True}
    folder = save_tiny("llama", tmp_path / "d", **biased)
    with pytest.raises(UnsupportedModel, match=f"{bias}; the mixtures have no such bias"):
        open_dense(folder)


def test_quantised_weights_are_refused(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="the weights are quantised"):
        open_dense(tmp_path)


def test_a_folder_without_weights_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        open_dense(tmp_path)


def test_a_gguf_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"m\.gguf: no such file"):
        open_dense(tmp_path / "m.gguf")


def test_a_gguf_file_without_the_package_that_reads_it_is_refused(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match="pip install"):
        open_dense(tmp_path / "m.gguf")


def test_text_is_taken_from_all_domains_alike(texts):
    found = public_text(texts, tiny_tokenizer(), 300)
    assert 300 <= sum(len(example.tokens) for example in found) < 350
    assert all(example.start == 1 for example in found)
    two = [example.tokens for example in public_text(texts, tiny_tokenizer(), 60)]
    assert [example.tokens for example in found][: len(two)] == two


def test_more_text_than_there_is_cannot_be_had(texts, tmp_path):
    with pytest.raises(DataError, match="in 2 files, 100000 are wanted"):
        public_text(texts, tiny_tokenizer(), 100_000)
    with pytest.raises(DataError, match="0 tokens of text in 0 files"):
        public_text(tmp_path, tiny_tokenizer(), 10)


def test_the_command_makes_the_model_and_says_what_it_is(folder, texts, tmp_path):
    shape = ["--experts", "8", "--top-k", "8", "--tokens", "900", "--check-tokens", "200"]
    call = ["upcycle", str(folder), str(tmp_path / "m"), "--text", str(texts), *shape]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    assert "8 experts per layer, 8 for each token" in told
    measured = re.search(r"not read so far: dense (\S+), mixture (\S+) nats", told)
    assert measured is not None
    assert float(measured[2]) == pytest.approx(float(measured[1]), rel=0.02)
    assert BaseCheckpoint(tmp_path / "m").num_experts == {0: 8, 1: 8}


def test_a_mistake_is_told_in_one_line(folder, texts, tmp_path):
    call = ["upcycle", str(folder), str(tmp_path / "m"), "--text", str(texts), "--top-k", "99"]
    result = CliRunner().invoke(app, call)
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert "error: 16 experts with top_k 99" in " ".join(result.output.split())
