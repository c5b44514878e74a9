"""A row moves the mixture by no more than promised, and the noise is what the promise needs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from proxymoe.client import mixture as mixture_module
from proxymoe.client.mixture import (
    gaussian_delta,
    mixture_of,
    noise_scale,
    project,
    release,
    row_mixtures,
    rows_needed,
    secure_normals,
)
from proxymoe.common.domains import DomainTable, count_tokens, domain_table, total_variation
from proxymoe.common.errors import ConfigError, DataError

ASSETS = Path(__file__).parents[2] / "simulations" / "assets"
TABLE = domain_table({"a": [9, 1, 5, 0], "b": [1, 9, 5, 0], "c": [2, 2, 1, 30]})
ROWS = st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=1, max_size=6)
EPSILONS = st.floats(1e-3, 100)
DELTAS = st.floats(1e-10, 0.1)


@given(ROWS)
def test_every_row_is_a_mixture_and_independent_of_the_others(rows):
    weights = row_mixtures(TABLE, rows)
    assert weights.shape == (len(rows), 3)
    assert (weights >= 0).all()
    assert weights.sum(axis=1) == pytest.approx(1.0, abs=1e-12)
    alone = np.concatenate([row_mixtures(TABLE, [row]) for row in rows])
    assert weights == pytest.approx(alone, abs=1e-12)


@given(ROWS, st.lists(st.integers(0, 3), max_size=8), st.data())
def test_another_row_in_the_place_of_one_moves_the_mixture_no_further_than_promised(
    rows, other, data
):
    place = data.draw(st.integers(0, len(rows) - 1))
    changed = [*rows[:place], other, *rows[place + 1 :]]
    before = np.array(list(mixture_of(TABLE, rows).values()))
    after = np.array(list(mixture_of(TABLE, changed).values()))
    assert np.abs(after - before).sum() <= 2 / len(rows) + 1e-12
    assert np.linalg.norm(after - before) <= math.sqrt(2) / len(rows) + 1e-12


def test_the_promise_is_not_larger_than_it_has_to_be():
    rows = [[0] * 200] * 4
    changed = [[1] * 200, *rows[1:]]
    table = domain_table({"a": [10**6, 0], "b": [0, 10**6]})
    one, other = (mixture_of(table, found) for found in (rows, changed))
    assert total_variation(one, other) == pytest.approx(1 / 4, abs=0.01)


def test_em_finds_the_likeliest_weights():
    row = [0, 0, 1, 2, 3, 3, 0]
    (found,) = row_mixtures(TABLE, [row])
    likelihoods = np.exp(TABLE.log_probabilities.astype(np.float64))[:, row]
    grid = [(i, j, 60 - i - j) for i in range(61) for j in range(61 - i)]
    best = max(np.log(np.array(w) / 60 @ likelihoods).sum() for w in grid)
    assert np.log(found @ likelihoods).sum() >= best - 0.02


def test_rows_without_tokens_fit_every_domain_and_still_count():
    assert row_mixtures(TABLE, [[], [3] * 50]) == pytest.approx(
        np.array([[1 / 3, 1 / 3, 1 / 3], [0, 0, 1]]), abs=0.05
    )
    assert sum(mixture_of(TABLE, [[]]).values()) == pytest.approx(1)


def test_rows_are_explained_alike_in_chunks_of_any_size(monkeypatch):
    rows = [[i % 4, (i * i) % 4, 3] for i in range(20)] + [[]] * 3
    whole = row_mixtures(TABLE, rows)
    monkeypatch.setattr(mixture_module, "CHUNK_TOKENS", 7)
    assert row_mixtures(TABLE, rows) == pytest.approx(whole, abs=1e-12)
    monkeypatch.setattr(mixture_module, "MAX_ROW_TOKENS", 2)
    assert row_mixtures(TABLE, rows) == pytest.approx(
        row_mixtures(TABLE, [row[:2] for row in rows]), abs=1e-12
    )


def test_a_table_made_to_break_the_mathematics_does_not():
    sharp = np.array([[0, -1e30], [-1e30, 0]], np.float32)
    table = DomainTable(("a", "b"), sharp)
    weights = row_mixtures(table, [[0, 1, 0], [1, 1], [], [0] * 4095 + [1]])
    assert np.isfinite(weights).all()
    assert weights.sum(axis=1) == pytest.approx(1.0)


@pytest.mark.parametrize("token", [-1, 4])
def test_tokens_of_another_tokenizer_are_refused_without_telling_them(token):
    with pytest.raises(DataError, match="outside the 4 of the domain table") as caught:
        mixture_of(TABLE, [[0], [token]])
    assert "-1" not in str(caught.value)


def test_no_rows_are_no_mixture():
    with pytest.raises(DataError, match="no rows to describe; add data, or name a domain"):
        mixture_of(TABLE, [])


def hockey_stick(scale, epsilon):
    """delta of the Gaussian mechanism at sensitivity 1, by its definition."""
    x = np.linspace(-60 * scale, 60 * scale, 400_001)
    near = np.exp(-(((x - 1) / scale) ** 2) / 2)
    far = np.exp(-((x / scale) ** 2) / 2 + epsilon)
    excess = np.maximum(near - far, 0) / (scale * math.sqrt(2 * math.pi))
    return float(excess.sum() * (x[1] - x[0]))


@pytest.mark.parametrize(("epsilon", "scale"), [(0.1, 5.0), (1.0, 2.0), (1.0, 0.5), (8.0, 0.5)])
def test_the_closed_form_of_delta_is_its_definition(epsilon, scale):
    assert gaussian_delta(scale, epsilon) == pytest.approx(hockey_stick(scale, epsilon), rel=1e-4)


@given(EPSILONS, DELTAS, st.floats(1e-6, 1e6))
def test_the_noise_is_enough_and_a_little_less_is_not(epsilon, delta, sensitivity):
    unit = noise_scale(1.0, epsilon, delta)
    assert gaussian_delta(unit, epsilon) <= delta
    assert gaussian_delta(unit * (1 - 1e-6), epsilon) > delta
    assert noise_scale(sensitivity, epsilon, delta) == pytest.approx(sensitivity * unit)


@given(st.floats(1e-3, 1), st.floats(1e-10, 1e-2))
def test_the_noise_is_less_than_by_the_textbook_formula(epsilon, delta):
    assert noise_scale(1.0, epsilon, delta) < math.sqrt(2 * math.log(1.25 / delta)) / epsilon


@pytest.mark.parametrize(
    ("epsilon", "delta", "named"),
    [
        (0.0, 1e-5, "epsilon 0 is out of range; choose 0.001 to 100"),
        (1000.0, 1e-5, "epsilon 1000"),
        (math.nan, 1e-5, "epsilon nan"),
        (1.0, 0.0, "delta 0 is out of range; choose 1e-10 to 0.1"),
        (1.0, 0.5, "delta 0.5"),
    ],
)
def test_promises_out_of_range_are_refused(epsilon, delta, named):
    with pytest.raises(ConfigError, match=named):
        release({"a": 0.5, "b": 0.5}, 10**6, epsilon, delta)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=8).map(np.array), st.data())
def test_projection_finds_the_nearest_mixture(point, data):
    nearest = project(point)
    assert (nearest >= 0).all()
    assert nearest.sum() == pytest.approx(1)
    assert project(nearest) == pytest.approx(nearest, abs=1e-12)
    weights = st.lists(st.floats(0.01, 1), min_size=point.size, max_size=point.size)
    other = np.array(data.draw(weights))
    other /= other.sum()
    assert np.linalg.norm(point - nearest) <= np.linalg.norm(point - other) + 1e-9


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9).filter(lambda w: sum(w) > 0.1), EPSILONS)
def test_what_is_released_is_a_mixture_of_the_same_domains(weights, epsilon):
    mixture = {f"d{i}": weight / sum(weights) for i, weight in enumerate(weights)}
    released = release(mixture, 10**9, epsilon, 1e-5)
    assert list(released) == list(mixture)
    assert min(released.values()) >= 0
    assert sum(released.values()) == pytest.approx(1)
    assert total_variation(mixture, released) < 0.01


def test_the_noise_that_is_added_has_the_promised_scale():
    rng = np.random.default_rng(0)
    mixture = {f"d{i}": 0.25 for i in range(4)}
    draws = [release(mixture, 1000, 1.0, 1e-5, rng.standard_normal) for _ in range(2000)]
    values = np.array([list(draw.values()) for draw in draws])
    scale = noise_scale(math.sqrt(2) / 1000, 1.0, 1e-5)
    # The projection takes the noise's part along (1, 1, 1, 1) away, a quarter of its variance.
    assert values.std(axis=0) == pytest.approx(np.sqrt(3 / 4) * scale, rel=0.1)


def test_a_mixture_is_released_from_as_many_rows_as_leave_it_useful():
    mixture = {"a": 0.6, "b": 0.3, "c": 0.1}
    needed = rows_needed(3, 1.0, 1e-5)
    assert release(mixture, needed, 1.0, 1e-5).keys() == mixture.keys()
    reason = rf"{needed - 1} rows are too few .* 3 domains .* useful from {needed} rows on; add"
    with pytest.raises(DataError, match=reason):
        release(mixture, needed - 1, 1.0, 1e-5)


@given(st.integers(2, 256), EPSILONS, DELTAS)
def test_more_domains_and_less_epsilon_take_more_rows(num_domains, epsilon, delta):
    needed = rows_needed(num_domains, epsilon, delta)
    assert needed >= 1
    assert rows_needed(num_domains + 1, epsilon, delta) >= needed
    assert rows_needed(num_domains, epsilon / 2 + 5e-4, delta) >= needed
    noise = (
        num_domains * noise_scale(math.sqrt(2) / needed, epsilon, delta) / math.sqrt(2 * math.pi)
    )
    assert noise <= mixture_module.USEFUL_NOISE * (1 + 1e-9)


@pytest.mark.parametrize(
    "weights",
    [{}, {"a": 0.5}, {"a": 2.0, "b": -1.0}, {"a": math.nan, "b": 0.5}, {"a": 0.9, "b": 0.2}],
)
def test_what_is_no_mixture_has_no_promised_sensitivity_and_is_not_released(weights):
    with pytest.raises(ConfigError, match="weights >= 0 that sum to 1"):
        release(weights, 10**6, 1.0, 1e-5)


def test_secure_numbers_are_standard_normal_and_never_twice_the_same():
    numbers = np.array(secure_normals(4000))
    assert abs(numbers.mean()) < 0.1
    assert numbers.std() == pytest.approx(1, abs=0.1)
    assert (np.abs(numbers) < 2).mean() == pytest.approx(0.954, abs=0.03)
    assert secure_normals(2) != secure_normals(2)


@pytest.fixture(scope="module")
def real():
    """The table of the shipped public domains, and a reader of rows; no torch needed."""
    tokenizer = Tokenizer.from_file(str(ASSETS / "tiny-moe" / "tokenizer.json"))

    def read(path, limit):
        lines = path.read_text(encoding="utf-8").splitlines()[:limit]
        texts = ["".join(json.loads(line).values()) for line in lines]
        return [found.ids for found in tokenizer.encode_batch(texts, add_special_tokens=False)]

    size = tokenizer.get_vocab_size()
    paths = sorted((ASSETS / "calibration").glob("*.jsonl"))
    return domain_table({path.stem: count_tokens(read(path, 300), size) for path in paths}), read


def test_each_real_device_finds_its_own_domain_also_under_noise(real):
    table, read = real
    names = sorted(path.name for path in (ASSETS / "clinc150").iterdir() if path.is_dir())
    assert len(names) == 10
    for name in names:
        rows = read(ASSETS / "clinc150" / name / "train.jsonl", 300)
        private = mixture_of(table, rows)
        assert private[name] > 0.8, name
        rng = np.random.default_rng(len(name))
        released = release(private, len(rows), 1.0, 1e-5, rng.standard_normal)
        assert max(released, key=lambda domain: released[domain]) == name


def test_a_device_of_two_domains_gets_both_weights(real):
    table, read = real
    rows = read(ASSETS / "clinc150" / "travel" / "train.jsonl", 90)
    rows += read(ASSETS / "clinc150" / "banking" / "train.jsonl", 30)
    truth = {"travel": 0.75, "banking": 0.25}
    assert total_variation(mixture_of(table, rows), truth) < 0.15
