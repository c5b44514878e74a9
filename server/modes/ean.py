"""`ean`: sum of ‖f‖ over the tokens routed to the expert (expert activation norm).

A baseline of REAP (arXiv 2510.13999, section 4), which found it second to itself.
"""

from proxymoe.common.allocation import Room
from proxymoe.server.modes.choice import Choice, Evidence, Mode


def choose(evidence: Evidence, room: Room) -> Choice:
    """The experts with most output before gating."""
    return Choice(room.fill(evidence.scores(lambda found: found.magnitude)))


MODE = Mode(choose)
