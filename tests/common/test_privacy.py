"""Clipping bounds what a device can do, and the noise is what was promised, dropouts or not.

Statistics are seeded; bounds on a variance are five standard errors.
"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from proxymoe.common.errors import ConfigError, Diverged, ProtocolError
from proxymoe.common.privacy import COUNT_STEPS, Mechanism, Mode, Protected, Span
from proxymoe.common.privacy_settings import PrivacySettings

SIZE = 40_000
NOISY = [Mode.CENTRAL, Mode.DISTRIBUTED, Mode.LOCAL]
SMALL_GRID = 1 << 14
updates = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-1e6, 1e6, width=32))


def seeded(seed=0):
    return np.random.default_rng(seed).bytes


def mechanism(mode=Mode.CLIP_ONLY, **changed):
    fields = {"clip_norm": 2.0, "noise_multiplier": 0.0 if mode is Mode.CLIP_ONLY else 1.5}
    return Mechanism(mode, **{**fields, **changed})


def summed(parts):
    counts = [part.count for part in parts]
    total = None if None in counts else sum(counts)
    return Protected(np.sum([part.steps for part in parts], axis=0), total)


def run(tool, cohort, answering, size=SIZE, update=None, seed=0):
    """A round of devices that hold everything; what is released."""
    update = np.zeros(size, np.float32) if update is None else update
    spans = [Span(update.size, cohort)]
    parts = [tool.protect(update, seeded([seed, i]), spans, cohort) for i in range(answering)]
    answered = [Span(update.size, answering)]
    return tool.release(summed(parts), seeded([seed, 99]), spans, answered, cohort, answering)


def assert_deviation(numbers, expected):
    error = 5 * math.sqrt(2 / numbers.size)
    assert abs((numbers**2).mean() / expected**2 - 1) < error


@given(updates, st.floats(1e-3, 1e3), st.sampled_from([1, 100, 1 << 14, 1 << 26]))
def test_no_update_is_longer_than_the_clip_norm_whatever_its_numbers(update, clip_norm, grid):
    found = mechanism(clip_norm=clip_norm, clip_steps=grid).protect(
        update, seeded(), [Span(update.size, 1)], 1
    )
    assert sum(int(step) ** 2 for step in found.steps) <= grid**2  # in whole numbers: exactly
    assert found.count is None


@given(updates)
def test_a_short_update_passes_and_a_long_one_keeps_its_direction(update):
    tool = mechanism(clip_norm=3.0)
    found = tool.protect(update, seeded(), [Span(update.size, 1)], 1).steps * tool.step
    norm = float(np.linalg.norm(update.astype(np.float64)))
    expected = update.astype(np.float64) * min(1.0, 3.0 / norm if norm else 1.0)
    assert np.abs(found - expected).max() <= 2 * tool.step


def test_clipping_is_over_all_blocks_together():
    """Holding more experts buys no more influence."""
    tool = mechanism()
    one, many = (
        tool.protect(np.ones(size, np.float32), seeded(), [Span(10, 3)] * (size // 10), 3)
        for size in (10, 1000)
    )
    for found in (one, many):
        assert np.linalg.norm(found.steps * tool.step) == pytest.approx(2.0, rel=1e-3)


def test_without_noise_the_sum_is_the_sum():
    update = np.linspace(-0.01, 0.01, 100, dtype=np.float32)
    tool = mechanism()
    found = run(tool, 5, 4, update=update)
    assert np.abs(found.total - 4 * update.astype(np.float64)).max() <= 4 * tool.step
    assert (found.share_within, found.withheld) == (None, ())


@pytest.mark.parametrize("answering", [12, 10, 9])
def test_shares_sum_to_at_least_the_promised_noise_after_dropouts(answering):
    tool = mechanism(Mode.DISTRIBUTED, tolerated_dropouts=0.25)
    assert tool.needed(12) == 9
    found = run(tool, 12, answering).total
    assert_deviation(found, 1.5 * 2.0 * math.sqrt(answering / 9))


def test_every_block_has_whole_noise_however_few_hold_it():
    tool = mechanism(Mode.DISTRIBUTED, tolerated_dropouts=0.0)
    spans = [Span(SIZE, 3), Span(SIZE, 12), Span(SIZE, 3)]
    share = tool.protect(np.zeros(3 * SIZE, np.float32), seeded(), spans, 12).steps * tool.step
    for part, holders in zip(np.split(share, 3), (3, 12, 3), strict=True):
        assert_deviation(part, 1.5 * 2.0 / math.sqrt(holders))


def test_a_block_that_lost_too_many_holders_is_withheld():
    tool = mechanism(Mode.DISTRIBUTED, tolerated_dropouts=0.25, count_noise=2.0)
    asked, answered = [Span(5, 12), Span(7, 4)], [Span(5, 9), Span(7, 2)]
    total = Protected(np.full(12, 1000), 0)
    found = tool.release(total, seeded(), asked, answered, 12, 9)
    assert found.withheld == (1,)
    assert (found.total[:5] != 0).all()
    assert (found.total[5:] == 0).all()
    assert found.share_within == 0.5
    assert (total.steps == 1000).all()
    short = tool.release(total, seeded(), asked, [Span(5, 8), Span(7, 4)], 12, 8)
    assert short.withheld == (0,)
    assert short.share_within is None


def test_central_noise_is_added_once_and_local_noise_by_everybody():
    assert_deviation(run(mechanism(Mode.CENTRAL), 4, 4).total, 3.0)
    assert_deviation(run(mechanism(Mode.LOCAL), 4, 4).total, 3.0 * 2)
    found = mechanism(Mode.CENTRAL).protect(np.zeros(9), seeded(), [Span(9, 4)], 4)
    assert (found.steps == 0).all()


def test_releasing_again_draws_new_noise():
    tool = mechanism(Mode.CENTRAL)
    assert (run(tool, 2, 2, 50, seed=1).total != run(tool, 2, 2, 50, seed=2).total).any()


@pytest.mark.parametrize("mode", list(Mode))
def test_the_count_tells_the_share_of_short_updates(mode):
    tool = mechanism(mode, count_noise=0.0 if mode is Mode.CLIP_ONLY else 1.0)
    cohort, spans = 400, [Span(1, 400)]
    parts = [
        tool.protect(np.array([1.0 if i < 100 else 9.0]), seeded(i), spans, cohort)
        for i in range(cohort)
    ]
    found = tool.release(summed(parts), seeded(), spans, spans, cohort, cohort).share_within
    # Local noise is as large as the count for every device: its mean errs by 1/√400.
    assert found == pytest.approx(0.25, abs=5 / 20 if mode is Mode.LOCAL else 5 / 400)


def test_the_count_s_noise_is_what_was_asked_for():
    tool = mechanism(Mode.CENTRAL, count_noise=3.0)
    shares = [
        tool.release(
            Protected(np.zeros(1, np.int64), 0),
            seeded(i),
            [Span(1, 100)] * 1,
            [Span(1, 100)],
            100,
            100,
        ).share_within
        for i in range(800)
    ]
    assert_deviation((np.array(shares) - 0.5) * 100, 3.0)


@pytest.mark.parametrize("mode", NOISY)
def test_update_and_count_together_cost_what_the_multiplier_says(mode):
    tool = mechanism(mode, count_noise=1.0)
    assert tool.update_noise > tool.noise_multiplier
    together = tool.update_noise**-2 + (2 * 1.0) ** -2
    assert together == pytest.approx(tool.noise_multiplier**-2)
    assert mechanism(mode).update_noise == 1.5


def test_adaptive_clipping_finds_the_quantile():
    """Norms from 1 to 100: half of them are below the median, about 50."""
    settings = PrivacySettings(adaptive=True, largest_clip_norm=1e3)
    norms, clip_norm = np.linspace(1, 100, 200), 5.0
    for _ in range(200):
        clip_norm = settings.next_clip_norm(clip_norm, float((norms <= clip_norm).mean()))
    assert clip_norm == pytest.approx(50.5, rel=0.03)


def test_the_clip_norm_moves_within_its_bounds_and_only_if_asked():
    moving = PrivacySettings(adaptive=True, smallest_clip_norm=1.0, largest_clip_norm=1.1)
    assert moving.next_clip_norm(1.05, 0.0) == 1.1
    assert moving.next_clip_norm(1.05, 1.0) == 1.0
    assert moving.next_clip_norm(1.05, None) == 1.05
    assert PrivacySettings().next_clip_norm(7.0, 0.0) == 7.0


def test_settings_make_the_mechanism_of_a_round():
    exact = PrivacySettings(adaptive=True).mechanism(3.0, 40)
    assert (exact.mode, exact.noise_multiplier, exact.count_noise) == (Mode.CLIP_ONLY, 0.0, 0.0)
    fixed = PrivacySettings(mode="central", noise_multiplier=1.0).mechanism(3.0, 40)
    assert (fixed.noise_multiplier, fixed.count_noise, fixed.clip_norm) == (1.0, None, 3.0)
    promised = PrivacySettings(mode="central", epsilon=2.0, adaptive=True).mechanism(3.0, 40, 1.5)
    assert (promised.noise_multiplier, promised.count_noise) == (1.5, 2.0)


@given(st.integers(1, 200), st.floats(0, 0.99))
def test_some_holders_are_always_needed_and_never_more_than_there_are(holders, tolerated):
    tool = mechanism(Mode.DISTRIBUTED, tolerated_dropouts=tolerated)
    assert 1 <= tool.needed(holders) <= holders
    assert mechanism(Mode.CENTRAL, tolerated_dropouts=tolerated).needed(holders) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_stays_here(value):
    with pytest.raises(Diverged, match="nothing was sent"):
        mechanism().protect(np.array([0.0, value]), seeded(), [Span(2, 1)], 1)


def test_spans_must_fit_the_vector():
    with pytest.raises(ProtocolError, match="3 numbers for a vector of 2"):
        mechanism(Mode.LOCAL).protect(np.zeros(2), seeded(), [Span(3, 1)], 1)
    total = Protected(np.zeros(2, np.int64), None)
    with pytest.raises(ProtocolError, match="1 numbers for a vector of 2"):
        mechanism().release(total, seeded(), [Span(1, 1)], [Span(1, 1)], 1, 1)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"clip_norm": 0.0}, "clip norm 0"),
        ({"clip_norm": math.inf}, "clip norm inf"),
        ({"clip_steps": 1 << 27}, "in 134217728 steps"),
        ({"noise_multiplier": 0.0}, "must be above 0"),
        ({"noise_multiplier": math.nan}, "must be above 0"),
        ({"count_noise": 0.75}, "raise count_noise"),
    ],
)
def test_a_mechanism_that_promises_nothing_is_refused(changed, reason):
    with pytest.raises(ConfigError, match=reason):
        mechanism(Mode.CENTRAL, **changed)


def test_a_grid_too_coarse_for_the_noise_is_refused():
    tool = mechanism(Mode.DISTRIBUTED, clip_steps=8)
    with pytest.raises(ConfigError, match="raise clip_steps"):
        tool.protect(np.zeros(4), seeded(), [Span(4, 100)], 100)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"mode": "central"}, "0 of noise_multiplier and epsilon"),
        ({"mode": "local", "epsilon": 1.0, "noise_multiplier": 1.0}, "with 2 of"),
        ({"noise_multiplier": 1.0}, "clip_only with 1 of"),
        ({"mode": "distributed", "epsilon": 1.0, "sampling": "poisson"}, "knows whom it asked"),
        ({"smallest_clip_norm": 2.0, "largest_clip_norm": 1.0}, "is above"),
        ({"noise": 1.0}, "Extra inputs"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(fields, reason):
    with pytest.raises(ValidationError, match=reason):
        PrivacySettings(**fields)


def test_the_default_only_clips():
    settings = PrivacySettings()
    assert settings.mode is Mode.CLIP_ONLY
    assert not list(itertools.chain(filter(None, [settings.noise_multiplier, settings.epsilon])))
    assert COUNT_STEPS % 2 == 0
