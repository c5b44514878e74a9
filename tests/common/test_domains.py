"""A domain table is always a table of distributions, whatever the counts or the bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import numpy as safetensors

from proxymoe.common import domains
from proxymoe.common.domains import (
    DomainTable,
    changed_enough,
    count_tokens,
    domain_table,
    load_table,
    save_table,
    table_bytes,
    table_from,
    total_variation,
)
from proxymoe.common.errors import CheckpointError, DataError
from tests.laws import damaged, tried

COUNTS = {"travel": [4, 0, 0, 6], "banking": [0, 8, 2, 0]}
NAMES = st.text("abcxyz_-.09", min_size=1, max_size=6).filter(domains.DOMAIN.fullmatch)
WEIGHTS = st.dictionaries(st.sampled_from("abcd"), st.floats(0, 1), min_size=1).filter(
    lambda mixture: sum(mixture.values()) > 0.1
)


def mixture(weights):
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


@given(
    st.integers(1, 9).flatmap(
        lambda size: st.dictionaries(
            NAMES,
            st.lists(st.integers(0, 10**6), min_size=size, max_size=size).filter(any),
            min_size=2,
            max_size=5,
        )
    )
)
def test_every_domain_is_a_distribution_in_which_nothing_is_impossible(counts):
    table = domain_table(counts)
    assert table.domains == tuple(sorted(counts))
    assert np.exp(table.log_probabilities).sum(axis=1) == pytest.approx(1.0, abs=1e-5)
    assert np.isfinite(table.log_probabilities).all()
    again = table_from(table_bytes(table))
    assert again.domains == table.domains
    assert np.array_equal(again.log_probabilities, table.log_probabilities)


def test_a_token_is_likeliest_where_it_occurs_and_one_never_seen_says_nothing():
    table = domain_table({"a": [9, 1, 0], "b": [1, 9, 0]})
    first, second, unseen = table.log_probabilities.T
    assert first[0] > first[1]
    assert second[1] > second[0]
    assert unseen[0] == pytest.approx(unseen[1])


def test_how_much_text_a_domain_has_does_not_matter():
    small, large = domain_table(COUNTS), domain_table({**COUNTS, "travel": [4e6, 0, 0, 6e6]})
    assert small.log_probabilities == pytest.approx(large.log_probabilities, abs=0.3)


def test_tokens_are_counted():
    assert count_tokens([[1, 1, 3], [], [0]], 5).tolist() == [1, 2, 0, 1, 0]
    assert count_tokens([], 2).tolist() == [0, 0]


@pytest.mark.parametrize("token", [-1, 5])
def test_a_token_outside_the_vocabulary_is_refused(token):
    with pytest.raises(DataError, match="outside a vocabulary of 5; of another tokenizer"):
        count_tokens([[0, token]], 5)


@pytest.mark.parametrize(
    ("counts", "error", "reason"),
    [
        ({}, CheckpointError, "table of 0 domains; it needs 2 to 256"),
        ({"a": [1]}, CheckpointError, "table of 1 domains"),
        ({str(i): [1] for i in range(257)}, CheckpointError, "table of 257 domains"),
        ({"a": [1, 2], "b": [1]}, DataError, "one vocabulary is needed"),
        ({"a": [[1]], "b": [[1]]}, DataError, "one vocabulary is needed"),
        ({"a": [0, 0], "b": [1, 1]}, DataError, "domain a: .*all zero"),
        ({"a": [1, 1], "b": [-1, 2]}, DataError, "domain b: .*negative"),
        ({"a": [1, 1], "b": [float("nan"), 2]}, DataError, "domain b: .*not finite"),
        ({"a": [1], "../b": [1]}, CheckpointError, "domain '../b'"),
    ],
)
def test_counts_that_make_no_table_are_refused(counts, error, reason):
    with pytest.raises(error, match=reason):
        domain_table(counts)


def test_a_table_survives_the_disk(tmp_path):
    table = domain_table(COUNTS)
    save_table(tmp_path / "domains.safetensors", table)
    again = load_table(tmp_path / "domains.safetensors")
    assert again.domains == ("banking", "travel")
    assert np.array_equal(again.log_probabilities, table.log_probabilities)
    assert (
        table_bytes(again) == table_bytes(table) == (tmp_path / "domains.safetensors").read_bytes()
    )


def test_the_layout_of_a_table_in_memory_does_not_matter():
    table = domain_table(COUNTS)
    strided = DomainTable(table.domains, np.asfortranarray(table.log_probabilities))
    assert table_bytes(strided) == table_bytes(table)


HALF = np.log(np.full(2, 0.5, np.float32))


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({}, "table of 0 domains"),
        ({"a": HALF}, "table of 1 domains"),
        ({"a": HALF, "b": HALF.astype(np.float64)}, "different types or sizes"),
        ({"a": HALF, "b": np.log(np.full(4, 0.25, np.float32))}, "different types or sizes"),
        ({"a": HALF.astype(np.float16), "b": HALF.astype(np.float16)}, "table of float16"),
        ({"a": HALF[None], "b": HALF[None]}, r"table of float32 \(2, 1, 2\)"),
        ({"a": HALF, "b": HALF + 1}, r"domains \['b'\]: not finite, or prob"),
        ({"a": HALF, "b": np.array([0, -np.inf], np.float32)}, r"domains \['b'\]: not finite"),
        ({"a": HALF, "b": np.array([0, np.nan], np.float32)}, r"domains \['b'\]: not finite"),
        ({"a": HALF, "b": np.array([3e38, 3e38], np.float32)}, r"domains \['b'\]"),
        ({"a": HALF, " b": HALF}, "domain ' b'"),
    ],
)
def test_a_file_that_is_no_table_is_refused_by_name(tmp_path, tensors, reason):
    path = tmp_path / "domains.safetensors"
    path.write_bytes(safetensors.save(tensors))
    with pytest.raises(CheckpointError, match=rf"domains\.safetensors: .*{reason}"):
        load_table(path)


def test_a_table_that_is_missing_or_too_large_is_refused(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"gone: cannot be read \(No such file"):
        load_table(tmp_path / "gone")
    save_table(tmp_path / "table", domain_table(COUNTS))
    monkeypatch.setattr(domains, "MAX_TABLE_BYTES", 20)
    with pytest.raises(CheckpointError, match="table of 21 bytes, the limit is 20"):
        load_table(tmp_path / "table")


@tried(200)
@given(st.data())
def test_any_bytes_are_a_table_or_an_error(data):
    content = damaged(data, table_bytes(domain_table(COUNTS)))
    try:
        table = table_from(content)
    except CheckpointError:
        return
    assert table.log_probabilities.shape == (len(table.domains), table.vocab_size)


@given(WEIGHTS.map(mixture), WEIGHTS.map(mixture), WEIGHTS.map(mixture))
def test_total_variation_is_a_distance_from_zero_to_one(one, other, third):
    assert total_variation(one, one) == 0
    assert total_variation(one, other) == total_variation(other, one) <= 1 + 1e-9
    through = total_variation(one, third) + total_variation(third, other)
    assert total_variation(one, other) <= through + 1e-9


def test_a_plan_is_made_anew_only_if_enough_weight_moved():
    old = {"a": 0.5, "b": 0.5}
    assert changed_enough(None, old, 1.0)
    assert not changed_enough(old, {"a": 0.4, "b": 0.5, "c": 0.1}, 0.2)
    assert changed_enough(old, {"a": 0.2, "b": 0.5, "c": 0.3}, 0.2)
    assert changed_enough({"a": 1.0}, {"c": 1.0}, 1.0)
