"""Advice to the owner: how well the submodel here suits the data, and what would suit it better.

A coordinator chooses experts by what little it is told. This device knows more: the exact domain
mixture of its data, and from the expert table what every expert contributes under every domain.
So it ranks the experts itself, by the coordinator's rule and at the bytes of its own plan, and
compares. Mixture, ranking and advice stay here; all that leaves is a request for public tables.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass

from proxymoe.client.apply import MIXTURE_DELTA, MIXTURE_EPSILON, release_request
from proxymoe.client.bring import bring_tables
from proxymoe.client.elsewhere import Work, result_of
from proxymoe.client.gates import readable_files
from proxymoe.client.home import Home
from proxymoe.client.inventory import assigned
from proxymoe.client.mixture import rows_needed
from proxymoe.client.policy import judge
from proxymoe.client.proxy import planned
from proxymoe.common.allocation import covered_energy
from proxymoe.common.errors import ConfigError, ProtocolError
from proxymoe.common.expert_table import ExpertTable, load_expert_table
from proxymoe.common.plan import Plan

NEAREST = 3
"""Domains that the owner is told of."""
LEAST_GAIN = 0.02
"""Energy below which another submodel is not worth its download."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What a device found out about its own data. Private, like the mixture behind it.

    Coverage is the share, from 0 to 1, of the energy that all experts of the base model have on
    text of this device's mixture; every submodel is of the same bytes for experts.
    """

    nearest: tuple[tuple[str, float], ...]
    """The domains that the data is most like, with their weights, the heaviest first."""
    covered: float
    """By the submodel that is assigned."""
    best: float
    """By the submodel for the exact mixture."""
    domain: str
    """The domain whose submodel covers most; the first by name where several do."""
    by_domain: float
    """By that submodel."""
    by_mixture: float | None
    """By the submodel for the mixture that may leave, up to its noise; None if none may."""
    is_exact: bool
    """Whether the coordinator cuts plans by just this rule; if not, others are estimates."""

    @property
    def remedy(self) -> str | None:
        """The option with which `join --refresh` brings a submodel that is worth it, if one does.

        A domain says less about the data than a mixture does, so it goes first where both serve.
        """
        by_mixture = self.by_mixture or 0.0
        if self._gains(self.by_domain) and by_mixture - self.by_domain < LEAST_GAIN:
            return f"--domain {self.domain}"
        return "--mixture" if self._gains(by_mixture) else None

    @property
    def needs_mixture(self) -> bool:
        """Whether a mixture would bring one that is worth it, and none may leave."""
        reached = max(self.covered, self.by_domain)
        return self.by_mixture is None and self.best - reached >= LEAST_GAIN

    def _gains(self, covered: float) -> bool:
        return covered - self.covered >= LEAST_GAIN


def advise(home: Home, *, work: Work | None = None) -> Advice:
    """What the owner of the device in this home should know; fetches the tables it takes.

    Neither a mixture nor anything that follows from the data leaves, so the policy need not allow
    that one does.

    Args:
        work: as in `fetch_proxy`.

    Raises:
        ConfigError: not enrolled, a second client, nothing is assigned, or the coordinator has no
            tables.
        DataError: the data that the policy names cannot be used, or is empty.
        PolicyRefused, GatesClosed: the tables may not be fetched, or not now.
        TransferRefused, TransferError, IntegrityError, StoreError: see `client/bring.py`.
        CheckpointError, ProtocolError: a table is none, or not of this plan's base model.
    """
    home.enrolled()
    with home.alone():
        assignment = assigned(home)
        readable_files(home.policy().data)
        domains, experts = assignment.table, assignment.experts
        if domains is None or experts is None:
            raise ConfigError(
                f"run {assignment.run}: the coordinator shipped no tables to compare with; it "
                "takes two public domains there, and `join --refresh` here once it has them"
            )
        bring_tables(home, assignment, domains, experts)
        plan = planned(home, assignment)
        table = load_expert_table(home.store().path(experts.digest))
        found = result_of(work, "weigh", home=str(home.path), table=domains.digest)
        mixture, num_rows = json.loads(found)
        return advice(table, mixture, plan, _told(home, domains.digest, mixture, num_rows))


def advice(
    table: ExpertTable,
    mixture: Mapping[str, float],
    plan: Plan,
    told: Mapping[str, float] | None = None,
) -> Advice:
    """What there is to say of a plan to a device whose data has this mixture.

    Args:
        table: of the plan's base model.
        mixture: exact; it sums to 1.
        plan: the assigned one; others are compared at the bytes of its kept experts.
        told: the mixture that the coordinator would get to know; None if none may leave.

    Raises:
        ProtocolError: table, mixture and plan do not go together.
    """
    if table.num_experts != {at: layer.num_experts for at, layer in plan.layers.items()}:
        raise ProtocolError("expert table: of another base model than the plan; join again")
    if sorted(mixture) != list(table.domains):
        raise ProtocolError("expert table: of other domains than the domain table; join again")
    scores, num_bytes = table.mix(mixture), table.bytes_of(plan.kept)

    def covered_after(words: Mapping[str, float]) -> float:
        return covered_energy(scores, table.keep(table.mix(words), num_bytes))

    by_domain = {name: covered_after({name: 1.0}) for name in table.domains}
    domain = max(table.domains, key=lambda name: by_domain[name])
    nearest = sorted(mixture.items(), key=lambda weighted: (-weighted[1], weighted[0]))
    return Advice(
        nearest=tuple(nearest[:NEAREST]),
        covered=covered_energy(scores, plan.kept),
        best=covered_after(mixture),
        domain=domain,
        by_domain=by_domain[domain],
        by_mixture=None if told is None else covered_after(told),
        is_exact=table.is_exact,
    )


def _told(
    home: Home, table: str, mixture: dict[str, float], num_rows: int
) -> dict[str, float] | None:
    """What `join --mixture` would tell the coordinator, but for noise that is still to be drawn."""
    policy, known = home.policy(), home.mixture()
    if known is not None and known.table == table:
        return known.mixture if policy.privacy.mixture_may_leave else None
    enough = rows_needed(len(mixture), MIXTURE_EPSILON, MIXTURE_DELTA)
    if num_rows < enough or judge(policy, release_request(home), home.usage(time.time())):
        return None
    return mixture
