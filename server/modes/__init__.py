"""The ways to choose experts: the default, and the published rivals at equal bytes."""

from proxymoe.common.config import PlanMode
from proxymoe.server.modes import (
    affine,
    drop,
    ean,
    frequency,
    hcsmoe,
    mean,
    msmoe,
    ptse,
    random,
    reap,
)
from proxymoe.server.modes.choice import Choice, Evidence, Mode

MODES: dict[PlanMode, Mode] = {
    PlanMode.DROP: drop.MODE,
    PlanMode.MEAN: mean.MODE,
    PlanMode.AFFINE: affine.MODE,
    PlanMode.PTSE: ptse.MODE,
    PlanMode.MSMOE: msmoe.MODE,
    PlanMode.HCSMOE: hcsmoe.MODE,
    PlanMode.REAP: reap.MODE,
    PlanMode.EAN: ean.MODE,
    PlanMode.FREQUENCY: frequency.MODE,
    PlanMode.RANDOM: random.MODE,
}

__all__ = ["MODES", "Choice", "Evidence", "Mode"]
