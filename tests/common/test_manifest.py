"""A proxy submodel is a listing over digests; what is built from it is the base model's own."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from proxymoe.common.checkpoint import WEIGHTS, Checkpoint, read_tensors
from proxymoe.common.errors import CheckpointError, IntegrityError, UnsupportedModel
from proxymoe.common.experts import install_backend
from proxymoe.common.manifest import Manifest, materialise, read_config
from proxymoe.common.model import load
from proxymoe.common.moe import moe_layers
from proxymoe.common.plan import LayerPlan, Plan, RouterMode, read_plan
from tests.laws import tried
from tests.tiny import TinyBase, logits, save_tiny, some_tokens, stock

KEPT = (1, 2, 4, 7)


def plan_of(tiny: TinyBase, kept: tuple[int, ...] = KEPT, **fields) -> Plan:
    layers = {at: LayerPlan(num_experts=8, kept=kept) for at in tiny.base.num_experts}
    return Plan(base=tiny.base.digest, layers=layers, **fields)


def test_keeping_all_reproduces_the_full_logits_bit_for_bit(model):
    reference = model.own_stock()
    install_backend(reference)
    assert torch.equal(logits(model.full.model), logits(reference))


def test_keeping_all_reproduces_a_model_with_tied_embeddings(tmp_path):
    folder = save_tiny("qwen2_moe", tmp_path / "published", tie_word_embeddings=True)
    tied = TinyBase("qwen2_moe", tmp_path)
    tied.folder = folder
    reference = stock(folder)
    install_backend(reference)
    assert torch.equal(logits(tied.full.model), logits(reference))
    assert "lm_head.weight" not in {piece.target for piece in tied.base.pieces}


def test_weights_of_kept_experts_and_trunk_are_byte_identical(model, tmp_path):
    folder = model.base.materialise(plan_of(model), tmp_path / "cut")
    found, full = read_tensors(folder / WEIGHTS), read_tensors(model.full_folder / WEIGHTS)
    assert set(found) == set(full)
    for name, tensor in found.items():
        expected = full[name][list(KEPT)] if ".experts." in name else full[name]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("mode", [RouterMode.FULL, RouterMode.SLICED])
def test_the_listing_weighs_what_the_file_weighs(model, tmp_path, mode):
    manifest = model.base.manifest(plan_of(model, router=mode))
    folder = materialise(manifest, tmp_path, model.base.read_piece, model.base.read_companion)
    places = Checkpoint(folder).ranges.values()
    assert manifest.num_bytes == sum(place.num_bytes for place in places)


def test_a_manifest_survives_its_json(qwen):
    manifest = qwen.base.manifest(plan_of(qwen))
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_a_submodel_brings_its_plan_and_tokenizer(qwen, tmp_path):
    plan = plan_of(qwen)
    loaded = load(qwen.base.materialise(plan, tmp_path / "cut"))
    assert loaded.plan == plan == read_plan(tmp_path / "cut")
    assert loaded.tokenizer.encode("proxy") == AutoTokenizer.from_pretrained(qwen.folder).encode(
        "proxy"
    )
    assert loaded.max_positions == 256


def test_a_sliced_router_chooses_only_among_the_kept(model, tmp_path):
    plan = plan_of(model, router=RouterMode.SLICED)
    loaded = load(model.base.materialise(plan, tmp_path / "sliced"))
    chosen = []
    for layer, whole in zip(moe_layers(loaded.model), moe_layers(model.full.model), strict=True):
        assert (layer.num_experts, layer.num_routed) == (len(KEPT), len(KEPT))
        for name, dim in whole.router_tensors().items():
            full = whole.block.state_dict()[name]
            kept = full.index_select(dim, torch.tensor(KEPT))
            assert torch.equal(layer.block.state_dict()[name], kept)
        layer.router.register_forward_hook(lambda *call: chosen.append(call[-1][-1]))
    assert bool(torch.isfinite(logits(loaded.model)).all())
    assert all(0 <= int(index.min()) <= int(index.max()) < len(KEPT) for index in chosen)
    assert len(chosen) == 2


@tried(20)
@given(st.data())
def test_a_corrupted_piece_is_refused_and_leaves_no_weights(qwen, tmp_path_factory, data):
    manifest = qwen.base.manifest(plan_of(qwen))
    target = data.draw(st.sampled_from(manifest.pieces))
    position = data.draw(st.integers(0, target.num_bytes - 1))
    damage = data.draw(st.sampled_from(["flip", "cut", "empty", "longer"]))

    def damaged(piece):
        content = bytearray(qwen.base.read_piece(piece))
        if piece.source == target.source:
            if damage == "flip":
                content[position] ^= 1
            elif damage == "longer":
                content.append(0)
            else:
                del content[0 if damage == "empty" else position :]
        return bytes(content)

    folder = tmp_path_factory.mktemp("damaged")
    with pytest.raises(IntegrityError, match=rf"{target.source}: digest .* instead of .*fetch"):
        materialise(manifest, folder, damaged, qwen.base.read_companion)
    assert not list(folder.glob("*.safetensors")) + list(folder.glob(".*"))


def test_a_corrupted_companion_is_refused(qwen, tmp_path):
    manifest = qwen.base.manifest(plan_of(qwen))
    with pytest.raises(IntegrityError, match=r"tokenizer.*\.json: digest"):
        materialise(
            manifest,
            tmp_path,
            qwen.base.read_piece,
            lambda name: b"{}" if name == "tokenizer.json" else qwen.base.read_companion(name),
        )
    assert not (tmp_path / WEIGHTS).exists()


def test_a_refused_submodel_can_be_made_again_in_the_same_folder(qwen, tmp_path):
    manifest = qwen.base.manifest(plan_of(qwen))
    with pytest.raises(IntegrityError):
        materialise(manifest, tmp_path, lambda _: b"", qwen.base.read_companion)
    materialise(manifest, tmp_path, qwen.base.read_piece, qwen.base.read_companion)
    assert bool(torch.isfinite(logits(load(tmp_path).model)).all())


def test_a_folder_without_a_config_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json; is this a checkpoint\?"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ('{"model_type": "unheard_of"}', UnsupportedModel),
        ("{}", UnsupportedModel),
        ("{ not json", CheckpointError),
    ],
)
def test_a_config_of_no_known_family_is_refused(tmp_path, content, error):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(error, match=tmp_path.name):
        read_config(tmp_path)


@pytest.mark.parametrize("content", [None, "", "{}", '{"base": "00", "layers": {"0": {}}}'])
def test_a_plan_that_is_missing_or_broken_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"plan\.json: no readable plan"):
        read_plan(tmp_path)


def test_a_plan_beside_other_weights_is_refused_at_loading(qwen, tmp_path):
    folder = qwen.base.materialise(plan_of(qwen), tmp_path / "cut")
    other = plan_of(qwen, (0, 1, 2))
    (folder / "plan.json").write_text(other.model_dump_json())
    with pytest.raises(CheckpointError, match=r"4 experts in layer 0, the plan keeps 3"):
        load(folder)


def test_a_submodel_without_some_weights_is_refused_at_loading(qwen, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(qwen.base.materialise(plan_of(qwen), tmp_path / "whole"), folder)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=WEIGHTS):
        load(folder)


def test_dropping_and_slicing_differ_where_gates_renormalise(qwen, tmp_path):
    full, sliced = (
        logits(load(qwen.base.materialise(plan_of(qwen, router=mode), tmp_path / mode)).model)
        for mode in (RouterMode.FULL, RouterMode.SLICED)
    )
    assert not torch.allclose(full, sliced, atol=1e-3)


def test_the_config_of_a_submodel_says_what_was_kept(qwen, tmp_path):
    plan = plan_of(qwen)
    config = json.loads((qwen.base.materialise(plan, tmp_path / "cut") / "config.json").read_text())
    assert config["proxy_moe"]["layers"] == {"0": 4, "1": 4}
    assert config["proxy_moe"]["plan"] == plan.digest
    assert "proxy_moe" not in json.loads((qwen.full_folder / "config.json").read_text())


def test_two_submodels_of_one_process_do_not_disturb_each_other(qwen, tmp_path):
    small = load(qwen.base.materialise(plan_of(qwen, (3,)), tmp_path / "small"))
    before = logits(small.model)
    large = load(qwen.base.materialise(plan_of(qwen, KEPT), tmp_path / "large"))
    logits(large.model, some_tokens(1, 9))
    assert torch.equal(logits(small.model), before)
