"""How many examples a law is tried on, and bytes that were damaged on the way."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

FULL = 50
"""Examples of a law in the profile `thorough`, unless it says otherwise."""


def tried(full: int, **others: Any) -> settings:
    """Settings of a law with `full` examples in `thorough`, and in proportion in other profiles."""
    return settings(max_examples=max(5, full * settings().max_examples // FULL), **others)


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """Bytes of which up to three are others, or none, and that may end early."""
    found = bytearray(content)
    for _ in range(data.draw(st.integers(0, 3))):
        found[data.draw(st.integers(0, len(found) - 1))] = data.draw(st.integers(0, 255))
    return bytes(found[: data.draw(st.integers(0, len(found)))])
