"""The largest submodel that fits, no larger and no smaller; and advice that would help."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.budget import Part
from proxymoe.common.config import AdapterSettings, ExtractSettings, TrainSettings
from proxymoe.common.errors import BudgetError
from proxymoe.common.plan import LayerPlan, Plan, Precision, RouterMode
from proxymoe.server.extract import largest_bytes, smallest_bytes
from proxymoe.server.fit import Fit
from tests.laws import tried
from tests.server.test_extract import profile_of

MIXTURE = {"domain0": 1.0}
TRAIN = TrainSettings(batch_size=2, max_tokens=32, dtype="float32")


def fit_of(tiny, **fields):
    extract = ExtractSettings(**fields)
    adapter = AdapterSettings(targets=("attention",), rank=4)
    return Fit(tiny.base, profile_of(tiny), extract, adapter, TRAIN, [0])


def peaks(fit):
    """Of the smallest and of the largest submodel."""
    for size in (smallest_bytes, largest_bytes):
        plan = fit.cut(MIXTURE, size(fit.base, fit.extract)).plan
        yield fit.predicted(plan, MIXTURE).peak


@tried(20)
@given(share=st.floats(0, 1.2), precision=st.sampled_from(Precision))
def test_what_is_found_fits_and_with_another_expert_it_would_not(qwen, share, precision):
    fit = fit_of(qwen, experts=precision)
    low, high = peaks(fit)
    peak = int(low + share * (high - low)) + 1
    cut, budget = fit.largest(MIXTURE, peak)
    assert budget.peak <= peak
    assert fit.predicted(cut.plan, MIXTURE) == budget
    if not cut.plan.keeps_all:
        one = max(fit.base.held_expert_bytes(precision).values())
        more = fit.cut(MIXTURE, cut.num_bytes + 2 * one).plan
        assert more.num_kept > cut.plan.num_kept
        assert fit.predicted(more, MIXTURE).peak > peak


def test_the_same_budget_holds_more_experts_the_narrower_they_are(qwen):
    low, high = peaks(fit_of(qwen))
    kept = [
        fit_of(qwen, experts=precision).largest(MIXTURE, (low + high) // 2)[0].plan.num_kept
        for precision in (Precision.BF16, Precision.INT8, Precision.INT4)
    ]
    assert kept == sorted(kept)
    assert kept[0] < kept[-1]


def test_a_roomy_budget_keeps_all(qwen):
    for precision in Precision:
        plan = fit_of(qwen, experts=precision).largest(MIXTURE, 1 << 40)[0].plan
        assert plan.keeps_all
        assert plan.is_base == (precision is Precision.BF16)


def test_a_budget_below_everything_names_the_smallest_and_what_takes_it(qwen):
    fit = fit_of(qwen)
    smallest = next(peaks(fit))
    with pytest.raises(
        BudgetError, match=r"1\.0 MB is below the smallest .*runtime 510 MB"
    ) as told:
        fit.largest(MIXTURE, 10**6)
    assert f"{smallest / 1e6:,.1f} MB with one expert per layer" in str(told.value)
    with pytest.raises(BudgetError, match="smallest peak"):
        fit.largest(MIXTURE, smallest - 1)
    assert fit.largest(MIXTURE, smallest)[1].peak == smallest


def test_advice_saves_what_it_says_and_the_best_comes_first(qwen):
    fit = fit_of(qwen)
    plan = fit.cut(MIXTURE).plan
    helps = fit.remedies(plan, MIXTURE)
    assert [saved for _, saved in helps] == sorted((s for _, s in helps), reverse=True)
    assert dict(helps).keys() >= {
        "train.max_tokens = 16",
        "train.batch_size = 1",
        "train.gradient_checkpointing = true",
        'train.dtype = "bfloat16"',
        'extract.experts = "int4"',
        "adapter.rank = 2",
    }
    narrow = plan.model_copy(update={"experts": Precision.INT4})
    less = fit.predicted(plan, MIXTURE).peak - fit.predicted(narrow, MIXTURE).peak
    assert dict(helps)['extract.experts = "int4"'] == less > 0


def test_tokens_count_that_are_sent_to_experts_that_are_kept(qwen):
    """A kept expert that nobody is routed to costs its weights alone; all of it, activations."""
    fit, sizes = fit_of(qwen), {}
    for kept in (tuple(range(4)), tuple(range(8))):
        layers = {at: LayerPlan(num_experts=8, kept=kept) for at in qwen.base.num_experts}
        for router in (RouterMode.FULL, RouterMode.SLICED):
            plan = Plan(base=qwen.base.digest, layers=layers, router=router)
            terms = fit.predicted(plan, MIXTURE).terms
            sizes[len(kept), router] = terms[Part.ACTIVATIONS]
    assert sizes[4, RouterMode.FULL] < sizes[8, RouterMode.FULL]
    assert sizes[4, RouterMode.FULL] < sizes[4, RouterMode.SLICED]
