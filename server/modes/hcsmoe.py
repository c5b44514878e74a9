"""`hcsmoe`: merge clusters of experts whose outputs are alike (HC-SMoE, arXiv 2410.08589).

Experts of a layer are clustered bottom-up by the Euclidean distance of their mean outputs over
*all* tokens (section 3.2.1), with average linkage, into as many clusters as a uniform allocation
has room for. Weights of a cluster are averaged with usage frequencies as weights (section 3.2.3),
without aligning neurons, and its most used member lends the cluster its id.

Public code offers "complete" linkage that merges the farthest pair, and counts top-2 for top-4
models; neither is done here.
"""

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage

from proxymoe.common.allocation import Room
from proxymoe.common.plan import Others
from proxymoe.server.merging import merged_tables
from proxymoe.server.modes.choice import Choice, Evidence, Mode


def choose(evidence: Evidence, room: Room) -> Choice:
    """One expert per cluster, with the others of it merged into that one."""
    usage = evidence.scores(lambda found: found.count)
    kept: dict[int, list[int]] = {}
    stands_for: dict[int, dict[int, int]] = {}
    for at, found in evidence.relations.items():
        labels = _clusters(found.output.double().numpy(), room.uniform)
        kept[at], stands_for[at] = [], {}
        for label in np.unique(labels):
            members = [int(e) for e in np.flatnonzero(labels == label)]
            core = max(members, key=lambda e: (usage[at][e], -e))
            kept[at].append(core)
            stands_for[at] |= {e: core for e in members if e != core}
    tables = merged_tables(evidence.base, kept, stands_for, usage, align=False)
    return Choice(kept, Others.MERGE, stands_for, tables)


def _clusters(outputs: np.ndarray, count: int) -> np.ndarray:
    """(E,) labels of at most `count` clusters of these mean outputs (E, D)."""
    if count >= len(outputs):
        return np.arange(len(outputs))
    return np.asarray(fcluster(linkage(outputs, "average"), count, "maxclust"))


MODE = Mode(choose, relations=True)
