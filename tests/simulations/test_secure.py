"""Simulated rounds can be summed under masks, by the same seam."""

import numpy as np
import pytest
import torch

from proxymoe.common.errors import ConfigError, ProtocolError
from proxymoe.server.aggregate import PlainSum
from proxymoe.simulations.faults.cohort import small_layout, small_plan
from proxymoe.simulations.secure import MaskedSum, SimulatedKeys

FULL = small_layout()


def both(weights):
    masked = MaskedSum(FULL, 1.0, 3, np.random.default_rng(0))
    plain = PlainSum(FULL)
    layout = FULL.held_under(small_plan(0, 1))
    for number, weight in enumerate(weights):
        generator = torch.Generator().manual_seed(number)
        update = torch.randn(layout.size, generator=generator)
        update *= 0.9 / update.norm()
        for summation in (masked, plain):
            summation.add(f"device{number}", layout, update, weight)
    return masked, plain


@pytest.mark.parametrize("weights", [[1.0] * 4, [3.0, 1.0, 0.5]], ids=["equal", "unequal"])
def test_a_masked_sum_is_a_plain_sum(weights):
    masked, plain = both(weights)
    found, expected = masked.sum(), plain.sum()
    assert found.num_devices == expected.num_devices
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.mean(FULL), expected.mean(FULL), rtol=0, atol=1e-5)
    assert "experimental" in masked.notice


def test_too_few_devices_are_refused():
    with pytest.raises(ConfigError, match="2 devices, from 3 to 256 can be; ask more"):
        both([1.0, 1.0])[0].sum()


def test_a_second_update_is_refused():
    masked, _ = both([1.0])
    layout = FULL.held_under(small_plan(0))
    with pytest.raises(ProtocolError, match="second update of device 'device0'"):
        masked.add("device0", layout, layout.zeros(), 1.0)


def test_simulated_identities_know_their_own_signatures():
    keys = SimulatedKeys()
    signature = keys.signer("a")(b"text")
    keys.signer("b")
    keys.check("a", b"text", signature)
    for device, text in (("a", b"other"), ("b", b"text"), ("c", b"text")):
        with pytest.raises(ProtocolError, match="the signature is not its own"):
            keys.check(device, text, signature)
