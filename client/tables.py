"""What the command line shows to the owner of a device, as rich tables and lines."""

import json
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from proxymoe.client.advise import Advice
from proxymoe.client.ledger import Record, Totals
from proxymoe.client.policy import MB


def print_status(console: Console, found: dict[str, Any]) -> None:
    """Shows what `status_of` found."""
    console.print(f"[bold]{found['device']}[/] at {found['coordinator']}, in {found['home']}")
    if (given := found["assignment"]) is None:
        console.print("Nothing is assigned yet; `proxymoe-device join` applies for a proxy.")
    else:
        place = "in place" if found["is_fetched"] else "not fetched yet"
        how = "under masks" if given["masked"] else "in the clear"
        console.print(
            f"Run {given['run']}: proxy submodel {given['plan'][:12]} of "
            f"{mb(given['model_bytes'])}, {place}; {given['train']['steps']} steps per round, "
            f"cohorts of at least {given['cohort_size']}, summed {how}"
        )
    gates = Table("gate", "state", "now", "limit", title="May this machine be used now?")
    for gate in found["gates"]:
        state = "[green]open[/]" if gate["open"] else "[red]closed[/]"
        gates.add_row(gate["name"], state, gate["value"], gate["limit"])
    used = Table("policy key", "used", "limit", title="Used up")
    for key, amount in found["used"].items():
        used.add_row(key, f"{amount['used']:,.6g}", f"{amount['limit']:,.6g}")
    console.print(gates, used)
    if found["peers"]:
        console.print(f"{len(found['peers'])} devices are known by their keys; --json lists them.")
    for name, child in found["processes"].items():
        state = "ready" if child["ready"] else "starting"
        console.print(f"{name}: process {child['pid']}, {state}, {child['failures']} failures")
    if not found["processes"]:
        console.print("No client is at work here.")
    for refusal in found["refusals"]:
        console.print("refused:", json.dumps(refusal, ensure_ascii=False), markup=False)


def record_fields(record: Record) -> dict[str, Any]:
    """One row of the ledger, for programs."""
    told = record.entry.model_dump(mode="json", exclude_none=True)
    return {
        "number": record.number,
        "time": record.time.isoformat(),
        "is_confirmed": record.is_confirmed,
        **told,
    }


def sent_table(records: list[Record]) -> Table:
    """Rows of the ledger, as they are given."""
    table = Table(box=None, padding=(0, 1, 0, 0), caption="?: it may or may not have arrived")
    for name in ("", "time (UTC)", "what", "round", "sent", "fetched"):
        table.add_column(name, no_wrap=True)
    table.add_column("to", overflow="fold")
    for record in records:
        entry = record.entry
        table.add_row(
            str(record.number),
            f"{record.time:%Y-%m-%d %H:%M}",
            entry.kind.value + ("" if record.is_confirmed else "?"),
            "" if entry.round is None else str(entry.round),
            f"{entry.num_bytes:,} B",
            mb(entry.fetched_bytes) if entry.fetched_bytes else "",
            entry.receiver,
        )
    return table


def months_table(months: dict[str, Totals]) -> Table:
    """The totals of each month."""
    table = Table(
        "month", "messages", "sent", "fetched", "epsilon", box=SIMPLE_HEAD, pad_edge=False
    )
    for month, totals in months.items():
        sums = (mb(totals.sent_bytes), mb(totals.fetched_bytes), f"{totals.epsilon:g}")
        table.add_row(month, str(totals.num_entries), *sums)
    return table


def advice_lines(found: Advice) -> list[str]:
    """The advice, in sentences; the last says what to do."""
    nearest = ", ".join(f"{name} ({weight:.0%})" for name, weight in found.nearest)
    lines = [
        f"Your data is most like {nearest}.",
        f"The proxy submodel here covers {found.covered:.1%} of what the full model's experts do "
        "on such text.",
        f"Of the same size, the best for your data would cover {found.best:.1%}, and the one for "
        f"the domain {found.domain} {found.by_domain:.1%}.",
    ]
    if not found.is_exact:
        lines.append("This coordinator chooses experts by another rule: take that as an estimate.")
    if found.needs_mixture:
        lines.append(
            "A noised mixture would come closer than a domain, but none may leave this device: "
            "the policy says so (privacy.mixture_may_leave, privacy.largest_epsilon), or there are "
            "too few rows for the noise."
        )
    match found.remedy:
        case None:
            lines.append("No other submodel that you can ask for is worth its download.")
        case "--mixture" as remedy:
            lines.append(
                f"Say `proxymoe-device join --refresh {remedy}` for one that covers "
                f"{found.by_mixture:.1%}, less what the noise costs. It tells the coordinator "
                "noised weights of the domains."
            )
        case remedy:
            lines.append(
                f"Say `proxymoe-device join --refresh {remedy}` for one that covers "
                f"{found.by_domain:.1%}. It tells the coordinator that name, and nothing else."
            )
    return lines


def advice_fields(found: Advice) -> dict[str, Any]:
    """The advice, for programs."""
    return asdict(found) | {"nearest": dict(found.nearest), "remedy": found.remedy}


def mb(num_bytes: float) -> str:
    """Bytes as people read them."""
    return f"{num_bytes / MB:,.1f} MB" if num_bytes >= MB / 10 else f"{num_bytes:,.0f} B"
