"""`ptse`: LiteMoE's post-training submodel extraction (SenSys 2024, section 4), for top-k SwiGLU.

1. *Identify*: importance of an expert is the mean router probability over tokens.
2. *Classify*: below α it is dropped; the most important ones that the budget holds are hot, which
   is what a threshold β does once it is chosen to fit the bytes; those between are moderate.
3. *Match*: maximum-weight b-matching of moderate to hot experts of a layer, at most MAX_DEGREE
   per hot one, each moderate one at most once. Similarity is the mean product of the two router
   probabilities: high if both are likely for the same token.
4. *Merge*: neurons of the moderate expert are aligned to the hot one's by the least total
   ½(‖a_p − a_q‖² + ‖b_p − b_q‖²), and weights averaged by importance.
5. *Router*: r' = r·M. With `router = "summed"` probabilities of merged experts add up before
   top-k and dropped ones are masked, as published; with "full" gates add up after top-k.

LiteMoE works on Switch Transformers (top-1, ReLU). What it leaves open is set here: α is relative
to the uniform probability 1/E (its 0.05 is for 8 to 32 experts), the similarity's exact form was
not to be had, alignment is exact in place of an approximate transport, and importance comes from
the profile in place of a predictor from the first router.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from proxymoe.common.allocation import Room
from proxymoe.common.plan import Others
from proxymoe.server.merging import merged_tables
from proxymoe.server.modes.choice import Choice, Evidence, Mode

ALPHA = 0.5
"""Times 1/E: the least mean probability of an expert that is not dropped."""
MAX_DEGREE = 3
"""Moderate experts that one hot expert takes in, as LiteMoE for 16 and 32 experts."""


def choose(evidence: Evidence, room: Room) -> Choice:
    """The hot experts, with moderate ones merged into them, and the rest dropped."""
    importance = {at: r.probability.double().numpy() for at, r in evidence.relations.items()}
    kept = room.fill(importance)
    stands_for = {}
    for at, hot in kept.items():
        together = evidence.relations[at].together.double().numpy()
        worth = np.flatnonzero(importance[at] >= ALPHA / len(importance[at]))
        moderate = [int(e) for e in worth if e not in hot]
        stands_for[at] = matched(together, moderate, hot, MAX_DEGREE)
    tables = merged_tables(evidence.base, kept, stands_for, importance, align=True)
    return Choice(kept, Others.MERGE, stands_for, tables)


def matched(
    similarity: np.ndarray, moderate: list[int], hot: list[int], degree: int
) -> dict[int, int]:
    """{moderate expert: hot expert} of largest total similarity, at most `degree` per hot one.

    A b-matching is an assignment once every hot expert is copied `degree` times.

    Args:
        similarity: (E, E), not negative.
        moderate: to be matched; those for whom no hot expert has a place left are missing.
        hot: to match with.
        degree: places of each hot expert.
    """
    places = [h for h in hot for _ in range(degree)]
    rows, columns = linear_sum_assignment(similarity[np.ix_(moderate, places)], maximize=True)
    return {moderate[row]: places[column] for row, column in zip(rows, columns, strict=True)}


MODE = Mode(choose, relations=True)
