"""The rounds of one federation on virtual devices, durable and resumable."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from proxymoe.common.adapter import AdapterLayout
from proxymoe.common.experiment import Experiment
from proxymoe.common.plan import Plan
from proxymoe.server.aggregate import Summation
from proxymoe.server.cohorts import drawing
from proxymoe.server.journal import Journal, initial_state
from proxymoe.server.merging import require_identity
from proxymoe.server.round import (
    Federation,
    FederationState,
    Member,
    RoundReport,
    Transport,
    run_round,
)
from proxymoe.simulations import worker
from proxymoe.simulations.pool import PoolTransport, WorkerPool

log = logging.getLogger(__name__)

CANARY_ROWS = 3
CANARY_TOKENS = 40
"""Rows and tokens per row and public domain that every round's candidate must still read."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a federation ended, and what its rounds reported."""

    state: FederationState
    reports: list[dict[str, Any]]


RoundDone = Callable[[RoundReport], None]
PlansOf = Callable[[int], Mapping[str, Plan]]
"""Every device's plan in a round, by the round's number."""


def federation_of(
    pool: WorkerPool, plans: Mapping[str, Plan], experiment: Experiment, run: str
) -> Federation:
    """The federation of these virtual devices; measures the base model's canary loss."""
    site = pool.site

    def canary(adapter: Tensor | None) -> float:
        vector = None if adapter is None else adapter.numpy()
        return pool.submit(worker.canary_loss, vector, CANARY_ROWS, CANARY_TOKENS).result()

    for plan in plans.values():
        require_identity(plan, site.layout)
    members = _members(site.layout, plans)
    return Federation(
        run=run,
        base=site.base,
        seed=experiment.seed,
        layout=site.layout,
        members=members,
        train=experiment.train,
        settings=experiment.federation,
        canary=canary,
        canary_limit=canary(None) + experiment.federation.canary_tolerance,
        draw=drawing(
            experiment.federation.cohorts,
            site.layout,
            lambda name: members[name].layout,
            experiment.smallest_class,
        ),
    )


def federate(
    federation: Federation,
    transport_of: Callable[[int], Transport],
    summation_of: Callable[[int], Summation],
    journal: Journal | None,
    done: RoundDone,
    plans_of: PlansOf | None = None,
) -> Outcome:
    """Runs the rounds that are left and returns where they ended.

    Args:
        federation: what stays the same over the rounds.
        transport_of: the transport for a round, by number.
        summation_of: the same for its sum.
        journal: keeps the rounds, and knows those already done; None keeps nothing.
        done: told of every round as it ends.
        plans_of: plans that change from round to round; None: each device keeps its own.
    """
    size = federation.layout.size
    state = journal.latest(size) if journal else initial_state(size)
    reports = journal.reports(state.round) if journal else []
    unwritten: list[RoundReport] = []
    while state.round < federation.settings.rounds:
        number = state.round + 1
        if plans_of:
            members = _members(federation.layout, plans_of(number))
            federation = replace(federation, members=members)
        summation = summation_of(number)
        log.info("round %d: %s", number, summation.notice)
        state, report = run_round(federation, state, transport_of(number), summation)
        _log(report)
        unwritten.append(report)
        if journal and state.proven is None:
            journal.write(state, unwritten)
            unwritten = []
        reports.append(asdict(report))
        done(report)
    return Outcome(state, reports)


def pool_transports(
    pool: WorkerPool, plans_of: PlansOf, measured_rounds: int = 0
) -> Callable[[int], Transport]:
    """In-process transports; in the first rounds every device works in a process of its own."""
    return lambda number: PoolTransport(pool, plans_of(number), number <= measured_rounds)


def first_deck(num_devices: int, cohort_size: int | None) -> int:
    """Rounds until every device has been asked once."""
    return -(-num_devices // min(cohort_size or num_devices, num_devices))


def _members(layout: AdapterLayout, plans: Mapping[str, Plan]) -> dict[str, Member]:
    return {name: Member(plan, layout.held_under(plan)) for name, plan in plans.items()}


def _log(report: RoundReport) -> None:
    for name, reason in report.refused.items():
        log.warning("round %d: update of %s not used: %s", report.round, name, reason)
    log.info(
        "round %d: %s, %d updates, mean local loss %.3f, canary %s",
        report.round,
        "committed" if report.committed else "rolled back",
        report.num_updates,
        np.mean([last for _, last in report.losses.values()]),
        "not due" if report.canary_loss is None else f"{report.canary_loss:.3f}",
    )
