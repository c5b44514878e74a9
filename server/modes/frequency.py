"""`frequency`: how often the router chooses the expert (SEER-MoE, arXiv 2404.05089, and others)."""

from proxymoe.common.allocation import Room
from proxymoe.server.modes.choice import Choice, Evidence, Mode


def choose(evidence: Evidence, room: Room) -> Choice:
    """The experts used most."""
    return Choice(room.fill(evidence.scores(lambda found: found.count)))


MODE = Mode(choose)
