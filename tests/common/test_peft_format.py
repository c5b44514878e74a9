"""What we write, plain PEFT reads on the full model; what we wrote, we read back bit for bit."""

import json

import pytest
import torch
from peft import PeftModel

from proxymoe.common.adapter import AdapterLayout, Target, adapter_layout, delta_weight
from proxymoe.common.attach import AttachedAdapter
from proxymoe.common.checkpoint import read_tensors, write_tensors
from proxymoe.common.errors import CheckpointError, LayoutMismatch
from proxymoe.common.peft_format import CONFIG_FILE, WEIGHTS_FILE, export_peft, import_peft
from tests.families import SOME
from tests.tiny import TinyBase, assert_near, logits

# PEFT asks transformers for a name that transformers has just deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TARGETS: list[tuple[Target, ...]] = [("attention", "shared"), ("attention", "shared", "experts")]


def layout_of(tiny: TinyBase, targets: tuple[Target, ...], rank: int = 4) -> AdapterLayout:
    return adapter_layout(tiny.base.skeleton, targets, rank, 3)


def random_vector(layout: AdapterLayout, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))


def plain_peft(tiny: TinyBase, folder) -> PeftModel:
    """As a user loads it; missing or ignored keys are errors like every other warning."""
    return PeftModel.from_pretrained(tiny.own_stock(), folder)


@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
def test_plain_peft_computes_and_merges_exactly_what_we_wrote(model, targets, tmp_path):
    layout = layout_of(model, targets)
    vector = random_vector(layout)
    folder = export_peft(layout, vector, tmp_path, str(model.folder))
    loaded = plain_peft(model, folder)
    with AttachedAdapter(model.full.model, layout) as adapter:
        adapter.bind(vector)
        expected = logits(model.full.model)
    assert (expected - logits(model.stock)).abs().max() > 0.05
    assert_near(logits(loaded), expected, 2e-5)

    weights = {name: tensor.clone() for name, tensor in model.stock.state_dict().items()}
    changed = set()
    for block, trained in zip(layout.blocks, layout.trained_factors(vector), strict=True):
        delta = delta_weight(block, trained, layout.rank, layout.seed)
        name = f"{block.module}.weight" if block.expert is None else block.module
        changed.add(name)
        (weights[name] if block.expert is None else weights[name][block.expert]).add_(delta)
    merged = loaded.merge_and_unload().state_dict()
    assert set(merged) == set(weights)
    for name, tensor in weights.items():
        if name in changed:
            assert_near(merged[name], tensor)
        else:
            assert torch.equal(merged[name], tensor)


def test_reading_back_gives_the_same_bits(model, tmp_path):
    layout = layout_of(model, ("attention", "shared", "experts"))
    vector = random_vector(layout)
    assert torch.equal(import_peft(layout, export_peft(layout, vector, tmp_path, "base")), vector)


@pytest.mark.parametrize("family", SOME)
def test_the_zero_adapter_is_the_identity_in_peft_too(tiny, family, tmp_path):
    model = tiny(family)
    layout = layout_of(model, ("attention", "shared"))
    folder = export_peft(layout, layout.zeros(), tmp_path, str(model.folder))
    assert torch.equal(logits(plain_peft(model, folder)), logits(model.stock))


@pytest.mark.parametrize("family", SOME)
def test_saving_with_peft_and_reading_back_gives_the_same_bits(tiny, family, tmp_path):
    model = tiny(family)
    layout = layout_of(model, ("attention", "shared", "experts"))
    vector = random_vector(layout)
    folder = export_peft(layout, vector, tmp_path / "ours", str(model.folder))
    plain_peft(model, folder).save_pretrained(tmp_path / "theirs")
    assert torch.equal(import_peft(layout, tmp_path / "theirs"), vector)


def test_the_config_names_rank_scale_and_base(qwen, tmp_path):
    layout = layout_of(qwen, ("attention",), rank=8)
    export_peft(layout, layout.zeros(), tmp_path, "company/model")
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == "company/model"
    assert (config["r"], config["lora_alpha"]) == (8, 16.0)


@pytest.mark.parametrize(
    ("rank", "seed", "reason"),
    [
        (8, 3, r"adapter of rank 4 .*expected rank 8"),
        (4, 5, r"is not the frozen factor of seed 5"),
    ],
)
def test_another_rank_or_seed_is_refused(qwen, tmp_path, rank, seed, reason):
    layout = layout_of(qwen, ("attention",))
    export_peft(layout, random_vector(layout), tmp_path, "base")
    with pytest.raises(LayoutMismatch, match=reason):
        import_peft(AdapterLayout(layout.blocks, rank, seed), tmp_path)


def test_other_targets_and_other_families_are_refused(qwen, tiny, tmp_path):
    layout = layout_of(qwen, ("attention",))
    export_peft(layout, random_vector(layout), tmp_path, "base")
    for other in (layout_of(qwen, ("attention", "shared")), layout_of(tiny("olmoe"), ("experts",))):
        with pytest.raises(LayoutMismatch, match="it was made for other targets"):
            import_peft(other, tmp_path)


def test_factors_of_another_shape_are_refused_by_key(qwen, tmp_path):
    layout = layout_of(qwen, ("attention",))
    export_peft(layout, random_vector(layout), tmp_path, "base")
    tensors = read_tensors(tmp_path / WEIGHTS_FILE)
    key = next(name for name in tensors if "lora_B" in name and "o_proj" not in name)
    tensors[key] = tensors[key][:-1]
    write_tensors(tmp_path / WEIGHTS_FILE, tensors)
    with pytest.raises(LayoutMismatch, match=key):
        import_peft(layout, tmp_path)


def test_another_scale_is_refused(qwen, tmp_path):
    layout = layout_of(qwen, ("attention",))
    export_peft(layout, random_vector(layout), tmp_path, "base")
    config = json.loads((tmp_path / CONFIG_FILE).read_text()) | {"lora_alpha": 4}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(LayoutMismatch, match=r"scale 1\.0 .*expected rank 4 and scale 2\.0"):
        import_peft(layout, tmp_path)


def test_missing_and_damaged_files_are_named(qwen, tmp_path):
    layout = layout_of(qwen, ("attention",))
    with pytest.raises(CheckpointError, match=WEIGHTS_FILE):
        import_peft(layout, tmp_path)
    export_peft(layout, layout.zeros(), tmp_path, "base")
    for content in ("{", "[]", "{}", '{"r": 0, "lora_alpha": 1}', '{"r": "4", "lora_alpha": 8}'):
        (tmp_path / CONFIG_FILE).write_text(content)
        with pytest.raises(CheckpointError, match=rf"{CONFIG_FILE}: unreadable"):
            import_peft(layout, tmp_path)


def test_a_vector_of_another_layout_writes_nothing(qwen, tmp_path):
    layout = layout_of(qwen, ("attention",))
    with pytest.raises(LayoutMismatch):
        export_peft(layout, torch.zeros(3), tmp_path / "new", "base")
    assert not (tmp_path / "new").exists()
