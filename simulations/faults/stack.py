"""Level 6: the whole stack, coordinator and devices over TLS and Flower.

A scenario here is a function from a `Ground` to its verdicts, as in every level; it starts the two
command lines in `ground.folder()`, does its damage to their processes, and asks `Law` about the
coordinator's run directory.
"""

from proxymoe.simulations.faults.report import Scenario

LEVEL = "stack"

SCENARIOS: tuple[Scenario, ...] = ()
"""To be filled: the place for faults that need both command lines."""
