"""Cells of the extraction benchmark, summarised: what every way to choose experts returns.

One row per mode, kept fraction, calibration and device, and one over all devices. Errors are those
of the mean over seeds.
"""

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

import numpy as np

from proxymoe.simulations.comparison import Cell, over_seeds, recovered

HOW = ("kept_fraction", "calibration", "mode", "router", "allocation", "healed")
Key = tuple[Any, ...]
"""Values of HOW: one way to cut a submodel."""
ALL = "all"
"""In place of a device: the mean over devices."""


def how(cell: Mapping[str, Any]) -> Key:
    """Which way to cut submodels this cell or row is about."""
    return tuple(cell[name] for name in HOW)


def extraction_rows(
    cells: Iterable[Cell], default: Mapping[str, Any], peaks: Mapping[Key, float]
) -> list[dict[str, Any]]:
    """The table of the benchmark.

    Args:
        cells: of devices tuned alone, see `compare.single_cell`; those of the full model are what
            the others are held against.
        default: mode, router and allocation of the default.
        peaks: measured peak of a tuning process in MB, where it was measured.
    """
    single = [cell for cell in cells if cell["setting"] == "single"]
    full = {(c["seed"], c["device"]): c for c in single if c["mode"] == "full"}
    ordered = sorted(single, key=lambda cell: str(how(cell)))
    rows = []
    for key, group in groupby(ordered, how):
        found = [cell for cell in group if (cell["seed"], cell["device"]) in full]
        for device in (ALL, *sorted({cell["device"] for cell in found})):
            mine = [cell for cell in found if device in (ALL, cell["device"])]
            row = dict(zip(HOW, key, strict=True)) | {"device": device}
            row["default"] = all(row[name] == value for name, value in default.items())
            row |= _measured(mine, full) | {"peak_rss_mb": peaks.get(key)}
            rows.append(row)
    return sorted(rows, key=_order)


def _measured(cells: list[Cell], full: Mapping[Key, Cell]) -> dict[str, Any]:
    """Means over these cells: of one device, or of several with each counting the same."""
    pairs = [(cell, full[cell["seed"], cell["device"]]) for cell in cells]
    gap, stderr = over_seeds(
        (cell["seed"], cell["plugged"]["loss"] - best["plugged"]["loss"]) for cell, best in pairs
    )
    proxies = [cell["alone"] for cell in cells if cell["alone"]]
    return {
        "seed_count": len({cell["seed"] for cell in cells}),
        "recovered_gain": recovered(pairs, "accuracy", "plugged"),
        "recovered_gain_loss": recovered(pairs, "loss", "plugged"),
        "gap_nats": gap,
        "stderr": stderr,
        "plugged": _mean(cell["plugged"]["loss"] for cell in cells),
        "accuracy": _mean(cell["plugged"]["accuracy"] for cell in cells),
        "proxy_alone": _mean(proxy["loss"] for proxy in proxies),
        "above_base": _mean(c["plugged"]["loss"] < c["base"]["loss"] for c in cells),
        "forgetting": _mean(cell["forgetting"] for cell in cells),
        "kl": _mean(cell["kl"] for cell in cells),
        "bytes": _mean(cell["bytes"] for cell in cells),
        "seconds": _mean(cell["seconds"] for cell in cells),
    }


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return float(np.mean(found)) if found else None


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    calibrations = (None, "matched", "uniform", "mismatched")
    place = (row["device"] != ALL, row["device"])
    return (*place, calibrations.index(row["calibration"]), -row["kept_fraction"], row["gap_nats"])
