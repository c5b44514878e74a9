"""How a device tells the coordinator what it is like, and what it is assigned for that.

All that may describe private data is a domain that the owner names, or a few noised weights over
public domains: found here, noised here, kept, and paid for once, however often they are sent.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace

import grpc

from proxymoe.client.attempts import Busy, Patience
from proxymoe.client.bring import (
    PolicyRefused,
    bring_tables,
    connector,
    require_allowed,
)
from proxymoe.client.elsewhere import Work, result_of
from proxymoe.client.entries import Entry, Kind
from proxymoe.client.fetch import FOR_GOOD
from proxymoe.client.home import Home, ReleasedMixture
from proxymoe.client.mixture import release
from proxymoe.client.policy import Objection, Request
from proxymoe.client.retry import TransferRefused
from proxymoe.common.assignment import APPLY, Application, Assignment, application_bytes
from proxymoe.common.domains import DomainTable, load_table, table_bytes
from proxymoe.common.errors import ConfigError
from proxymoe.common.files import digest_of

PATIENCE = Patience()
APPLY_SECONDS = 60.0
"""How long the coordinator may think about a plan."""
MAX_TOLD = 300
"""Characters of the coordinator's words that people get to see."""
MIXTURE_EPSILON, MIXTURE_DELTA = 1.0, 1e-5
"""What describing the data costs, once."""


def apply(
    home: Home,
    application: Application,
    *,
    patience: Patience = PATIENCE,
) -> Assignment:
    """What the coordinator assigns to this device; the home keeps it.

    Args:
        application: what the owner lets it know; a mixture is one from `describe_data`.
        patience: while the coordinator is away.

    Raises:
        PolicyRefused: the policy does not trust the coordinator, or keeps the mixture here.
        TransferRefused: the coordinator does not know this device, or cannot serve it.
        TransferError: it was away at every attempt; try again later.
        ProtocolError: its answer is not signed by the pinned key, or this device's certificate
            has expired.
        ConfigError: not enrolled, or a mixture that was never released.
    """
    record, content = home.enrolled(), application_bytes(application)
    released = None if application.mixture is None else _released(home, application.mixture)
    request = Request(coordinator=record.public_key, network_bytes=len(content))
    entry = Entry(
        kind=Kind.REQUEST,
        receiver=record.blobs,
        num_bytes=len(content),
        digest=digest_of(content),
    )
    if released:
        cost = {} if released.is_spent else {"epsilon": released.epsilon, "delta": released.delta}
        entry = entry.model_copy(update={"kind": Kind.MIXTURE, **cost})
        epsilon = cost.get("epsilon", 0.0)
        request = replace(request, mixture=True, epsilon=epsilon, delta=released.delta)
    require_allowed(home, request)
    connect = connector(home, record)
    with home.ledger().sending(entry):
        if released and not released.is_spent:
            home.keep_mixture(released.model_copy(update={"is_spent": True}))
        signed = patience.until_answered(record.blobs, lambda: _asked(connect, content))
    return home.keep_assignment(signed)


def fetch_table(home: Home, assignment: Assignment) -> DomainTable:
    """The domain table of the base model, to find the mixture that is to leave.

    Raises:
        ConfigError: the coordinator has none.
        PolicyRefused: no mixture may leave, so there is no use for it; and as `fetch_proxy`.
    """
    if assignment.table is None:
        raise ConfigError("the coordinator has no domain table; name a domain, or none")
    if not home.policy().privacy.mixture_may_leave:
        raise PolicyRefused([Objection("privacy.mixture_may_leave", "a domain mixture", "none")])
    bring_tables(home, assignment, assignment.table)
    return load_table(home.store().path(assignment.table.digest))


def describe_data(
    home: Home, table: DomainTable, *, anew: bool = False, work: Work | None = None
) -> dict[str, float]:
    """The noised domain mixture of this device's data: the one released before, if there is one.

    Args:
        table: from `fetch_table`.
        anew: spend again, because the data has changed.
        work: as in `fetch_proxy`.

    Raises:
        PolicyRefused: no mixture may leave, or its epsilon is too much.
        DataError: too few rows for the noise to leave anything useful; tells how many it takes.
    """
    digest, known = digest_of(table_bytes(table)), home.mixture()
    if known is not None and known.table == digest and not anew:
        return known.mixture
    require_allowed(home, release_request(home))
    content = result_of(work, "weigh", home=str(home.path), table=digest)
    weights, num_rows = json.loads(content)
    mixture = release(weights, num_rows, MIXTURE_EPSILON, MIXTURE_DELTA)
    released = ReleasedMixture(
        table=digest, mixture=mixture, epsilon=MIXTURE_EPSILON, delta=MIXTURE_DELTA
    )
    home.keep_mixture(released)
    return mixture


def release_request(home: Home) -> Request:
    """What the policy is asked before a mixture is noised to leave this device."""
    return Request(
        coordinator=home.enrolled().public_key,
        mixture=True,
        epsilon=MIXTURE_EPSILON,
        delta=MIXTURE_DELTA,
    )


def _released(home: Home, mixture: Mapping[str, float]) -> ReleasedMixture:
    known = home.mixture()
    if known is None or known.mixture != mixture:
        raise ConfigError("this mixture was not noised here for release; nothing was sent")
    return known


def _asked(connect: Callable[[], grpc.Channel], content: bytes) -> bytes:
    """The coordinator's answer to an application, at the first attempt."""
    try:
        with connect() as channel:
            answer: bytes = channel.unary_unary(APPLY)(content, timeout=APPLY_SECONDS)
            return answer
    except grpc.RpcError as error:
        code, told = error.code(), f"{error.details()}"[:MAX_TOLD]
        if code not in FOR_GOOD:
            raise Busy(f"{code.name}, {told!r}") from error
        stranger = code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
        remedy = "enrol this device again" if stranger else "apply for something else"
        raise TransferRefused(f"application refused: {code.name}, {told!r}; {remedy}") from error
