"""How many examples a law is tried on."""

from typing import Any

from hypothesis import settings

FULL = 50
"""Examples of a law in the profile `thorough`, unless it says otherwise."""


def tried(full: int, **others: Any) -> settings:
    """Settings of a law with `full` examples in `thorough`, and in proportion in other profiles."""
    return settings(max_examples=max(5, full * settings().max_examples // FULL), **others)
