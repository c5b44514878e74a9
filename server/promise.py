"""What a coordinator promises its devices: the noise of a run, its price, and the account of it.

A deployment adds noise itself (`central`), on the sum of updates that it sees. The promise holds
for a device that is in every round, for nobody knows beforehand who will be.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Mapping

from pydantic import ValidationError

from proxymoe.common.adapter import AdapterLayout, adapter_layout
from proxymoe.common.errors import ConfigError
from proxymoe.common.price import Price, price
from proxymoe.common.privacy import Mode, PrivacySettings, Span
from proxymoe.server.aggregate import PlainSum, Summation
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.private_sum import PrivateSum, budget_of, release_of
from proxymoe.server.round import Federation, Member
from proxymoe.server.settings import CoordinatorSettings
from proxymoe.server.spending import reserve
from proxymoe.server.store import RoundStore

SMALLER_RANKS = (16, 8, 4, 2, 1)


def promised(
    settings: CoordinatorSettings,
    privacy: PrivacySettings,
    layout: AdapterLayout,
    members: Mapping[str, Member],
    adapters: Mapping[str, int] | None = None,
    cohort: int | None = None,
) -> Price:
    """What a whole run costs a device, and what its noise does to learning.

    Args:
        settings: of the coordinator.
        privacy: its own, or others that are thought about.
        layout: of the full adapter.
        members: who holds what; with nobody there, everybody is taken to hold everything.
        adapters: {name: numbers} of other adapters; see `smaller`.
        cohort: devices per round, if another number is thought about.

    Raises:
        ConfigError: an epsilon out of reach, or `dp-accounting` is not installed.
    """
    cohort = cohort or settings.federation.cohort_size or max(1, len(members))
    return price(
        privacy,
        rounds=settings.federation.rounds,
        cohort_size=cohort,
        num_devices=cohort,
        clip_norm=settings.federation.clip_norm,
        spans=_spans(layout, members, cohort),
        adapters=adapters,
    )


def thought_about(
    own: PrivacySettings, epsilons: Iterable[float], delta: float | None
) -> list[PrivacySettings]:
    """The settings with these epsilons, `central`; with none, one's own.

    Raises:
        ConfigError: an epsilon or delta out of range.
    """
    fixed = {"delta": own.delta if delta is None else delta, "accountant": own.accountant}
    try:
        found = [
            PrivacySettings(mode=Mode.CENTRAL, epsilon=epsilon, **fixed) for epsilon in epsilons
        ]
        return found or [PrivacySettings.model_validate(own.model_dump() | fixed)]
    except ValidationError as error:
        names = sorted({f"{e['loc'][0]}: {e['msg']}" for e in error.errors()})
        raise ConfigError(f"--epsilon and --delta: {'; '.join(names)}") from None


def smaller(settings: CoordinatorSettings, base: BaseCheckpoint) -> dict[str, int]:
    """{name: numbers} of adapters of this base model that are no larger than the one there is."""
    mine = settings.adapter
    found = {}
    for targets in (mine.targets, mine.targets[:1]):
        for rank in SMALLER_RANKS:
            if rank <= mine.rank:
                layout = adapter_layout(base.skeleton, targets, rank, settings.seed)
                found[f"{' and '.join(targets)}, rank {rank}"] = layout.size
    return found


def summations(
    settings: CoordinatorSettings, federation: Federation, store: RoundStore
) -> Callable[[int], Summation]:
    """The summation of each round; one with noise puts what it costs on record before.

    Raises:
        ConfigError: see `promised`.
    """
    privacy, layout = settings.privacy, federation.layout
    if privacy.mode is Mode.CLIP_ONLY:
        return lambda _: PlainSum(layout)
    z = promised(settings, privacy, layout, federation.members).noise_multiplier
    mechanism = privacy.mechanism(federation.settings.clip_norm, len(federation.members), z)

    def summation_of(number: int) -> Summation:
        def spend(devices: Iterable[str]) -> None:
            release = release_of(privacy, federation, number, z, devices)
            now, told = time.time(), {"round": number, "noise_multiplier": z}
            with store.change(now, "privacy", **told, devices=list(release.devices)) as database:
                reserve(database, now, release, budget_of(privacy))

        return PrivateSum(layout, mechanism, PlainSum(layout), secrets.token_bytes, spend)

    return summation_of


def _spans(layout: AdapterLayout, members: Mapping[str, Member], cohort: int) -> list[Span]:
    """By how many devices of an average cohort the blocks are held."""
    if not members:
        return [Span(layout.size, cohort)]
    holders = [0] * len(layout.blocks)
    for member in members.values():
        for block, _, _ in member.layout.positions_in(layout):
            holders[block] += 1
    share = cohort / len(members)  # above 1 for a fleet that is only thought about
    return [
        Span(size, min(cohort, max(1, round(share * count))))
        for size, count in zip(layout.sizes, holders, strict=True)
        if count
    ]
