"""What a coordinator promises its devices: the noise of a run, its price, and the account of it.

A coordinator adds noise itself (`central`), or devices do, under masks (`distributed`, `local`).
The promise holds for a device that is in every round, for nobody knows beforehand who will be.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from pydantic import ValidationError

from proxymoe.common.adapter import AdapterLayout, adapter_layout
from proxymoe.common.errors import ConfigError
from proxymoe.common.letters import MAX_DEVICES
from proxymoe.common.price import Price, multiplier_of, price
from proxymoe.common.privacy import CLIP_STEPS, Mode, Span
from proxymoe.common.privacy_settings import Noise, PrivacySettings, steps_under_masks
from proxymoe.server.aggregate import PlainSum, Summation
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.private_sum import ATTEMPT, PrivateSum, budget_of, release_of
from proxymoe.server.round import Federation, Member
from proxymoe.server.settings import CoordinatorSettings
from proxymoe.server.spending import reserve
from proxymoe.server.store import RoundStore

SMALLER_RANKS = (16, 8, 4, 2, 1)
TOLERATED = 1 / 3
"""Share of a block's holders that may be missing from a masked sum."""


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
    tolerated = {"tolerated_dropouts": _tolerated(settings, privacy)}
    return price(
        privacy.model_copy(update=tolerated),
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


def noise_of(settings: CoordinatorSettings) -> Noise | None:
    """The noise of every round, as its tasks tell it; None if there is none.

    Under masks so many holders of a block may drop out as a masked sum allows.

    Raises:
        ConfigError: an epsilon out of reach, or `dp-accounting` is not installed.
    """
    privacy = settings.privacy
    if privacy.mode is Mode.CLIP_ONLY:
        return None
    z = multiplier_of(privacy, settings.federation.rounds)
    steps = steps_under_masks(MAX_DEVICES, z) if settings.masked else CLIP_STEPS
    return Noise(
        mode=privacy.mode,
        noise_multiplier=z,
        delta=privacy.delta,
        tolerated_dropouts=_tolerated(settings, privacy),
        clip_steps=steps,
    )


def spending(
    settings: CoordinatorSettings, federation: Federation, store: RoundStore
) -> Callable[[int, int, Iterable[str]], None]:
    """Puts on record what a release costs: of a round, in an attempt, about these devices.

    It raises PrivacySpent if that is more than was promised to one of them.
    """
    privacy, noise = settings.privacy, federation.noise
    assert noise is not None, "there is nothing to spend without noise"
    z = noise.noise_multiplier

    def spend(number: int, attempt: int, devices: Iterable[str]) -> None:
        release = release_of(privacy, federation, number, z, devices, attempt)
        now, told = time.time(), {"round": number, "noise_multiplier": z}
        with store.change(now, "privacy", **told, devices=list(release.devices)) as database:
            reserve(database, now, release, budget_of(privacy))

    return spend


def summations(
    settings: CoordinatorSettings, federation: Federation, store: RoundStore
) -> Callable[[int], Summation]:
    """The summation in the clear of each round; with noise, what it costs is on record before."""
    layout, noise = federation.layout, federation.noise
    fewest = federation.settings.fewest_holders
    if noise is None:
        return lambda _: PlainSum(layout, fewest)
    mechanism = noise.mechanism(federation.settings.clip_norm)
    spend = spending(settings, federation, store)

    def summation_of(number: int) -> Summation:
        account = partial(spend, number, ATTEMPT)
        return PrivateSum(layout, mechanism, PlainSum(layout, fewest), secrets.token_bytes, account)

    return summation_of


def _tolerated(settings: CoordinatorSettings, privacy: PrivacySettings) -> float:
    return max(privacy.tolerated_dropouts, TOLERATED if settings.masked else 0.0)


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
