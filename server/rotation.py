"""Plans that change from round to round: a fixed core, and lesser experts that take turns.

Shapes: E experts of a layer.
"""

import numpy as np

from proxymoe.common.allocation import Scores
from proxymoe.common.plan import LayerPlan, Plan


def rotated(plan: Plan, scores: Scores, share: float, rng: np.random.Generator) -> Plan:
    """The plan with this share of every layer's kept experts drawn anew; each layer keeps as many.

    The best by score (E,) stay. The other places go to a draw without replacement from all that is
    left, with chances in proportion to the scores: the largest log score plus Gumbel noise
    (arXiv 1903.06059, section 2.3).
    """
    layers = {}
    for at, layer in plan.layers.items():
        order = np.argsort(-scores[at], kind="stable")
        num_drawn = round(share * len(layer.kept))
        core, rest = np.split(order, [len(layer.kept) - num_drawn])
        chances = np.log(np.maximum(scores[at][rest], np.finfo(np.float64).tiny))
        drawn = rest[np.argsort(-chances - rng.gumbel(size=rest.size))[:num_drawn]]
        kept = tuple(sorted(int(e) for e in (*core, *drawn)))
        layers[at] = LayerPlan(num_experts=layer.num_experts, kept=kept)
    return plan.model_copy(update={"layers": layers})
