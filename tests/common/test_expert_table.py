"""An expert table is always a valid one, whatever the bytes, and mixtures of it are linear."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import numpy as safetensors

from proxymoe.common import domains
from proxymoe.common.allocation import covered_energy
from proxymoe.common.config import Allocation
from proxymoe.common.errors import CheckpointError, ConfigError
from proxymoe.common.expert_table import (
    ExpertTable,
    expert_table_bytes,
    expert_table_from,
    load_expert_table,
    save_expert_table,
)
from tests.laws import damaged, tried

energies = st.floats(0, 2.0**99, width=32)
weights = st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any)


def table_of(energy, allocation=Allocation.GLOBAL, floor=0.25, **changes):
    proper = {
        "domains": ("banking", "code", "travel"),
        "energy": {at: np.asarray(rows, np.float32) for at, rows in energy.items()},
        "expert_bytes": dict.fromkeys(energy, 100),
        "allocation": allocation,
        "floor": floor,
        "is_exact": True,
    }
    return ExpertTable(**{**proper, **changes})


@st.composite
def tables(draw):
    """Three domains, and one to three layers that are alike in number and bytes of experts."""
    layers = draw(st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True))
    shapes = dict.fromkeys(layers, (3, draw(st.integers(1, 6))))
    return table_of(
        {at: draw(arrays(np.float32, shape, elements=energies)) for at, shape in shapes.items()},
        draw(st.sampled_from(Allocation)),
        draw(st.floats(0, 1)),
        is_exact=draw(st.booleans()),
    )


def named(table, drawn):
    return dict(zip(table.domains, drawn, strict=True))


SMALL = table_of({1: [[1, 0], [0, 3], [2, 2]], 4: [[5, 1, 0], [0, 0, 9], [1, 1, 1]]})


@given(tables())
def test_a_table_survives_its_bytes_and_equal_tables_have_equal_bytes(table):
    content = expert_table_bytes(table)
    again = expert_table_from(content)
    for name in ("domains", "expert_bytes", "allocation", "floor", "is_exact", "num_experts"):
        assert getattr(again, name) == getattr(table, name)
    for at, energy in table.energy.items():
        assert np.array_equal(again.energy[at], energy)
    assert expert_table_bytes(again) == content


@given(tables(), weights, weights, st.integers(1, 5))
def test_a_mixture_of_mixtures_is_the_mixture_of_their_energies(table, one, other, scale):
    both = [a / sum(one) + b / sum(other) for a, b in zip(one, other, strict=True)]
    found = [table.mix(named(table, drawn)) for drawn in (one, other, both)]
    for at in table.energy:
        assert found[2][at] == pytest.approx((found[0][at] + found[1][at]) / 2, rel=1e-9)
    scaled = table.mix(named(table, [scale * weight for weight in one]))
    for at in table.energy:
        assert scaled[at] == pytest.approx(found[0][at], rel=1e-9)


def test_a_domain_that_is_not_named_weighs_nothing():
    assert {at: list(rows) for at, rows in SMALL.mix({"code": 7}).items()} == {
        1: [0, 3],
        4: [0, 0, 9],
    }


@tried(100)
@given(tables(), weights, weights, st.integers(0, 900))
def test_at_the_same_bytes_no_plan_for_another_mixture_covers_more(table, own, other, spare):
    scores = table.mix(named(table, own))
    num_bytes = sum(table.expert_bytes.values()) + spare
    kept = table.keep(table.mix(named(table, other)), num_bytes)
    best = table.keep(scores, table.bytes_of(kept))
    assert table.bytes_of(best) == table.bytes_of(kept) <= num_bytes
    assert covered_energy(scores, best) >= covered_energy(scores, kept) - 1e-9


@pytest.mark.parametrize(
    ("mixture", "reason"),
    [
        ({"law": 1.0}, r"domains \['law'\] are not in the table; known: .*banking"),
        ({}, "needs weights >= 0, some above 0"),
        ({"code": 0.0}, "some above 0"),
        ({"code": -0.5, "travel": 1.0}, "weights >= 0"),
        ({"code": float("nan")}, "weights >= 0"),
        ({"code": float("inf")}, "weights >= 0"),
    ],
)
def test_what_is_no_mixture_of_its_domains_is_refused(mixture, reason):
    with pytest.raises(ConfigError, match=reason):
        SMALL.mix(mixture)


ONES = np.ones((3, 2), np.float32)
NAN, NEGATIVE = (np.array([[1, x], [1, 1], [1, 1]], np.float32) for x in (np.nan, -1))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"domains": ("a",)}, "table of 1 domains; it needs 2 to 256"),
        ({"domains": ("b", "a", "c")}, "not sorted"),
        ({"domains": ("a", "a", "b")}, "not distinct"),
        ({"domains": ("../a", "b", "c")}, "domain '../a'"),
        ({"domains": ("a", "b")}, "layer 0: energies of 3 domains, named are 2"),
        ({"energy": {}, "expert_bytes": {}}, "energies of 0 layers"),
        ({"expert_bytes": {1: 100}}, "energies of 1 layers, and bytes of experts of 1"),
        ({"expert_bytes": {0: 0}}, "layer 0: experts of 0 bytes"),
        ({"energy": {0: ONES.astype(np.float64)}}, r"layer 0: energies of float64 \(3, 2\)"),
        ({"energy": {0: ONES[0]}}, r"layer 0: energies of float32 \(2,\)"),
        ({"energy": {0: ONES[:, :0]}}, r"layer 0: energies of float32 \(3, 0\)"),
        ({"energy": {0: NAN}}, "layer 0: .*not finite"),
        ({"energy": {0: NEGATIVE}}, "layer 0: .*negative"),
        ({"floor": 1.5}, "floor 1.5"),
    ],
)
def test_what_is_no_table_is_refused_with_the_reason(changes, reason):
    proper = {"domains": ("a", "b", "c"), "energy": {0: ONES}, "expert_bytes": {0: 100}}
    rule = {"allocation": Allocation.GLOBAL, "floor": 0.25, "is_exact": True}
    with pytest.raises(CheckpointError, match=reason):
        ExpertTable(**{**proper, **rule, **changes})


def header_of(**changes):
    proper = {
        "domains": ["a", "b", "c"],
        "expert_bytes": {"0": 100},
        "allocation": "global",
        "floor": 0.25,
        "is_exact": True,
    }
    return json.dumps({**proper, **changes})


@pytest.mark.parametrize(
    ("tensors", "header", "reason"),
    [
        ({"0": ONES}, None, r"header refused at \['all of it'\]"),
        ({"0": ONES}, "[]", r"header refused at \['all of it'\]"),
        ({"0": ONES}, header_of(allocation="all"), r"header refused at \['allocation'\]"),
        ({"0": ONES}, header_of(floor=None), r"header refused at \['floor'\]"),
        ({"0": ONES}, header_of(is_exact="yes"), r"header refused at \['is_exact'\]"),
        ({"0": ONES}, header_of(expert_bytes={"-1": 1}), "header refused at .*expert_bytes"),
        ({"0": ONES}, header_of(extra=1), r"header refused at \['extra'\]"),
        ({"0": ONES, "1": ONES}, header_of(), "layer '1': only its energies"),
        ({}, header_of(), "layer '0': only its energies, or only its bytes"),
        ({"0": ONES}, header_of(domains=["a", "c", "b"]), "not sorted"),
        ({"0": -ONES}, header_of(), "negative"),
    ],
)
def test_a_file_that_is_no_table_is_refused_by_name(tmp_path, tensors, header, reason):
    path = tmp_path / "experts.safetensors"
    path.write_bytes(safetensors.save(tensors, header and {"experts": header}))
    with pytest.raises(CheckpointError, match=rf"experts\.safetensors: .*{reason}"):
        load_expert_table(path)


def test_a_table_survives_the_disk_and_one_missing_or_too_large_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "table"
    save_expert_table(path, SMALL)
    assert expert_table_bytes(load_expert_table(path)) == path.read_bytes()
    with pytest.raises(CheckpointError, match=r"gone: cannot be read \(No such file"):
        load_expert_table(tmp_path / "gone")
    monkeypatch.setattr(domains, "MAX_TABLE_BYTES", 20)
    with pytest.raises(CheckpointError, match="table of 21 bytes, the limit is 20"):
        load_expert_table(path)


def test_the_layout_of_energies_in_memory_does_not_matter():
    strided = {at: np.asfortranarray(energy) for at, energy in SMALL.energy.items()}
    assert expert_table_bytes(table_of(strided)) == expert_table_bytes(SMALL)


@tried(200)
@given(st.data())
def test_any_bytes_are_a_table_or_an_error(data):
    content = damaged(data, expert_table_bytes(SMALL))
    try:
        table = expert_table_from(content)
    except CheckpointError:
        return
    scores = table.mix(dict.fromkeys(table.domains, 1.0))
    assert {at: len(values) for at, values in scores.items()} == table.num_experts
