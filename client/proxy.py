"""★ How a device comes to its proxy submodel: apply, judge, fetch, build, tidy up.

The owner's policy decides before anything is fetched, and the gates of the machine all along.
What is here already is not fetched again, in part or whole: a crash, a cut line or a changed plan
costs what is new and no more. Whatever leaves stands in the ledger first. Model code is imported
in a job process only.
"""

import shutil
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, Field, ValidationError

from proxymoe.client.apply import apply, describe_data, fetch_table
from proxymoe.client.bring import (
    TABLE,
    GatesClosed,
    PolicyRefused,
    Progress,
    bring,
    drop_others,
    require_allowed,
    small_needs,
)
from proxymoe.client.elsewhere import Work, result_of
from proxymoe.client.home import Home
from proxymoe.client.inventory import is_whole, list_contents
from proxymoe.client.policy import Request
from proxymoe.client.requests import job_request
from proxymoe.client.store import QuotaError
from proxymoe.common.assignment import Assignment
from proxymoe.common.errors import ConfigError, IntegrityError, ProtocolError
from proxymoe.common.files import sync_folder
from proxymoe.common.messages import Digest
from proxymoe.common.plan import Plan

if TYPE_CHECKING:
    from proxymoe.client.personalize import Device


class _Listed(BaseModel):
    digest: Digest
    num_bytes: Annotated[int, Field(ge=0)]


class _Listing(BaseModel):
    """What to fetch, of a manifest; `client/submodel.py` reads the rest of it."""

    plan: Plan
    pieces: tuple[_Listed, ...]
    companions: dict[str, Digest] = {}


def request_of(home: Home, assignment: Assignment) -> Request:
    """What an assignment asks of this device, to be judged before it is done.

    What is to be fetched is known for certain once the manifest is here. Before, all of the
    submodel is counted on a device that has none, and nothing of it where only some changes.
    """
    store, listing = home.store(), _listing(home, assignment)
    needs = _needs(assignment, listing)
    network_bytes, blob_bytes = sum(store.lacking(needs).values()), sum(needs.values())
    if listing is None:
        blob_bytes += assignment.model_bytes
        is_first = not store.pins().keys() - {TABLE, assignment.plan}
        network_bytes += assignment.model_bytes if is_first else 0
    used = home.usage(time.time())
    request = job_request(assignment, home.enrolled().public_key, home.peak(), used)
    disk_bytes = blob_bytes + _built_bytes(assignment)
    return replace(request, network_bytes=network_bytes, disk_bytes=disk_bytes)


def fetch_proxy(
    home: Home,
    assignment: Assignment,
    progress: Progress | None = None,
    *,
    work: Work | None = None,
) -> Path:
    """The folder of the assigned submodel; what is lacking of it is fetched, what is old dropped.

    A submodel that is here and whole costs a reading of it. A damaged one is built again, and a
    damaged blob fetched again.

    Args:
        progress: see `client/bring.py`.
        work: does the jobs of `client/submodel.py`; by default, in a process of its own.

    Raises:
        PolicyRefused, GatesClosed: not allowed, or not now; what was fetched so far is kept.
        TransferRefused, TransferError, IntegrityError, StoreError: see `client/bring.py`.
        ProtocolError: the manifest is not what was assigned.
    """
    require_allowed(home, request_of(home, assignment))
    folder, plan = home.submodel(assignment.plan), assignment.plan
    if not is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)
        room = _built_bytes(assignment)
        bring(home, assignment, plan, _needs(assignment, None), room)
        require_allowed(home, request_of(home, assignment))  # now it is known what has to come
        needs = _needs(assignment, _listing(home, assignment))
        bring(home, assignment, plan, needs, room, progress)
        try:
            _build(home, assignment, work)
        except IntegrityError:
            for digest in needs:
                home.store().verify(digest)
            bring(home, assignment, plan, needs, room, progress)
            _build(home, assignment, work)
    drop_others(home, plan, TABLE)
    with suppress(QuotaError):  # the policy has changed meanwhile, and is asked next time
        home.store().collect()
    return folder


def planned(home: Home, assignment: Assignment) -> Plan:
    """The assigned plan, as the manifest has it; the submodel need not be here.

    Raises:
        ConfigError: the manifest is not here.
        ProtocolError: it is not what was assigned.
    """
    if listing := _listing(home, assignment):
        return listing.plan
    raise ConfigError(f"{home.path}: the manifest of the assigned plan is not here; join again")


def open_device(home: Home) -> "Device":
    """This device, ready to answer training tasks; imports model code, see there for errors."""
    from proxymoe.client import submodel  # noqa: PLC0415  200 MB that not every process needs

    return submodel.open_device(home)


def _needs(assignment: Assignment, listing: _Listing | None) -> dict[str, int]:
    """{digest: num_bytes} of the blobs of a submodel, as far as is known; the pieces last."""
    pieces = listing.pieces if listing else ()
    return small_needs(assignment) | {piece.digest: piece.num_bytes for piece in pieces}


def _built_bytes(assignment: Assignment) -> int:
    """What a submodel takes beside its blobs; none once it is there."""
    headers = assignment.manifest.num_bytes  # config, plan and names come from it
    return assignment.model_bytes + sum(assignment.companions.values()) + headers


def _listing(home: Home, assignment: Assignment) -> _Listing | None:
    """What the manifest lists; None while it is not here. ProtocolError if it is another's."""
    store, blob = home.store(), assignment.manifest
    if not store.holds(blob.digest, blob.num_bytes):
        return None
    try:
        listing = _Listing.model_validate_json(store.path(blob.digest).read_bytes())
    except ValidationError:
        raise ProtocolError(
            "manifest: of another version of ProxyMoE; update the older side"
        ) from None
    found = listing.plan.base, listing.plan.digest
    if found != (assignment.base, assignment.plan):
        raise ProtocolError(
            f"manifest: of plan {found[1][:12]}, assigned was {assignment.plan[:12]}; apply again"
        )
    if unknown := {*listing.companions.values()} - assignment.companions.keys():
        raise ProtocolError(f"manifest: names {len(unknown)} files that were not assigned")
    return listing


def _build(home: Home, assignment: Assignment, work: Work | None) -> None:
    """Makes the submodel of blobs that are all here; it appears whole or not at all."""
    folder = home.submodel(assignment.plan)
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700, parents=True)
    manifest, store = assignment.manifest.digest, str(home.store_folder)
    result_of(work, "build", store=store, manifest=manifest, folder=str(partial))
    list_contents(partial)
    partial.rename(folder)
    sync_folder(folder.parent)


__all__ = [
    "GatesClosed",
    "PolicyRefused",
    "Progress",
    "apply",
    "describe_data",
    "fetch_proxy",
    "fetch_table",
    "open_device",
    "planned",
    "request_of",
]
