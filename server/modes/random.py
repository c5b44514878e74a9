"""`random`: a seeded draw, the floor that every claim must clear."""

from proxymoe.common.allocation import Room
from proxymoe.server.modes.choice import Choice, Evidence, Mode


def choose(evidence: Evidence, room: Room) -> Choice:
    """Any experts."""
    drawn = {at: evidence.rng.random(s.count.numel()) for at, s in evidence.statistics.items()}
    return Choice(room.fill(drawn))


MODE = Mode(choose)
