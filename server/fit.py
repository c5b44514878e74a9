"""★ The largest proxy submodel whose tuning fits into a device's memory.

A budget in bytes of weights says little to the owner of a device: activations, logits and the
runtime may each be larger. Here the budget is the peak of tuning. More weight never makes a peak
smaller, so a bisection over the weights' bytes finds the most that fits; each step is a plan as
`server/extract.py` makes it, and the prediction is `common/budget.py`'s.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from proxymoe.common.adapter import AdapterLayout, adapter_layout
from proxymoe.common.budget import Budget, predict
from proxymoe.common.config import AdapterSettings, ExtractSettings, TrainSettings
from proxymoe.common.errors import BudgetError
from proxymoe.common.plan import Plan, Precision, RouterMode
from proxymoe.common.sizes import held_under
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.extract import Extraction, extract, largest_bytes, smallest_bytes
from proxymoe.server.profile import Profile

MB = 1e6
FEWEST_TOKENS = 8


@dataclass(frozen=True)
class Fit:
    """What is planned for, beside a budget: base model, profile, and the work on a submodel."""

    base: BaseCheckpoint
    profile: Profile
    extract: ExtractSettings
    adapter: AdapterSettings
    train: TrainSettings
    seed: Sequence[int]
    """Of a draw, where experts are drawn."""

    def cut(self, mixture: dict[str, float], budget_bytes: int | None = None) -> Extraction:
        """The submodel with these bytes of weights, by default what the settings say."""
        asked = {} if budget_bytes is None else {"budget_bytes": budget_bytes}
        settings = self.extract.model_copy(update=asked)
        rng = np.random.default_rng(self.seed)
        return extract(self.base, self.profile, mixture, settings, rng)

    def predicted(self, plan: Plan, mixture: dict[str, float]) -> Budget:
        """The peak of tuning the submodel of a plan on text of this domain mixture."""
        return predicted_peak(self.base, self.profile, plan, self._full, mixture, self.train)

    @cached_property
    def _full(self) -> AdapterLayout:
        return adapter_layout(self.base.skeleton, self.adapter.targets, self.adapter.rank, seed=0)

    def largest(self, mixture: dict[str, float], peak: int) -> tuple[Extraction, Budget]:
        """The submodel with the most weights whose predicted peak is at most `peak` bytes.

        Raises:
            BudgetError: not even one expert per layer fits; tells the smallest peak there is.
        """
        low, high = smallest_bytes(self.base, self.extract), largest_bytes(self.base, self.extract)
        step = min(self.base.held_expert_bytes(self.extract.experts).values())
        found = self._at(low, mixture)
        if found[1].peak > peak:
            told = ", ".join(f"{part} {size / MB:,.0f} MB" for part, size in _largest(found[1]))
            raise BudgetError(
                f"a budget of {peak / MB:,.1f} MB is below the smallest peak of tuning, "
                f"{found[1].peak / MB:,.1f} MB with one expert per layer ({told}); allow more, or "
                "see --explain without a budget for what would help"
            )
        whole = self._at(high, mixture)
        if whole[1].peak <= peak:
            return whole
        while high - low > step:
            middle = (low + high) // 2
            tried = self._at(middle, mixture)
            if tried[1].peak <= peak:
                low, found = middle, tried
            else:
                high = middle
        return found

    def _at(self, budget_bytes: int, mixture: dict[str, float]) -> tuple[Extraction, Budget]:
        cut = self.cut(mixture, budget_bytes)
        return cut, self.predicted(cut.plan, mixture)

    def remedies(self, plan: Plan, mixture: dict[str, float]) -> list[tuple[str, int]]:
        """(what to change, bytes it would save) with the same kept experts, the best first."""
        now = self.predicted(plan, mixture).peak
        saved = [
            (told, now - other.predicted(changed, mixture).peak)
            for told, other, changed in self._changes(plan)
        ]
        return sorted((entry for entry in saved if entry[1] > 0), key=lambda entry: -entry[1])

    def _changes(self, plan: Plan) -> Iterator[tuple[str, "Fit", Plan]]:
        train, rank = self.train, self.adapter.rank // 2
        changes: dict[str, dict[str, Any]] = {
            "train.gradient_checkpointing = true": {"gradient_checkpointing": True},
            'train.dtype = "bfloat16"': {"dtype": "bfloat16"},
        }
        if (tokens := train.max_tokens // 2) >= FEWEST_TOKENS:
            changes[f"train.max_tokens = {tokens}"] = {"max_tokens": tokens}
        if rows := train.batch_size // 2:
            changes[f"train.batch_size = {rows}"] = {"batch_size": rows}
        for told, change in changes.items():
            yield told, replace(self, train=train.model_copy(update=change)), plan
        for narrow in (Precision.INT8, Precision.INT4):
            told = f'extract.experts = "{narrow.value}"'
            yield told, self, plan.model_copy(update={"experts": narrow})
        if rank:
            halved = self.adapter.model_copy(update={"rank": rank})
            yield f"adapter.rank = {rank}", replace(self, adapter=halved), plan


def predicted_peak(
    base: BaseCheckpoint,
    profile: Profile,
    plan: Plan,
    full: AdapterLayout,
    mixture: dict[str, float],
    train: TrainSettings,
) -> Budget:
    """The peak of tuning the submodel of a plan, with an adapter of the `full` layout's blocks.

    How often a token is sent to an expert that is kept, the profile says, for text of this domain
    mixture.
    """
    sizes, width = base.sizes, 4 if train.dtype == "float32" else 2
    if plan.router is RouterMode.SLICED:  # whatever is chosen is kept
        picks = {
            at: float(min(sizes.layers[at].top_k, len(p.kept))) for at, p in plan.layers.items()
        }
    else:
        counts = {at: found.count for at, found in profile.mix(mixture).items()}
        picks = {at: float(counts[at][list(p.kept)].sum()) for at, p in plan.layers.items()}
    held = held_under(base.pieces_of(plan), plan, sizes, full.held_under(plan), picks, width)
    return predict(sizes, held, train)


def _largest(budget: Budget) -> list[tuple[str, int]]:
    terms = sorted(budget.terms.items(), key=lambda term: -term[1])
    return [(part.value, size) for part, size in terms[:3]]
