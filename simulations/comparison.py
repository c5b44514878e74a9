"""Cells of a comparison, summarised: one row per setting, kept fraction and mode."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np

Cell = dict[str, Any]
"""One measurement: setting, mode, router, allocation, kept_fraction, seed, device, qualities."""


HOW = ("mode", "router", "allocation", "healed", "rotate")
"""What tells one way to cut submodels from another."""


def mode_label(row: Cell) -> str:
    """A row's mode as tables and plots call it: what differs from the default follows it."""
    usual = (None, "full", "global", "matched")
    said = (row[key] for key in ("router", "allocation", "calibration"))
    parts = [str(row["mode"]), *(word for word in said if word not in usual)]
    parts += ["healed"] if row["healed"] else []
    parts += [f"rotate {row['rotate']:g}"] if row.get("rotate") else []
    return " ".join(parts).replace("_", " ")


def comparison(cells: list[Cell]) -> list[dict[str, Any]]:
    """One row per setting, kept fraction and mode: means over devices and seeds.

    Standard errors are those of the mean over seeds; they are null for a single seed.
    """
    keys = ("setting", "kept_fraction", "calibration", *HOW)
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell[key] for key in keys), []).append(cell)
    full = {(c["setting"], c["seed"], c["device"]): c for c in cells if c["mode"] == "full"}
    rows = []
    for key, group in groups.items():
        matched = [(c, full[c["setting"], c["seed"], c["device"]]) for c in group]
        rows.append(dict(zip(keys, key, strict=True)) | _row(matched))
    order = {"single": 0, "federated": 1}
    return sorted(rows, key=lambda r: (order[r["setting"]], -r["kept_fraction"], r["loss"]))


def _row(matched: list[tuple[Cell, Cell]]) -> dict[str, Any]:
    columns: dict[str, Callable[[Cell, Cell], float | None]] = {
        "accuracy": lambda cell, _: cell["plugged"]["accuracy"],
        "loss": lambda cell, _: cell["plugged"]["loss"],
        "gap_nats": lambda cell, full: cell["plugged"]["loss"] - full["plugged"]["loss"],
        "proxy_alone_accuracy": lambda cell, _: cell["alone"] and cell["alone"]["accuracy"],
        "proxy_alone_loss": lambda cell, _: cell["alone"] and cell["alone"]["loss"],
        "forgetting": lambda cell, _: cell["forgetting"],
        "kl": lambda cell, _: cell.get("kl"),
        "accuracy_all": lambda cell, _: cell["plugged_all"] and cell["plugged_all"]["accuracy"],
    }
    row: dict[str, Any] = {"stderr": {}}
    for name, value_of in columns.items():
        row[name], row["stderr"][name] = over_seeds(
            (cell["seed"], value_of(cell, full)) for cell, full in matched
        )
    row["recovered_gain"] = recovered(matched, "accuracy", "plugged")
    row["recovered_gain_loss"] = recovered(matched, "loss", "plugged")
    row["recovered_gain_all"] = recovered(matched, "accuracy", "plugged_all")
    row["seeds"] = len({cell["seed"] for cell, _ in matched})
    row["bytes"] = float(np.mean([cell["bytes"] for cell, _ in matched]))
    row["devices"] = {
        name: {
            "accuracy": float(np.mean([c["plugged"]["accuracy"] for c, _ in mine])),
            "loss": float(np.mean([c["plugged"]["loss"] for c, _ in mine])),
            "gap_nats": float(
                np.mean([c["plugged"]["loss"] - f["plugged"]["loss"] for c, f in mine])
            ),
            "recovered_gain": recovered(mine, "accuracy", "plugged"),
            "recovered_gain_loss": recovered(mine, "loss", "plugged"),
        }
        for name in dict.fromkeys(cell["device"] for cell, _ in matched)
        if (mine := [(c, f) for c, f in matched if c["device"] == name])
    }
    return row


def over_seeds(values: Iterable[tuple[int, float | None]]) -> tuple[float | None, float | None]:
    """(mean over seeds, its standard error): no mean without values, no error for one seed."""
    by_seed: dict[int, list[float]] = {}
    for seed, value in values:
        if value is not None:
            by_seed.setdefault(seed, []).append(value)
    if not by_seed:
        return None, None
    means = [float(np.mean(group)) for group in by_seed.values()]
    error = None if len(means) < 2 else float(np.std(means, ddof=1) / np.sqrt(len(means)))
    return float(np.mean(means)), error


def recovered(
    matched: list[tuple[Cell, Cell]],
    key: Literal["accuracy", "loss"],
    what: Literal["plugged", "plugged_all"],
) -> float | None:
    """(plugged − base) / (full − base) of the means; None if full tuning gained nothing."""
    base_of = "base" if what == "plugged" else "base_all"
    used = [(c, f) for c, f in matched if c[what] and f[what] and c[base_of]]
    if not used:
        return None
    base = np.mean([c[base_of][key] for c, _ in used])
    gain = np.mean([c[what][key] for c, _ in used]) - base
    possible = np.mean([f[what][key] for _, f in used]) - base
    if possible == 0 or (possible > 0) != (key == "accuracy"):
        return None
    return float(gain / possible)
