"""What was learned on a proxy returns to the full model, shard by shard."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from proxymoe.common.adapter import AdapterLayout, Target, adapter_layout
from proxymoe.common.attach import AttachedAdapter
from proxymoe.common.checkpoint import Checkpoint
from proxymoe.common.errors import CheckpointError, LayoutMismatch
from proxymoe.common.model import load
from proxymoe.common.peft_format import export_peft
from proxymoe.common.plan import LayerPlan, Plan
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.merge import merge
from tests.families import SOME
from tests.tiny import assert_near, logits, save_tiny, stock

ALL: tuple[Target, ...] = ("attention", "shared", "experts")


def layout_of(base: BaseCheckpoint, targets: tuple[Target, ...] = ALL) -> AdapterLayout:
    return adapter_layout(base.skeleton, targets, 4, 3)


def random_vector(layout: AdapterLayout) -> torch.Tensor:
    return 0.1 * torch.randn(layout.size, generator=torch.Generator().manual_seed(0))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A checkpoint of several shards, in bf16."""
    folder = tmp_path_factory.mktemp("sharded")
    return BaseCheckpoint(save_tiny("mixtral", folder, torch.bfloat16, max_shard_size="60KB"))


def test_a_zero_adapter_returns_the_base_bit_for_bit_and_file_by_file(model, tmp_path):
    layout = layout_of(model.base)
    folder = merge(model.base, layout, layout.zeros(), tmp_path / "merged")
    merged, base = contents(folder), contents(model.folder)
    assert set(merged) == set(base)
    assert {name for name in base if merged[name] != base[name]} <= {"model.safetensors"}
    before, after = Checkpoint(model.folder), Checkpoint(folder)
    assert set(before.ranges) == set(after.ranges)
    assert all(before.read_bytes(name) == after.read_bytes(name) for name in before.ranges)


def test_shards_keep_their_names_and_contents(sharded, tmp_path):
    layout = layout_of(sharded)
    folder = merge(sharded, layout, layout.zeros(), tmp_path / "merged")
    assert sorted(contents(folder)) == sorted(contents(sharded.folder))
    for path in sharded.folder.glob("*.safetensors"):
        ours, theirs = load_file(folder / path.name), load_file(path)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert set(ours) == set(theirs)
    assert BaseCheckpoint(folder).digest == sharded.digest


