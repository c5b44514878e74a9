"""`drop`, the default: keep the experts with most energy, and leave the others out.

Leaving expert e out changes its layer's output, over the device's tokens, by the energy
E[g² ‖f_e‖²] that it contributed (g gate, f output), which counts by its share of the residual
stream (`server/profile.py`). The gates of kept experts stay as they are.
"""

from proxymoe.common.allocation import Room
from proxymoe.server.modes.choice import Choice, Evidence, Mode


def choose(evidence: Evidence, room: Room) -> Choice:
    """The experts with most energy per byte."""
    return Choice(room.fill(evidence.relative(lambda found: found.energy)))


MODE = Mode(choose)
