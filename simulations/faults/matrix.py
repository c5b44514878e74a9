"""All scenarios of the fault matrix, level by level."""

from proxymoe.simulations.faults import (
    clocks,
    device,
    envelopes,
    messages,
    rounds,
    stack,
    transfer,
    tuning,
)

SCENARIOS = (
    *rounds.SCENARIOS,
    *messages.SCENARIOS,
    *envelopes.SCENARIOS,
    *device.SCENARIOS,
    *tuning.SCENARIOS,
    *transfer.SCENARIOS,
    *clocks.SCENARIOS,
    *stack.SCENARIOS,
)
