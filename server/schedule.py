"""Who is asked in which round, with which seed, at which rate: functions of the round's number."""

import itertools

import numpy as np

from proxymoe.common.config import FederationSettings


def sample_cohort(names: list[str], size: int | None, seed: int, number: int) -> list[str]:
    """The devices of a round: as many as asked for, every device equally often over the rounds.

    Rounds deal from one shuffled deck after another, and each deck holds every device once. Who
    has a card in a round that two decks share comes last in the second, so no round has twins.
    """
    if size is None or size >= len(names):
        return sorted(names)
    dealt: list[str] = []
    for deck in itertools.count():
        order = np.random.default_rng([seed, deck]).permutation(sorted(names)).tolist()
        unfinished = dealt[len(dealt) - len(dealt) % size :]
        dealt += sorted(order, key=unfinished.__contains__)
        if len(dealt) >= number * size:
            break
    return sorted(dealt[(number - 1) * size : number * size])


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
