"""The small federation of the fault matrix, which the tests of rounds use as well."""

from proxymoe.simulations.faults.cohort import (
    BASE,
    NUM_EXPERTS,
    InMemory,
    Reaction,
    clip_array,
    honest,
    small_federation,
    small_layout,
    small_plan,
)

__all__ = [
    "BASE",
    "NUM_EXPERTS",
    "InMemory",
    "Reaction",
    "clip_array",
    "honest",
    "small_federation",
    "small_layout",
    "small_plan",
]
