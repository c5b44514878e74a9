"""The base model's index: every tensor has a role, and damage is found before any work."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from proxymoe.common.checkpoint import INDEX, WEIGHTS, Checkpoint
from proxymoe.common.errors import CheckpointError, PlanError, UnsupportedModel
from proxymoe.common.files import digest_of
from proxymoe.common.plan import LayerPlan, Plan
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.places import Places
from tests.tiny import save_tiny, tiny_model


@pytest.fixture
def copy(qwen, tmp_path):
    """A tiny checkpoint of its own, to be damaged."""
    return shutil.copytree(qwen.folder, tmp_path / "copy")


def rewrite(folder, change):
    """Applies `change` to the tensors of a one-file checkpoint."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def names(base):
    return {(p.source, p.target, p.part, p.layer, p.expert, p.digest) for p in base.pieces}


def test_every_tensor_on_disk_is_one_piece(model):
    assert len(model.base.pieces) == len(model.base.checkpoint.ranges)
    experts = [piece for piece in model.base.pieces if piece.expert is not None]
    assert len(experts) == 2 * 8 * 3
    assert {piece.expert for piece in experts} == set(range(8))


def test_bytes_of_trunk_and_experts_add_up_to_the_file(model):
    base = model.base
    experts = sum(base.num_experts[at] * size for at, size in base.expert_bytes.items())
    total = sum(place.num_bytes for place in base.checkpoint.ranges.values())
    assert base.trunk_bytes + experts == total == base.manifest(base.keep_all()).num_bytes


def test_digests_do_not_depend_on_how_the_file_is_sharded(model, tmp_path):
    sharded = BaseCheckpoint(save_tiny(model.family, tmp_path, max_shard_size="60KB"))
    assert len({place.file for place in sharded.checkpoint.ranges.values()}) > 3
    assert names(sharded) == names(model.base)
    assert sharded.digest == model.base.digest


def test_the_same_checkpoint_has_the_same_digest_and_another_one_another(qwen, copy, tmp_path):
    assert BaseCheckpoint(copy).digest == qwen.base.digest
    other = save_tiny("qwen2_moe", tmp_path / "bf16", torch.bfloat16)
    assert BaseCheckpoint(other).digest != qwen.base.digest


def test_the_digest_covers_what_config_json_says_the_model_computes(qwen, copy):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"transformers_version": "99.0"}))
    assert BaseCheckpoint(copy).digest == qwen.base.digest
    path.write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert BaseCheckpoint(copy).digest != qwen.base.digest


def test_one_changed_byte_changes_one_piece_and_the_digest(qwen, copy):
    place = qwen.base.checkpoint.ranges["model.layers.1.mlp.experts.5.up_proj.weight"]
    content = bytearray((copy / WEIGHTS).read_bytes())
    content[place.offset] ^= 1
    (copy / WEIGHTS).write_bytes(content)
    changed = BaseCheckpoint(copy)
    assert changed.digest != qwen.base.digest
    assert {entry[0] for entry in names(changed) - names(qwen.base)} == {
        "model.layers.1.mlp.experts.5.up_proj.weight"
    }


def test_two_experts_that_change_places_change_the_digest(qwen, copy):
    def swap(tensors):
        for part in ("gate_proj", "up_proj", "down_proj"):
            first, second = (f"model.layers.0.mlp.experts.{e}.{part}.weight" for e in (0, 1))
            tensors[first], tensors[second] = tensors[second], tensors[first]

    rewrite(copy, swap)
    assert BaseCheckpoint(copy).digest != qwen.base.digest


def test_the_cache_gives_the_same_pieces_and_notices_a_new_file(qwen, copy, tmp_path):
    cache = tmp_path / "cache"
    first = BaseCheckpoint(copy, cache)
    assert names(BaseCheckpoint(copy, cache)) == names(first) == names(qwen.base)
    rewrite(copy, lambda tensors: tensors["model.norm.weight"].mul_(2.0))
    assert BaseCheckpoint(copy, cache).digest != first.digest


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(copy, value):
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    rewrite(copy, lambda tensors: tensors[name][0, 0].fill_(value))
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN or infinity; fetch"):
        BaseCheckpoint(copy)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("model.layers.1.mlp.experts.7.gate_proj.weight", r"layers\.1\.mlp\.experts.gate_up_proj"),
        ("model.norm.weight", r"model\.norm\.weight"),
        ("lm_head.weight", r"lm_head\.weight"),
    ],
)
def test_a_missing_tensor_is_named(copy, name, target):
    rewrite(copy, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"1 tensors are missing, the first is .*{target}"):
        BaseCheckpoint(copy)


