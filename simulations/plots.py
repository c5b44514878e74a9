"""The pictures of a run, as PNG files."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from proxymoe.simulations.comparison import mode_label

BEFORE, AFTER, OWN = "#b8bec6", "#2f6f9f", "#d9822b"
LINES = ("#2f6f9f", "#d9822b", "#5a9367", "#8c5fa8", "#b8bec6", "#b5484b")


def write_plots(folder: Path, metrics: dict[str, Any]) -> list[Path]:
    """Writes every plot that the metrics have data for; returns their paths."""
    plots = {
        "accuracy.png": accuracy,
        "rounds.png": rounds,
        "experts.png": kept_experts,
        "resources.png": resources,
    }
    if metrics["summary"].get("comparison"):
        plots = {"comparison.png": comparison}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in plots.items():
        figure = draw(metrics)
        figure.savefig(folder / name, dpi=130, bbox_inches="tight")
        plt.close(figure)
        written.append(folder / name)
    return written


def accuracy(metrics: dict[str, Any]) -> Figure:
    """Accuracy per device: base model, federated adapter plugged back, personal on top."""
    devices = metrics["devices"]
    bars = [("base", "base model", BEFORE), ("plugged", "federated, plugged back", AFTER)]
    if any(device["plugged_personal"] for device in devices):
        bars.append(("plugged_personal", "with personal adapter", OWN))
    figure, axes = _canvas(max(6.0, 0.95 * len(devices) + 2), 3.8)
    at, width = np.arange(len(devices)), 0.8 / len(bars)
    for i, (key, label, colour) in enumerate(bars):
        heights = [device[key]["accuracy"] if device[key] else 0.0 for device in devices]
        axes.bar(at + (i - (len(bars) - 1) / 2) * width, heights, width, label=label, color=colour)
    axes.set_xticks(at, [d["name"].replace("_", " ") for d in devices], rotation=30, ha="right")
    axes.set_ylabel("accuracy")
    axes.set_title("Accuracy per device")
    _legend(axes, below=True)
    return figure


def rounds(metrics: dict[str, Any]) -> Figure:
    """Local loss of every device over the rounds, their mean, and the canary."""
    reports = metrics["rounds"]
    figure, axes = _canvas(6.5, 3.8)
    numbers = [report["round"] for report in reports]
    for name in [device["name"] for device in metrics["devices"]]:
        losses = [report["losses"].get(name, (np.nan, np.nan))[0] for report in reports]
        axes.plot(numbers, losses, color=BEFORE, linewidth=0.8)
    mean = [np.mean([first for first, _ in report["losses"].values()]) for report in reports]
    axes.plot(numbers, mean, color=AFTER, linewidth=2, label="mean local loss")
    checked = [report for report in reports if report["canary_loss"] is not None]
    canary = [report["canary_loss"] for report in checked]
    axes.plot(
        [report["round"] for report in checked],
        canary,
        color=OWN,
        linewidth=1.5,
        label="public text (canary)",
    )
    undone = [report for report in reports if not report["committed"]]
    if undone:
        at, height = [r["round"] for r in undone], [r["canary_loss"] for r in undone]
        axes.plot(at, height, "x", color="#b5484b", label="rolled back")
    axes.set_xlabel("round")
    axes.set_ylabel("nats per token")
    axes.set_title("Loss per round")
    _legend(axes)
    return figure


def kept_experts(metrics: dict[str, Any]) -> Figure:
    """Which experts of each layer each device keeps, as one heat map per device."""
    devices = metrics["devices"]
    columns = min(5, len(devices))
    lines = -(-len(devices) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(2.6 * columns, 1.5 * lines + 0.6), squeeze=False
    )
    for axes, device in zip(grid.flat, devices, strict=False):
        layers = sorted(device["kept"], key=int)
        width = max(device["experts_per_layer"].values())
        picture = np.zeros((len(layers), width))
        for row, layer in enumerate(layers):
            picture[row, device["kept"][layer]] = 1.0
        axes.imshow(picture, aspect="auto", cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest")
        axes.set_title(device["name"].replace("_", " "), fontsize=9)
        axes.set_yticks(range(len(layers)), layers, fontsize=7)
        axes.tick_params(axis="x", labelsize=7)
    for axes in list(grid.flat)[len(devices) :]:
        axes.axis("off")
    figure.supxlabel("expert", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    figure.suptitle("Experts kept, per layer and device")
    figure.tight_layout()
    return figure


def resources(metrics: dict[str, Any]) -> Figure:
    """Bytes of each proxy submodel against the full model, and measured peak memory."""
    devices = metrics["devices"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    names = [device["name"].replace("_", " ") for device in devices]
    at = np.arange(len(devices))
    left.barh(
        at, [device["bytes"] / 1e6 for device in devices], color=AFTER, label="proxy submodel"
    )
    full = metrics["summary"]["full_model_bytes"] / 1e6
    left.axvline(full, color=OWN, linewidth=2, label="full model")
    left.set_xlabel("MB of weights")
    left.set_xlim(0, 1.1 * full)
    right.barh(at, [device["peak_rss_mb"] or 0.0 for device in devices], color=AFTER)
    right.set_xlabel("peak memory of the tuning process, MB")
    for axes in (left, right):
        axes.set_yticks(at, names, fontsize=8)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    _legend(left)
    figure.suptitle("What a device needs")
    figure.tight_layout()
    return figure


def comparison(metrics: dict[str, Any]) -> Figure:
    """Gap to full-model tuning in nats, per mode and kept fraction; zero is perfect."""
    rows = [r for r in metrics["summary"]["comparison"] if r["gap_nats"] is not None]
    settings = [s for s in ("single", "federated") if any(r["setting"] == s for r in rows)]
    figure, grid = plt.subplots(
        1, max(1, len(settings)), figsize=(6.2 * max(1, len(settings)), 4), squeeze=False
    )
    for axes, setting in zip(grid.flat, settings, strict=True):
        mine = [r for r in rows if r["setting"] == setting and r["kept_fraction"] < 1]
        labels = list(dict.fromkeys(mode_label(row) for row in mine))
        fractions = sorted({row["kept_fraction"] for row in mine}, reverse=True)
        for i, fraction in enumerate(fractions):
            here = {mode_label(row): row for row in mine if row["kept_fraction"] == fraction}
            at = [labels.index(label) + (i - (len(fractions) - 1) / 2) * 0.38 for label in here]
            heights = [row["gap_nats"] for row in here.values()]
            errors = [row["stderr"].get("gap_nats") or 0.0 for row in here.values()]
            label = f"{fraction:.1%} of experts"
            axes.bar(at, heights, 0.36, yerr=errors, label=label, color=LINES[i], capsize=2)
        axes.axhline(0.0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=8)
        axes.set_ylabel("nats above full-model LoRA")
        axes.set_title(setting)
        axes.spines[["top", "right"]].set_visible(False)
        _legend(axes)
    figure.suptitle("Plugged back into the full model, at equal bytes")
    figure.tight_layout()
    return figure


def write_extraction(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Draws the extraction benchmark: nats above full-model LoRA by kept fraction, per mode."""
    means = [row for row in rows if row["device"] == "all" and row["kept_fraction"] < 1]
    calibrations = list(dict.fromkeys(row["calibration"] for row in means))
    width = 5.0 * len(calibrations)
    figure, grid = plt.subplots(1, len(calibrations), figsize=(width, 4.5), squeeze=False)
    for axes, calibration in zip(grid.flat, calibrations, strict=True):
        mine = [row for row in means if row["calibration"] == calibration]
        for label in dict.fromkeys(mode_label(row | {"calibration": None}) for row in mine):
            line = [r for r in mine if mode_label(r | {"calibration": None}) == label]
            line.sort(key=lambda row: row["kept_fraction"])
            strong = {"linewidth": 2.5, "color": "black"} if line[0]["default"] else {}
            fractions = [row["kept_fraction"] for row in line]
            errors = [row["stderr"] or 0.0 for row in line]
            gaps = [row["gap_nats"] for row in line]
            axes.errorbar(fractions, gaps, errors, label=label, marker="o", capsize=2, **strong)
        axes.axhline(0.0, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("share of experts kept")
        axes.set_ylabel("nats above full-model LoRA")
        axes.set_title(f"public text: {calibration}")
        axes.spines[["top", "right"]].set_visible(False)
    grid.flat[-1].legend(frameon=False, fontsize=7, loc="upper right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path


def _canvas(width: float, height: float) -> tuple[Figure, Any]:
    figure, axes = plt.subplots(figsize=(width, height))
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes: Any, *, below: bool = False) -> None:
    if below:
        axes.legend(
            frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.35)
        )
    else:
        axes.legend(frameon=False, fontsize=8)
