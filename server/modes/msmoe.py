"""`msmoe`: merge experts into the most used ones (M-SMoE, arXiv 2310.01334, section 3.1).

1. Cores are the most frequently used experts, over all layers.
2. Every other expert joins the core of its layer whose router logits are most alike: the largest
   cosine, over tokens, of their logits.
3. Neurons are aligned to the core's by the Hungarian method on ⟨W_in, W_in'⟩ + ⟨W_out, W_out'⟩.
4. A group's weights are averaged with usage frequencies as weights, and all members share them.

The router stays whole, so gates of members add up after top-k; `router = "sliced"` keeps the
cores' rows only. Knowledge distillation and the low-rank step of MC-SMoE are left out: they train.
"""

import torch

from proxymoe.common.allocation import Room
from proxymoe.common.plan import Others
from proxymoe.server.merging import merged_tables
from proxymoe.server.modes.choice import Choice, Evidence, Mode


def choose(evidence: Evidence, room: Room) -> Choice:
    """The most used experts, and all others merged into them."""
    usage = evidence.scores(lambda found: found.count)
    kept = room.fill(usage)
    stands_for = {}
    for at, cores in kept.items():
        products = evidence.relations[at].logits
        norms = products.diagonal().clamp_min(torch.finfo(torch.float32).tiny).sqrt()
        alike = (products / norms[:, None] / norms).numpy()
        others = sorted(set(range(len(alike))) - set(cores))
        stands_for[at] = {e: max(cores, key=lambda c: (alike[e, c], -c)) for e in others}
    tables = merged_tables(evidence.base, kept, stands_for, usage, align=True)
    return Choice(kept, Others.MERGE, stands_for, tables)


MODE = Mode(choose, relations=True)