def test_the_merged_model_computes_like_base_plus_adapter(model, tmp_path):
    layout = layout_of(model.base)
    vector = random_vector(layout)
    merged = stock(merge(model.base, layout, vector, tmp_path / "merged"))
    with AttachedAdapter(model.full.model, layout) as adapter:
        adapter.bind(vector)
        expected = logits(model.full.model)
    assert (expected - logits(model.stock)).abs().max() > 0.1
    assert_near(logits(merged), expected, 2e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("family", SOME)
def test_merging_agrees_with_peft(tiny, family, tmp_path):
    model = tiny(family)
    layout = layout_of(model.base)
    vector = random_vector(layout)
    merged = stock(merge(model.base, layout, vector, tmp_path / "merged")).state_dict()
    folder = export_peft(layout, vector, tmp_path / "adapter", str(model.folder))
    theirs = PeftModel.from_pretrained(model.own_stock(), folder).merge_and_unload().state_dict()
    assert set(merged) == set(theirs)
    for name, tensor in theirs.items():
        assert_near(merged[name], tensor, 1e-6)


def test_extracting_from_the_merged_model_equals_the_proxy_with_the_adapter(model, tmp_path):
    layout, kept = layout_of(model.base), (0, 2, 5, 7)
    vector = random_vector(layout)
    layers = {at: LayerPlan(num_experts=8, kept=kept) for at in model.base.num_experts}
    plan = Plan(base=model.base.digest, layers=layers)
    proxy = load(model.base.materialise(plan, tmp_path / "proxy"))

    merged = BaseCheckpoint(merge(model.base, layout, vector, tmp_path / "merged"))
    replan = Plan(base=merged.digest, layers=layers)
    expected = logits(load(merged.materialise(replan, tmp_path / "cut")).model)

    held = layout.held_under(plan)
    with AttachedAdapter(proxy.model, held) as adapter:
        adapter.bind(held.take_from(layout, vector))
        found = logits(proxy.model)
    assert (found - logits(proxy.model)).abs().max() > 0.1
    assert_near(found, expected, 2e-5)


def test_only_targeted_tensors_change_and_types_stay(sharded, tmp_path):
    layout = layout_of(sharded, ("attention",))
    folder = merge(sharded, layout, random_vector(layout), tmp_path / "merged")
    before, after = Checkpoint(sharded.folder), Checkpoint(folder)
    changed = {n for n in before.ranges if before.read_bytes(n) != after.read_bytes(n)}
    assert changed == {name for name in before.ranges if "self_attn" in name}
    assert {place.dtype for place in after.ranges.values()} == {"BF16"}


def test_a_change_is_computed_wide_and_rounded_once(sharded, tmp_path):
    layout = layout_of(sharded, ("attention",))
    vector = random_vector(layout)
    folder = merge(sharded, layout, vector, tmp_path / "merged")
    wide = save_tiny("mixtral", tmp_path / "wide")
    base = Checkpoint(sharded.folder)
    merged_wide = merge(BaseCheckpoint(wide), layout, vector, tmp_path / "merged-wide")
    name = "model.layers.0.self_attn.q_proj.weight"
    change = Checkpoint(merged_wide).read(name) - Checkpoint(wide).read(name)
    expected = (base.read(name).float() + change).bfloat16().float()
    assert_near(Checkpoint(folder).read(name).float(), expected, 5e-3)


def test_an_interrupted_merge_goes_on_with_the_shards_that_are_missing(sharded, tmp_path):
    layout = layout_of(sharded)
    vector, target = random_vector(layout), tmp_path / "merged"

    def interrupt(done, _total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(sharded, layout, vector, target, interrupt)
    assert not target.exists()
    (partial,) = tmp_path.glob("merged.*.partial")
    first = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert len(first) == 3

    seen = []
    merge(sharded, layout, vector, target, lambda done, total: seen.append((done, total)))
    after = {path.name: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    assert {name: after[name] for name in first} == first
    assert not partial.exists()
    assert seen[-1] == (len(after), len(after))
    whole = merge(sharded, layout, vector, tmp_path / "whole")
    assert contents(target) == contents(whole)


def test_a_resumed_merge_of_another_adapter_does_not_mix_the_two(sharded, tmp_path):
    layout, target = layout_of(sharded), tmp_path / "merged"

    def interrupt(done, _total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(sharded, layout, random_vector(layout), target, interrupt)
    other = -random_vector(layout)
    merge(sharded, layout, other, target)
    assert contents(target) == contents(merge(sharded, layout, other, tmp_path / "whole"))


def test_an_existing_target_is_refused_and_left_alone(sharded, tmp_path):
    target = tmp_path / "merged"
    target.mkdir()
    (target / "precious").write_text("data")
    layout = layout_of(sharded)
    with pytest.raises(CheckpointError, match="merged exists; merge into a new folder"):
        merge(sharded, layout, layout.zeros(), target)
    assert contents(target) == {"precious": b"data"}


def test_a_vector_of_another_layout_writes_nothing(sharded, tmp_path):
    layout = layout_of(sharded)
    with pytest.raises(LayoutMismatch, match="another plan, rank or base model"):
        merge(sharded, layout, torch.zeros(layout.size + 1), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_family_is_refused_by_module(sharded, qwen, tmp_path):
    layout = layout_of(qwen.base)
    with pytest.raises(LayoutMismatch, match="shared_expert"):
        merge(sharded, layout, layout.zeros(), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_makes_weights_infinite_is_refused(sharded, tmp_path):
    layout = layout_of(sharded)
    vector = layout.zeros()
    vector[0] = float("inf")
    with pytest.raises(CheckpointError, match=r"q_proj.*not finite"):
        merge(sharded, layout, vector, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
