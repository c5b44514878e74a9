"""What a run shows at its end: a table on the terminal and metrics.json."""

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from proxymoe.common.files import write_json
from proxymoe.simulations.comparison import mode_label

COLUMNS = {
    "base": "base\nmodel",
    "proxy_untuned": "proxy\nas cut",
    "proxy_tuned": "proxy\ntuned",
    "plugged": "plug-\nged",
    "local_only": "local\nonly",
    "plugged_personal": "plus\nown",
    "full_tuned": "full,\nalone",
}
"""Titles of the qualities; all but the proxy's are measured on the full model."""

COMPARISON = (
    "experts",
    "kept",
    "MB",
    "accuracy",
    "loss",
    "gap",
    "gain",
    "proxy",
    "lost",
    "150-way",
)
"""`gap` is to the full model's loss, `gain` the share of its accuracy gain, `proxy` the loss on
the proxy itself, `lost` what public text loses; in nats."""


def write_metrics(folder: Path, metrics: dict[str, Any]) -> Path:
    """Writes metrics.json and returns its path."""
    path = folder / "metrics.json"
    write_json(path, metrics)
    return path


def show(metrics: dict[str, Any], console: Console) -> None:
    """Prints accuracy and loss per device, and what the whole cost."""
    if metrics["summary"].get("comparison"):
        show_comparison(metrics, console)
        return
    devices, mean = metrics["devices"], metrics["summary"]["mean"]
    shown = {key: title for key, title in COLUMNS.items() if any(d[key] for d in devices)}
    table = _table(f"{metrics['experiment']}: accuracy per device")
    table.add_column("device", no_wrap=True)
    table.add_column("kept", justify="right")
    table.add_column("MB", justify="right")
    for title in shown.values():
        table.add_column(title, justify="right")
    table.add_column("peak\nMB", justify="right")
    for device in devices:
        peak = device["peak_rss_mb"]
        table.add_row(
            device["name"],
            f"{device['kept_fraction']:.0%}",
            f"{device['bytes'] / 1e6:.1f}",
            *(_number(device[key], "accuracy") for key in shown),
            "" if peak is None else f"{peak:.0f}",
        )
    table.add_section()
    for key, title in (("accuracy", "mean"), ("loss", "mean loss, nats")):
        cells = (_number(mean.get(column), key) for column in shown)
        table.add_row(title, "", "", *cells, "", style="bold")
    console.print(table)
    summary = metrics["summary"]
    rounds = metrics["rounds"]
    _show_protection(summary, console)
    sent = sum(r["uplink_bytes"] for r in rounds) / max(1, sum(r["num_updates"] for r in rounds))
    console.print(
        f"{len(rounds)} rounds in {summary['wall_seconds']:.0f} s, "
        f"{sent / 1e6:.2f} MB per update, "
        f"{summary['trained_parameters']:,} trained parameters, "
        f"peak memory {summary['peak_rss_mb']:.0f} MB; "
        f"public text lost {summary['forgetting']['mean']:.2f} nats"
    )


def show_comparison(metrics: dict[str, Any], console: Console) -> None:
    """Prints the table of `compare.toml`: who recovers how much of full-model tuning."""
    for setting in ("single", "federated"):
        rows = [r for r in metrics["summary"]["comparison"] if r["setting"] == setting]
        if not rows:
            continue
        hidden = {"proxy"} if any(row["accuracy_all"] is not None for row in rows) else {"150-way"}
        table = _table(f"{metrics['experiment']}, {setting}: plugged back into the full model")
        shown = [title for title in COMPARISON if title not in hidden]
        for title in shown:
            table.add_column(title, justify="left" if title == "experts" else "right", no_wrap=True)
        for row in rows:
            cells = dict(zip(COMPARISON, comparison_cells(row), strict=True))
            table.add_row(*(cells[title] for title in shown))
        console.print(table)


def comparison_cells(row: dict[str, Any]) -> list[str]:
    """The printed cells of one row of the comparison; ± is the standard error over seeds."""

    def cell(key: str, digits: int, *, with_error: bool = True) -> str:
        value, error = row[key], row["stderr"][key] if with_error else None
        if value is None:
            return "–"
        if error is None:
            return f"{value:.{digits}f}"
        return f"{value:.{digits}f}±{error:.{digits}f}".replace("±0.", "±.")

    return [
        mode_label(row),
        f"{100 * row['kept_fraction']:.3g}%",
        f"{row['bytes'] / 1e6:.0f}",
        cell("accuracy", 3),
        cell("loss", 3, with_error=False),
        cell("gap_nats", 3),
        "–" if row["recovered_gain"] is None else f"{row['recovered_gain']:.0%}",
        cell("proxy_alone_loss", 3, with_error=False),
        cell("forgetting", 2, with_error=False),
        cell("accuracy_all", 2),
    ]


def _table(title: str) -> Table:
    """A table that fits 80 columns."""
    return Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def _number(value: dict[str, float] | None, key: str) -> str:
    return "–" if value is None else f"{value[key]:.3f}"


def _show_protection(summary: dict[str, Any], console: Console) -> None:
    privacy = summary["privacy"]
    if summary["secure"]:
        console.print("updates were summed under masks (experimental)")
        console.print(summary["coverage"]["told"])
    if privacy["epsilon"] is not None:
        console.print(
            f"{privacy['mode']} privacy: epsilon {privacy['epsilon_spent']:.3g} spent of "
            f"{privacy['epsilon']:.3g} at delta {privacy['delta']:.1g}, noise multiplier "
            f"{privacy['noise_multiplier']:.3g}, noise {privacy['noise_to_signal']:.3g} times the "
            "signal at best"
        )
    for warning in privacy["warnings"] if privacy["mode"] != "clip_only" else ():
        console.print(f"[yellow]{warning}[/]")
