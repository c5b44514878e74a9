"""What tuning takes: terms that add up, and formulas that agree with what autograd really keeps."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.adapter import adapter_layout
from proxymoe.common.attach import AttachedAdapter
from proxymoe.common.budget import Budget, Held, LayerSizes, Part, Sizes, kept_bytes, predict
from proxymoe.common.config import TrainSettings
from proxymoe.common.experts import expert_state, only_valid_tokens
from proxymoe.common.loss import completion_loss
from proxymoe.common.model import load
from proxymoe.common.moe import moe_layers
from proxymoe.common.plan import LayerPlan, Plan, Precision
from proxymoe.common.sizes import held_under, sizes_of
from proxymoe.common.text import Example, collate
from tests.laws import tried

ROWS, TOKENS = 4, 128

small = st.integers(1, 64)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Sizes, Held, TrainSettings]:
    hidden, num_routed = 8 * draw(small), draw(st.integers(1, 16))
    top_k, kept = draw(st.integers(1, num_routed)), draw(st.integers(1, num_routed))
    layer = LayerSizes(num_routed, top_k, 8 * draw(small))
    sizes = Sizes(hidden, 100 * draw(small), 2, 8, 6 * hidden, {0: layer, 1: layer})
    held = Held(
        trunk_bytes=draw(small) << 20,
        expert_bytes=kept << 20,
        kept={0: kept, 1: kept},
        picks=dict.fromkeys((0, 1), top_k * kept / num_routed),
        trained=100 * draw(small),
        frozen=draw(small),
        adapted=draw(small),
    )
    dtype = draw(st.sampled_from(["bfloat16", "float32"]))
    train = TrainSettings.model_validate(
        {"batch_size": draw(small), "max_tokens": 8 * draw(small), "dtype": dtype}
    )
    return sizes, held, train


@tried(50)
@given(cases())
def test_the_peak_is_the_sum_of_terms_of_which_one_is_the_largest(case):
    budget = predict(*case)
    assert set(budget.terms) == set(Part)
    assert min(budget.terms.values()) >= 0
    assert budget.peak == sum(budget.terms.values())
    assert budget.terms[budget.dominant] == max(budget.terms.values())
    assert sum(budget.share(part) for part in Part) == pytest.approx(1.0)


@tried(50)
@given(cases(), st.sampled_from(["batch_size", "max_tokens"]))
def test_more_rows_and_longer_ones_take_more(case, which):
    sizes, held, train = case
    more = train.model_copy(update={which: getattr(train, which) * 2})
    assert predict(sizes, held, more).peak > predict(sizes, held, train).peak


@tried(50)
@given(cases())
def test_more_weights_and_more_trained_numbers_take_more(case):
    sizes, held, train = case
    before = predict(sizes, held, train).peak
    for name in ("trunk_bytes", "expert_bytes", "trained", "frozen"):
        more = replace(held, **{name: getattr(held, name) + 1000})
        assert predict(sizes, more, train).peak > before


@tried(20)
@given(cases())
def test_sgd_takes_no_moments(case):
    sizes, held, train = case
    plain = predict(sizes, held, train.model_copy(update={"optimizer": "sgd"}))
    less = predict(sizes, held, train).terms[Part.ADAPTER] - plain.terms[Part.ADAPTER]
    assert less == 8 * held.trained


def test_the_dominant_term_is_named():
    terms = dict.fromkeys(Part, 1) | {Part.LOGITS: 7}
    assert Budget(terms).dominant is Part.LOGITS
    assert Budget(terms).share(Part.LOGITS) == 7 / (len(Part) + 6)


@pytest.mark.parametrize("targets", [("attention", "shared"), ("attention", "experts")])
@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "mixtral", "qwen3_moe"])
def test_activations_are_what_autograd_keeps(tiny, family, targets, tmp_path):
    source, kept = tiny(family), (0, 3, 4, 5, 7)
    plan = Plan(
        base=source.base.digest,
        layers={at: LayerPlan(num_experts=8, kept=kept) for at in source.base.num_experts},
    )
    loaded = load(source.base.materialise(plan, tmp_path / "cut"))
    sizes = sizes_of(source.base.skeleton)
    layout = adapter_layout(source.base.skeleton, targets, 4, 0).held_under(plan)
    train = TrainSettings(batch_size=ROWS, max_tokens=TOKENS, dtype="float32")
    measured, picks = kept_by_autograd(loaded, layout)
    held = held_under(source.base.pieces_of(plan), plan, sizes, layout, picks, 4)
    assert kept_bytes(sizes, held, train) == pytest.approx(measured, rel=0.1)


def kept_by_autograd(loaded, layout):
    """Bytes that a step's graph holds beside parameters, and picks per token of each layer."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(4, 99, (ROWS, TOKENS), generator=generator).tolist()
    batch = collate([Example(tuple(row), start=1) for row in tokens])
    own = {p.untyped_storage().data_ptr() for p in loaded.model.parameters()}
    held, counts = {}, {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that no other gets it
        return tensor

    vector = layout.zeros().requires_grad_()
    for layer in moe_layers(loaded.model):
        at = layer.position
        expert_state(layer.experts).observer = lambda _, gates, __, at=at: counts.update(
            {at: gates.numel() / (ROWS * TOKENS)}
        )
    with AttachedAdapter(loaded.model, layout) as adapter, only_valid_tokens(batch.valid):
        adapter.bind(vector)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
            completion_loss(loaded.model, batch)
    return sum(size for size, _ in held.values()), counts


def test_codes_take_the_place_of_experts_and_one_is_widened_at_a_time(qwen):
    sizes = sizes_of(qwen.base.skeleton)
    picks = dict.fromkeys(qwen.base.num_experts, 4.0)
    layout = adapter_layout(qwen.base.skeleton, ("attention",), 4, 0)
    train = TrainSettings(batch_size=1, max_tokens=16, dtype="float32")
    peaks = []
    for precision in (Precision.BF16, Precision.INT8, Precision.INT4):
        plan = qwen.base.keep_all(precision)
        held = held_under(qwen.base.pieces, plan, sizes, layout, picks, 4)
        each = qwen.base.held_expert_bytes(precision)
        assert held.expert_bytes == 8 * sum(each.values())
        assert (held.widest > 0) == (precision is not Precision.BF16)
        peaks.append(predict(sizes, held, train).peak)
    assert peaks == sorted(peaks, reverse=True)
