"""The table of the extraction benchmark: means of cells, held against the full model's."""

import io
import json

import pytest
from rich.console import Console

from proxymoe.simulations.comparison import mode_label
from proxymoe.simulations.extraction import ALL, extraction_rows, how
from proxymoe.simulations.session import run
from tests.worlds import tiny_site

DEFAULT = {"mode": "drop", "router": "full", "allocation": "global", "healed": False}


def cell(device, seed, loss, accuracy, **labels):
    fields = {"router": "full", "allocation": "global", "calibration": "matched", "healed": False}
    quality = {"loss": loss, "accuracy": accuracy}
    measured = {
        "setting": "single",
        "device": device,
        "seed": seed,
        "kept_fraction": 0.25,
        "base": {"loss": 5.0, "accuracy": 0.1},
        "plugged": quality,
        "alone": {"loss": loss + 1.0, "accuracy": accuracy},
        "forgetting": 0.5,
        "kl": 0.25,
        "bytes": 10,
        "seconds": 2.0,
    }
    return fields | measured | labels


def full(device, seed, loss, accuracy):
    gone = {"router": None, "allocation": None, "calibration": None, "kept_fraction": 1.0}
    return cell(device, seed, loss, accuracy, mode="full", alone=None, kl=0.0, **gone)


CELLS = [
    full("a", 0, 1.0, 0.9),
    full("a", 1, 1.0, 0.9),
    full("b", 0, 2.0, 0.5),
    full("b", 1, 2.0, 0.5),
    cell("a", 0, 1.2, 0.5, mode="drop"),
    cell("a", 1, 1.4, 0.5, mode="drop"),
    cell("b", 0, 2.0, 0.5, mode="drop"),
    cell("b", 1, 2.2, 0.5, mode="drop"),
    cell("a", 0, 6.0, 0.0, mode="reap", router="sliced"),
]


def row_of(mode, device, peaks=None):
    rows = extraction_rows(CELLS, DEFAULT, peaks or {})
    return next(r for r in rows if (r["mode"], r["device"]) == (mode, device))


def test_gaps_are_means_over_devices_with_the_error_over_seeds():
    assert row_of("drop", "a")["gap_nats"] == pytest.approx(0.3)
    assert row_of("drop", "a")["stderr"] == pytest.approx(0.1)
    assert row_of("drop", ALL)["gap_nats"] == pytest.approx(0.2)
    assert row_of("drop", ALL)["stderr"] == pytest.approx(0.1)
    assert row_of("drop", ALL)["seed_count"] == 2
    assert row_of("reap", "a")["stderr"] is None


def test_recovered_gain_is_the_share_of_what_full_tuning_won():
    assert row_of("drop", "a")["recovered_gain"] == pytest.approx(0.5)
    assert row_of("drop", "b")["recovered_gain_loss"] == pytest.approx((5 - 2.1) / (5 - 2))
    assert row_of("reap", "a")["recovered_gain"] < 0
    assert row_of("full", ALL)["recovered_gain"] == pytest.approx(1.0)


def test_the_default_is_marked_and_what_falls_below_the_base_model_is_counted():
    assert row_of("drop", "a")["default"]
    assert not row_of("reap", "a")["default"]
    assert row_of("drop", ALL)["above_base"] == 1.0
    assert row_of("reap", "a")["above_base"] == 0.0


def test_peaks_stand_where_they_were_measured():
    peaks = {how(CELLS[4]): 500.0}
    assert row_of("drop", "a", peaks)["peak_rss_mb"] == 500.0
    assert row_of("full", "a", peaks)["peak_rss_mb"] is None


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        ({"mode": "drop"}, "drop"),
        ({"mode": "ptse", "router": "summed"}, "ptse summed"),
        ({"mode": "drop", "allocation": "uniform", "healed": True}, "drop uniform healed"),
        ({"mode": "mean", "calibration": "mismatched"}, "mean mismatched"),
        ({"mode": "drop", "rotate": 0.5}, "drop rotate 0.5"),
    ],
)
def test_a_label_says_what_differs_from_the_default(labels, name):
    assert mode_label(cell("a", 0, 1.0, 1.0, **labels)) == name


@pytest.mark.slow
def test_every_kind_of_cell_is_measured_and_kept(tmp_path):
    modes = [
        {"mode": "drop"},
        {"mode": "affine"},
        {"mode": "ptse", "router": "summed"},
        {"mode": "drop", "healed": True},
    ]
    compare = {
        "seeds": [0],
        "single_devices": ["kitchen"],
        "single_fractions": [0.5],
        "calibrations": ["matched", "mismatched"],
        "quantised": ["int4"],
        "heal": {"steps": 2},
        "modes": modes,
    }
    site, _ = tiny_site(tmp_path, compare=compare, workers=1)
    console = Console(file=io.StringIO())
    run(site.experiment, tmp_path / "run", tmp_path / "cache", console, over_flower=False)
    cells = json.loads((tmp_path / "run" / "metrics.json").read_bytes())["cells"]
    assert len(cells) == 2 + 2 * len(modes)
    rows = extraction_rows(cells, DEFAULT, {})
    assert {mode_label(row) for row in rows} >= {"full", "full int4", "drop healed", "ptse summed"}
    drop, healed = (
        next(c for c in cells if (c["mode"], c["healed"]) == ("drop", flag)) for flag in (0, 1)
    )
    assert drop["plan"] == healed["plan"]
    assert drop["plugged"] != healed["plugged"]
    assert next(c for c in cells if c["mode"] == "full int4")["kl"] > 0
