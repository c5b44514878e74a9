"""One layer at a time, a model says the same bits as whole; what cannot be cut so is refused."""

import pytest
import torch

from proxymoe.common.model import load
from proxymoe.server.profile import profile_domain
from proxymoe.server.streamed import Streamed
from tests.families import FAMILIES, MORE_FAMILIES
from tests.server.test_profile import FIELDS, examples_of

LENGTHS = [40, 100, 7, 64, 90, 33, 128, 55, 120, 128, 101, 128, 128, 128, 99]


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_streamed_profile_has_the_bits_of_the_whole_models(tiny, family, dtype):
    model = tiny(family)
    examples = examples_of(1, LENGTHS)
    expected, tokens = profile_domain(load(model.full_folder, dtype), examples, 10**6)
    streamed = Streamed(model.base, dtype)
    found, streamed_tokens = profile_domain(streamed.loaded, examples, 10**6, read=streamed.read)
    assert streamed_tokens == tokens == sum(LENGTHS)
    for at, stats in expected.items():
        assert all(torch.equal(getattr(found[at], n), getattr(stats, n)) for n in FIELDS)
