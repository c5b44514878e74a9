"""Sums under masks are the sums that a round expects, less what too few devices hold."""

from typing import Any

import numpy as np
import pytest
import torch

from proxymoe.common.adapter import AdapterLayout
from proxymoe.common.contribution import Limits
from proxymoe.common.errors import ConfigError, LayoutMismatch, ProtocolError
from proxymoe.common.masking import Device
from proxymoe.common.secagg import Phase
from proxymoe.server.aggregate import PlainSum
from proxymoe.server.secure_sum import SecureSum, contribution, mask_classes, terms_for
from proxymoe.simulations.faults.cohort import small_layout, small_plan
from proxymoe.simulations.secure import SimulatedKeys, aggregate

FULL = small_layout()
KEPT = {"a": (0, 1), "b": (0, 1), "c": (0, 1, 3), "d": (1, 2), "e": (0, 2)}
LAYOUTS = {name: FULL.held_under(small_plan(*kept)) for name, kept in KEPT.items()}
ATTEMPT: dict[str, Any] = {
    "run": "run",
    "round": 1,
    "attempt": 0,
    "base": "ab" * 32,
    "clip_norm": 1.0,
}


def terms(**changes):
    settings = ATTEMPT | {"clip_norm": 1.0, "smallest_cohort": 3, "smallest_class": 3} | changes
    return terms_for(FULL, LAYOUTS, **settings)


def updates():
    generator = torch.Generator().manual_seed(1)
    found = {
        name: torch.randn(layout.size, generator=generator) for name, layout in LAYOUTS.items()
    }
    return {name: 0.9 * update / update.norm() for name, update in found.items()}


def run(agreed, lost=lambda _phase, _name: False):
    keys = SimulatedKeys()
    secure = SecureSum(FULL, agreed, keys)
    devices = {
        name: Device(
            name,
            keys.signer(name),
            keys,
            agreed,
            Limits(2, 2),
            contribution(FULL, LAYOUTS[name], update),
            [],
            np.random.default_rng(0),
        )
        for name, update in updates().items()
    }
    aggregate(secure.coordinator, devices, lost)
    return secure


def plain(names):
    summation = PlainSum(FULL)
    for name in names:
        summation.add(name, LAYOUTS[name], updates()[name], 1.0)
    return summation.sum()


def test_blocks_with_the_same_holders_are_one_class():
    classes = mask_classes(FULL, LAYOUTS, 3)
    holders = {found.holders for found in classes}
    assert holders == {(0, 1, 2, 3, 4), (0, 1, 2, 4), (0, 1, 2, 3)}
    blocks = sorted(block for found in classes for block in found.blocks)
    common = [i for i, block in enumerate(FULL.blocks) if block.expert in (None, 0, 1)]
    assert blocks == common
    for found in classes:
        assert list(found.sizes) == [FULL.sizes[block] for block in found.blocks]


@pytest.mark.parametrize("gone", [(), ("d",)])
def test_the_sum_is_the_plain_sum_where_enough_devices_hold(gone):
    found = run(terms(), lambda phase, name: phase is Phase.UPLOAD and name in gone).sum()
    expected = plain([name for name in KEPT if name not in gone])
    assert found.num_devices == expected.num_devices == 5 - len(gone)
    held = found.weight > 0
    assert [FULL.blocks[i].expert for i in torch.nonzero(~held).flatten()] == [2, 3] * 4
    torch.testing.assert_close(found.weight[held], expected.weight[held])
    numbers = held.repeat_interleave(torch.tensor(FULL.sizes))
    torch.testing.assert_close(found.total[numbers], expected.total[numbers], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        found.mean(FULL)[numbers], expected.mean(FULL)[numbers], atol=1e-5, rtol=0
    )
    assert found.mean(FULL)[~numbers].eq(0).all()


def test_the_terms_name_the_round_and_fit_its_layout():
    agreed = terms(value_range=0.5)
    assert (agreed.run, agreed.round, agreed.attempt) == ("run", 1, 0)
    assert agreed.devices == tuple(KEPT)
    assert agreed.value_range == 0.5
    assert terms().value_range <= 1.0
    assert terms(value_range=1e4).word_bits == 32


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"smallest_cohort": 6}, r"5 devices, from 6 to 256 can be; .*\(federation\.cohort_size\)"),
        ({"smallest_class": 6}, "no block with 6 holders among 5 devices; use another cohort, or"),
    ],
    ids=["cohort", "class"],
)
def test_a_cohort_that_is_too_small_is_refused(change, reason):
    with pytest.raises(ConfigError, match=reason):
        terms(**change)


def test_a_cohort_that_is_too_large_is_refused():
    crowd = dict.fromkeys((f"d{number}" for number in range(257)), FULL)
    with pytest.raises(ConfigError, match="257 devices, from 2 to 256"):
        terms_for(
            FULL,
            crowd,
            run="run",
            round=1,
            attempt=0,
            base="ab" * 32,
            clip_norm=1.0,
            smallest_cohort=2,
            smallest_class=2,
        )


def test_terms_for_another_layout_are_refused():
    other = AdapterLayout(FULL.blocks, FULL.rank, seed=9)
    with pytest.raises(LayoutMismatch, match="for another adapter layout"):
        SecureSum(other, terms(), SimulatedKeys())


def test_an_update_in_another_layout_is_refused():
    with pytest.raises(LayoutMismatch):
        contribution(FULL, LAYOUTS["a"], torch.zeros(3))


def test_a_sum_of_nothing_is_refused():
    secure = run(terms(), lambda phase, name: phase is Phase.RELEASE and name == "d")
    assert secure.sum().num_devices == 5
    secure.coordinator._result = secure.coordinator.result.__class__((), (), {0: "why"})
    with pytest.raises(ProtocolError, match=r"nothing could be unmasked: .*why"):
        secure.sum()


def test_the_notice_says_what_is_protected_and_what_not():
    notice = SecureSum(FULL, terms(), SimulatedKeys()).notice
    assert "experimental" in notice
    assert "sums over at least 3 devices, which device holds what" in notice