def test_a_missing_shard_is_named(tmp_path):
    folder = save_tiny("mixtral", tmp_path, max_shard_size="60KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name}.*are missing"):
        BaseCheckpoint(folder)


def test_an_index_that_forgets_a_shard_is_found_out(tmp_path):
    folder = save_tiny("mixtral", tmp_path, max_shard_size="60KB")
    index = json.loads((folder / INDEX).read_text())
    shard = sorted(folder.glob("model-*.safetensors"))[1].name
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != shard}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"shards \['{shard}'\] are not of this checkpoint"):
        BaseCheckpoint(folder)
    (folder / shard).unlink()
    with pytest.raises(CheckpointError, match=r"tensors are missing.*is a shard absent"):
        BaseCheckpoint(folder)


def test_a_tensor_of_another_shape_than_the_config_says_is_refused(copy):
    def shorten(tensors):
        tensors["model.layers.0.mlp.experts.3.down_proj.weight"] = torch.zeros(64, 16)

    rewrite(copy, shorten)
    with pytest.raises(CheckpointError, match=r"experts\.3\.down_proj.*\(64, 16\)"):
        BaseCheckpoint(copy)


@pytest.mark.parametrize(
    "name", ["model.layers.9.mtp.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
)
def test_heads_for_several_tokens_and_tables_that_are_computed_are_left_out(qwen, copy, name):
    rewrite(copy, lambda tensors: tensors.update({name: torch.ones(3)}))
    base = BaseCheckpoint(copy)
    assert base.digest == qwen.base.digest
    assert name not in {piece.source for piece in base.pieces}


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.experts.8.up_proj.weight", "model.layers.1.mlp.gate.weight_scale"]
)
def test_a_tensor_that_belongs_nowhere_is_refused(copy, name):
    rewrite(copy, lambda tensors: tensors.update({name: torch.ones(3)}))
    with pytest.raises(CheckpointError, match=rf"{name}"):
        BaseCheckpoint(copy)


def test_a_shard_that_is_left_over_is_refused(copy):
    save_file({"a": torch.ones(1)}, copy / "model-00002-of-00002.safetensors")
    with pytest.raises(
        CheckpointError, match=r"shards \['model-00002-of-00002\.safetensors'\] are"
    ):
        BaseCheckpoint(copy)


@pytest.fixture
def tied(tmp_path):
    """A checkpoint that has a second copy of its tied embeddings."""
    folder = save_tiny("qwen2_moe", tmp_path / "tied", tie_word_embeddings=True)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    return folder


def test_a_tied_weight_that_is_stored_twice_is_one_piece(tied):
    twice = BaseCheckpoint(tied)
    assert [p.source for p in twice.pieces if p.shape == (128, 64)] == ["model.embed_tokens.weight"]
    rewrite(tied, lambda tensors: tensors.pop("lm_head.weight"))
    assert BaseCheckpoint(tied).digest == twice.digest


def test_a_tied_weight_that_is_not_the_same_twice_is_refused(tied):
    rewrite(tied, lambda tensors: tensors["lm_head.weight"].add_(1.0))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight are one weight by config\.json"):
        BaseCheckpoint(tied)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(copy):
    config = json.loads((copy / "tokenizer.json").read_text())
    config["model"]["vocab"]["foreign"] = 128
    (copy / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"has a token 128, the model's embeddings end at 127"
    ):
        BaseCheckpoint(copy)


def test_a_broken_tokenizer_is_refused(copy):
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no tokenizer"):
        BaseCheckpoint(copy)


