"""Plan templates: a small catalogue of plans; every device gets the one that serves it best.

Under masks a block is summed only where enough devices of a cohort hold it. If every device has a
plan of its own, rare experts have too few holders, and what is learned about them is thrown away.
With few plans in use, their holders are many; the price is the energy that a device's own plan
would have held and the template does not.

Theory. Candidates are the plans of every public domain, and of all domains alike; what a mixture
loses under a plan is the energy of the experts that it lacks (see `extract`). To choose n
candidates whose best one covers the most energy, on average over all candidates' mixtures, is
facility location; taking the candidate that adds most, again and again, reaches at least 1 - 1/e
of the best choice (Nemhauser, Wolsey, Fisher 1978, "An analysis of approximations for maximizing
submodular set functions").

Shapes: M mixtures, T plans.
"""

from collections.abc import Iterable
from functools import lru_cache, partial

import numpy as np

from proxymoe.common.allocation import Scores, covered_energy
from proxymoe.common.config import ExtractSettings
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.extract import Extraction, extract
from proxymoe.server.profile import Profile

CATALOGUES = 8
"""How many are remembered, one for each budget that devices ask for."""


def choose(covered: np.ndarray, count: int) -> list[int]:
    """Which plans, at most `count`, cover most for every mixture's best one; the first where equal.

    Args:
        covered: (M, T) share of the energy of every mixture that every plan covers.
        count: as many at most, and at least one.
    """
    chosen: list[int] = []
    best = np.zeros(covered.shape[0])
    for _ in range(min(count, covered.shape[1])):
        gain = np.maximum(covered, best[:, None]).sum(axis=0)
        gain[chosen] = -np.inf
        chosen.append(int(gain.argmax()))
        best = np.maximum(best, covered[:, chosen[-1]])
    return chosen


def catalogue(
    base: BaseCheckpoint, profile: Profile, settings: ExtractSettings, seed: int
) -> tuple[Extraction, ...]:
    """`settings.templates` plans, or fewer if there are no more, that serve all domains best.

    Raises:
        BudgetError: see `extract`.
    """
    mixtures = [{domain: 1.0} for domain in sorted(profile.domains)] + [profile.uniform()]
    found: dict[str, Extraction] = {}
    for number, mixture in enumerate(mixtures):
        rng = np.random.default_rng([seed, number])
        extraction = extract(base, profile, mixture, settings, rng)
        found.setdefault(extraction.plan.digest, extraction)
    candidates = list(found.values())
    covered = np.array(
        [
            [covered_energy(scores, candidate.plan.kept) for candidate in candidates]
            for scores in map(profile.relative_energy, mixtures)
        ]
    )
    return tuple(candidates[i] for i in choose(covered, settings.templates))


def best(templates: Iterable[Extraction], scores: Scores) -> Extraction:
    """The template that covers most of these energies; the first where several do."""
    return max(templates, key=lambda found: covered_energy(scores, found.plan.kept))


class Extractor:
    """Cuts every device its submodel: by a plan of its own, or by a template.

    A function of base model, profile, and what it is asked: a simulation and a coordinator with the
    same settings cut the same.

    Args:
        base: the base model.
        profile: of that base model.
    """

    def __init__(self, base: BaseCheckpoint, profile: Profile) -> None:
        self._base, self._profile = base, profile
        self._catalogue = lru_cache(CATALOGUES)(partial(catalogue, base, profile))

    def cut(
        self, device: str, mixture: dict[str, float], settings: ExtractSettings, seed: int
    ) -> Extraction:
        """The submodel of a device with this mixture; `seed` is of random plans.

        Raises:
            BudgetError, ConfigError: see `extract` and `Profile.mix`.
        """
        if settings.templates:
            templates = self._catalogue(settings, seed)
            return best(templates, self._profile.relative_energy(mixture))
        rng = np.random.default_rng([seed, *device.encode()])
        return extract(self._base, self._profile, mixture, settings, rng)
