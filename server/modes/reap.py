"""`reap`: mean of g‖f‖ over the tokens routed to the expert (REAP, arXiv 2510.13999, eq. 9).

As published it slices the router; the public code judges every router by a softmax of its logits,
which is wrong for sigmoid and grouped ones. Here gates are always the family's own.
"""

import torch
from torch import Tensor

from proxymoe.common.allocation import Room
from proxymoe.server.modes.choice import Choice, Evidence, Mode
from proxymoe.server.profile import ExpertStatistics


def choose(evidence: Evidence, room: Room) -> Choice:
    """The experts whose contribution is largest where they are used."""
    return Choice(room.fill(evidence.scores(_per_routed_token)))


def _per_routed_token(found: ExpertStatistics) -> Tensor:
    return found.norm / found.count.clamp_min(torch.finfo(torch.float32).tiny)


MODE = Mode(choose)
