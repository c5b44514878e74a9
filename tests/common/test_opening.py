"""An opening survives the wire whole, or is refused by name."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from proxymoe.common.errors import ProtocolError
from proxymoe.common.opening import Opening, is_opening, opening_bytes, parse_opening
from proxymoe.common.secagg import MAX_TERMS_BYTES
from proxymoe.server.secure_sum import terms_for
from proxymoe.simulations.faults.cohort import BASE, small_federation

FEDERATION = small_federation()
TERMS = terms_for(
    FEDERATION.layout,
    {name: member.layout for name, member in FEDERATION.members.items()},
    run="run",
    round=3,
    attempt=1,
    base=BASE,
    clip_norm=1.0,
    smallest_cohort=2,
    smallest_class=2,
)
FIELDS: dict[str, Any] = {
    "terms": TERMS,
    "keys": dict.fromkeys("abc", "a key"),
    "blocks": (0, 2),
    "sizes": (8, 12),
}


def test_an_opening_survives_the_wire_and_so_does_the_transcript():
    content = opening_bytes(Opening(**FIELDS))
    assert is_opening(content)
    found = parse_opening(content)
    assert found == Opening(**FIELDS)
    assert found.terms.transcript == TERMS.transcript


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"keys": {"a": "a key", "b": "a key"}}, "one key for each device"),
        ({"keys": dict.fromkeys("abcd", "a key")}, "one key for each device"),
        ({"keys": dict.fromkeys("abc", "k" * (17 << 10))}, "at most"),
        ({"blocks": (2, 0)}, "blocks are in order"),
        ({"blocks": (0, 0)}, "blocks are in order"),
        ({"sizes": (8,)}, "each once and with its size"),
        ({"sizes": (8, 0)}, "greater than 0"),
        ({"blocks": (), "sizes": ()}, "at least 1"),
    ],
)
def test_what_contradicts_itself_is_refused(changes, reason):
    with pytest.raises(ValidationError, match=reason):
        Opening(**{**FIELDS, **changes})
    good = opening_bytes(Opening(**FIELDS))
    with pytest.raises(ProtocolError, match="refused"):
        parse_opening(good.replace(b'"sizes":[8,12]', b'"sizes":[8]'))


@given(st.binary(max_size=200))
def test_any_bytes_are_an_opening_or_refused(content):
    for given_bytes in (content, b"PXO1" + content, b"PXO1{" + content):
        with pytest.raises(ProtocolError):
            parse_opening(given_bytes)


def test_what_is_too_large_is_not_even_read():
    with pytest.raises(ProtocolError, match=f"the limit is {MAX_TERMS_BYTES}"):
        parse_opening(b"PXO1" + b" " * MAX_TERMS_BYTES)
