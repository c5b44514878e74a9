"""What the command line shows, as rich tables and lines."""

import math
import time
from dataclasses import asdict
from typing import Any

from rich.table import Table

from proxymoe.common.price import Price
from proxymoe.server.devices import DeviceEntry
from proxymoe.server.run_directory import RunDirectory
from proxymoe.server.status import Rounds, Status, word_of

DIGITS = 12
"""How much of a digest people are shown."""


def listens(run: RunDirectory) -> list[str]:
    """Which ports the service of a run directory opens, and to whom."""
    network = run.settings.network
    lines = [
        f"gateway   {network.host}:{network.gateway_port}  enrolment and messages; devices use "
        f"{network.gateway_address}",
        f"blobs     {network.host}:{network.blob_port}  models and assignments; devices use "
        f"{network.blob_address}",
        f"status    127.0.0.1:{network.status_port}  http://127.0.0.1:{network.status_port}/status",
        f"superlink 127.0.0.1:{network.superlink_port}  Flower, for this machine only",
    ]
    lines.append(f"logs are in {run.log}; the first start profiles the base model, see blobs.log")
    if network.plain_text:
        lines.append("[yellow]plain text:[/] the gateway does without TLS, on loopback only")
    return lines


def status_table(found: Status) -> Table:
    """How things stand."""
    table = Table(title=f"run {found.run}", show_header=False, title_justify="left")
    table.add_row("service", "up" if found.serving else "down")
    for child in found.children:
        state = "ready" if child.ready else "starting"
        failures = f", {child.failures} failures" if child.failures else ""
        table.add_row(f"  {child.name}", f"{state}, process {child.pid}{failures}")
    if found.engine is not None:
        state = found.engine.state if found.engine.alive else f"ended ({found.engine.state})"
        table.add_row("  rounds", f"{state}, process {found.engine.pid}, run {found.engine.run}")
    if found.round is None:
        table.add_row("round", f"none yet of {found.rounds_wanted}")
    else:
        now = found.round
        table.add_row("round", f"{now.number} of {found.rounds_wanted}: {now.phase}")
        table.add_row("", f"{now.updates} updates of {len(now.cohort)} devices")
    if found.finished:
        table.add_row("", "all rounds are over")
    table.add_row("version", str(found.version))
    for standing, count in found.devices.items():
        table.add_row(f"devices {standing}", str(count))
    table.add_row("disk", f"{found.run_bytes >> 20} MiB here, {found.free_bytes >> 20} MiB free")
    return table


def price_table(found: list[Price]) -> Table:
    """What privacy costs: one line per promise."""
    table = Table("epsilon", "delta", "mode", "rounds", "noise z", "noise : signal", "devices")
    for each in found:
        table.add_row(
            "none" if math.isinf(each.epsilon) else f"{each.epsilon:.3g}",
            f"{each.delta:.1g}",
            each.mode.value,
            str(each.participations),
            f"{each.noise_multiplier:.3g}",
            f"{each.noise_to_signal:.3g}",
            f"{each.devices_needed:,}",
        )
    table.caption = (
        "Epsilon holds for a device that is in every round. Above a noise-to-signal ratio of 1 "
        "the run is in vain; `devices` is the smallest cohort that reaches 1."
    )
    return table


def advice(found: list[Price], size: int) -> list[str]:
    """What would make each promise useful, and what is wrong with it."""
    lines = []
    for each in found:
        what = f"epsilon {each.epsilon:.3g}"
        lines += [f"[yellow]{what}:[/] {warning}" for warning in each.warnings]
        if each.noise_to_signal <= 1:
            continue
        best = each.advice
        smaller = f"{best.name} ({best.size:,})" if best else "none of the smaller adapters here"
        lines.append(
            f"{what}: with this cohort an adapter may have {each.largest_size:,} numbers, this one "
            f"has {size:,}; useful would be {smaller}"
        )
    return lines


def price_fields(found: Price) -> dict[str, Any]:
    """One promise for JSON; an infinite epsilon is null."""
    epsilon = found.epsilon if math.isfinite(found.epsilon) else None
    useful = {"noise_to_signal": found.noise_to_signal}
    return asdict(found) | useful | {"mode": found.mode.value, "epsilon": epsilon}


def device_table(entries: list[DeviceEntry]) -> Table:
    """One line per device."""
    table = Table("device", "standing", "key", "until", "node", "plan")
    for entry in entries:
        table.add_row(
            entry.name,
            word_of(entry.standing),
            (entry.key or "")[:DIGITS],
            _day(entry.expires),
            "" if entry.node is None else str(entry.node),
            (entry.plan or "")[:DIGITS],
        )
    return table


def device_fields(entry: DeviceEntry) -> dict[str, Any]:
    """One device for JSON."""
    application = entry.application
    return asdict(entry) | {
        "application": None if application is None else application.model_dump(exclude_none=True)
    }


def round_table(found: Rounds) -> Table:
    """One line per round."""
    table = Table("round", "phase", "from", "updates", "skipped", "canary", "reason")
    for entry in found.rounds:
        table.add_row(
            str(entry.number),
            entry.phase,
            f"version {entry.version}",
            f"{entry.updates} of {len(entry.cohort)}",
            "" if entry.skipped is None else f"{entry.skipped} blocks",
            "" if entry.canary is None else f"{entry.canary:.3f}",
            entry.reason or "",
        )
    return table


def version_table(found: Rounds) -> Table:
    """One line per committed version."""
    table = Table("version", "from", "round", "digest", "")
    for entry in found.versions:
        current = "current" if entry.version == found.current else ""
        digest = entry.digest[:DIGITS]
        table.add_row(str(entry.version), str(entry.parent), str(entry.number), digest, current)
    return table


def _day(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
