"""`mean`: an expert that is left out is replaced by its mean output (MoNE, arXiv 2507.00390).

MoNE ranks experts by ‖std(f)‖ · mean gate: what a constant does not explain. The same thought
without its square roots is the energy that the constant Σg²f / Σg² leaves: E[g² ‖f − mean‖²].
"""

import torch
from torch import Tensor

from proxymoe.common.allocation import Room
from proxymoe.common.plan import Others
from proxymoe.server.modes.choice import Choice, Evidence, Mode, table_of_offsets

SHRINKAGE_TOKENS = 20.0
"""A mean output seen on n tokens is shrunk by n / (n + this): few tokens, little trust."""


def choose(evidence: Evidence, room: Room) -> Choice:
    """The experts that a constant replaces worst, and the constants of the others."""
    kept = room.fill(evidence.relative(lambda found: found.residual_energy()))
    tables = {}
    for at in evidence.statistics:
        offsets = evidence.statistics[at].mean_output() * trust(evidence, at)[:, None]
        offsets[kept[at]] = 0.0
        tables[f"{at}.offset"] = offsets.to(torch.bfloat16)
    return Choice(kept, Others.MEAN, tables=tables)


def trust(evidence: Evidence, at: int) -> Tensor:
    """(E,) n / (n + SHRINKAGE_TOKENS) of the tokens routed to each expert."""
    seen = evidence.statistics[at].count * evidence.num_tokens
    return seen / (seen + SHRINKAGE_TOKENS)


MODE = Mode(choose, table_of_offsets)