def test_an_interrupted_index_goes_on_with_the_next_shard(tmp_path, monkeypatch):
    folder = save_tiny("mixtral", tmp_path / "published", max_shard_size="60KB")
    read: list[str] = []
    read_into = Checkpoint.read_into

    def counted(self, name, buffer, first=0):
        read.append(name)
        read_into(self, name, buffer, first)

    def interrupt(done, total):
        if 2 * done > total:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "read_into", counted)
    with pytest.raises(KeyboardInterrupt):
        BaseCheckpoint(folder, tmp_path / "cache", interrupt)
    before, told = set(read), []
    read.clear()
    base = BaseCheckpoint(folder, tmp_path / "cache", lambda *step: told.append(step))
    assert 0 < len(read) < len(base.checkpoint.ranges)
    assert before | set(read) == set(base.checkpoint.ranges)
    assert told[-1] == (base.num_bytes, base.num_bytes)
    assert told == sorted(told)
    read.clear()
    assert BaseCheckpoint(folder, tmp_path / "cache").pieces == base.pieces
    assert read == []
    assert names(BaseCheckpoint(folder)) == names(base)


def test_a_shard_that_is_written_to_after_it_was_indexed_is_refused(qwen, copy, tmp_path):
    base = BaseCheckpoint(copy)
    content = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: was changed while it was in use"
    ):
        base.materialise(base.keep_all(), tmp_path / "full")
    assert not (tmp_path / "full" / WEIGHTS).exists()


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("llama", "LlamaForCausalLM has no mixture-of-experts"),
    ],
)
def test_families_that_do_not_fit_are_refused_by_name(tmp_path, family, reason):
    folder = save_tiny(family, tmp_path)
    with pytest.raises(UnsupportedModel, match=reason):
        BaseCheckpoint(folder)


def test_experts_fused_on_disk_are_cut_into_byte_ranges(qwen, copy, tmp_path):
    (copy / WEIGHTS).unlink()
    tiny_model("qwen2_moe").save_pretrained(copy, save_original_format=False)
    fused = BaseCheckpoint(copy)
    assert fused.num_bytes == qwen.base.num_bytes
    assert fused.expert_bytes == qwen.base.expert_bytes
    layers = {at: LayerPlan(num_experts=8, kept=(0, 3, 7)) for at in (0, 1)}
    found, expected = (
        base.materialise(Plan(base=base.digest, layers=layers), tmp_path / str(i)) / WEIGHTS
        for i, base in enumerate((fused, qwen.base))
    )
    ours, theirs = load_file(found), load_file(expected)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_part_of_a_fused_tensor_is_served_from_its_own_place(copy, tmp_path):
    (copy / WEIGHTS).unlink()
    tiny_model("qwen2_moe").save_pretrained(copy, save_original_format=False)
    fused = BaseCheckpoint(copy)
    places = Places(fused, tmp_path / "blobs")
    for piece in fused.pieces:
        place = places[piece.digest]
        content = place.path.read_bytes()[place.offset : place.offset + place.num_bytes]
        assert digest_of(content) == piece.digest


def test_a_fused_tensor_that_is_missing_is_named(copy):
    (copy / WEIGHTS).unlink()
    tiny_model("qwen2_moe").save_pretrained(copy, save_original_format=False)
    rewrite(copy, lambda tensors: tensors.pop("model.layers.1.mlp.experts.down_proj"))
    with pytest.raises(CheckpointError, match=r"8 tensors are missing, the first is .*down_proj 0"):
        BaseCheckpoint(copy)


def test_quantised_weights_are_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="the weights are quantised"):
        BaseCheckpoint(copy)


def test_a_model_that_scales_its_logits_is_refused_by_the_setting(copy):
    config = json.loads((copy / "config.json").read_text()) | {"logit_scale": 0.5}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"output head with logit_scale=0\.5"):
        BaseCheckpoint(copy)


@pytest.mark.slow
def test_a_model_that_is_no_language_model_is_refused(copy):
    config = {"model_type": "vit", "hidden_size": 64}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="vit: no causal language model"):
        BaseCheckpoint(copy)


@pytest.mark.parametrize(
    "layers",
    [
        {0: LayerPlan(num_experts=8, kept=(1,))},
        {at: LayerPlan(num_experts=8, kept=(1,)) for at in (0, 1, 2)},
        {at: LayerPlan(num_experts=9, kept=(8,)) for at in (0, 1)},
    ],
)
def test_a_plan_with_other_layers_or_expert_counts_is_refused(qwen, layers):
    plan = Plan(base=qwen.base.digest, layers=layers)
    with pytest.raises(PlanError, match="plan"):
        qwen.base.manifest(plan)


def test_a_plan_for_another_base_model_is_refused(qwen, tiny):
    with pytest.raises(PlanError, match="make a new plan"):
        qwen.base.manifest(tiny("olmoe").base.keep_all())
