"""Who is asked in which round, with which seed, at which rate: functions of the round's number."""

import math
from collections.abc import Callable

import numpy as np

from proxymoe.common.config import FederationSettings

Draw = Callable[[list[str], int | None, int, int], list[str]]
"""The cohort of a round, from those who can be asked, the cohort's size, a seed and the round's
number: `sample_cohort`, or one as fair."""
Take = Callable[[list[str], list[str]], str]
"""Which card comes next: from the unfinished cohort, and from the cards that may."""


def sample_cohort(names: list[str], size: int | None, seed: int, number: int) -> list[str]:
    """The devices of a round: as many as asked for, every device equally often over the rounds.

    Rounds deal from one shuffled deck after another, and each deck holds every device once. Who
    has a card in a round that two decks share comes last in the second, so no round has twins.
    """
    if size is None or size >= len(names):
        return sorted(names)
    which, place = divmod(number - 1, period(len(names), size))
    return deal(names, size, seed, which)[place]


def period(count: int, size: int) -> int:
    """Rounds of this size, with this many devices, until one ends where a deck does."""
    return count // math.gcd(count, size)


def deal(
    names: list[str], size: int, seed: int, which: int, take: Take | None = None
) -> list[list[str]]:
    """The cohorts of a period, the first being number 0: whole decks, and each device once in each.

    Args:
        names: more than `size`.
        size: of every cohort.
        seed: of the decks.
        which: number of the period.
        take: see `Take`; None takes the cards as they lie. A cohort's first card it always is.
    """
    decks = size // math.gcd(len(names), size)
    cohorts: list[list[str]] = []
    cohort: list[str] = []
    for deck in range(which * decks, (which + 1) * decks):
        order = np.random.default_rng([seed, deck]).permutation(sorted(names)).tolist()
        cards = sorted(order, key=cohort.__contains__)
        while cards:
            card = cards[0]
            if take is not None and cohort:
                card = take(cohort, [name for name in cards if name not in cohort])
            cards.remove(card)
            cohort.append(card)
            if len(cohort) == size:
                cohorts.append(sorted(cohort))
                cohort = []
    return cohorts


def task_seed(seed: int, number: int, device: str) -> int:
    """The seed of one device's randomness in one round; independent of the cohort."""
    words = [seed, number, *device.encode()]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint32)[0])


def server_rate(settings: FederationSettings, number: int) -> float:
    """Share of the server's learning rate in a round: linear warm-up times linear decay."""
    warm = min(1.0, number / (settings.server_warmup_rounds + 1))
    return warm * decay(settings, settings.server_final_rate, number)


def decay(settings: FederationSettings, final: float, number: int) -> float:
    """Share of a rate that is left in a round, if it falls linearly to `final` in the last."""
    progress = (number - 1) / max(1, settings.rounds - 1)
    return 1.0 - (1.0 - final) * min(1.0, progress)
