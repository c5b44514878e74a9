"""The shipped data is what its cards say."""

import json
from itertools import chain
from pathlib import Path

import pytest

import proxymoe.simulations

ASSETS = Path(proxymoe.simulations.__file__).parent / "assets"
SPLITS = ("train", "validation", "test")


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pairs(paths: list[Path]) -> set[tuple[str, str]]:
    return {(row["prompt"], row["completion"]) for row in chain.from_iterable(map(rows, paths))}


@pytest.mark.parametrize("name", ["calibration", "clinc150", "shakespeare", "tiny-moe"])
def test_every_asset_has_a_card_and_a_licence(name):
    assert (ASSETS / name / "README.md").stat().st_size > 0
    assert (ASSETS / name / "LICENSE").stat().st_size > 0


def test_every_row_has_a_prompt_and_a_completion_and_nothing_else():
    for path in ASSETS.rglob("*.jsonl"):
        for row in rows(path):
            assert set(row) == {"prompt", "completion"}
            assert row["prompt"].strip()
            assert row["completion"].strip()


def test_row_counts_are_those_of_the_cards():
    domains = sorted((ASSETS / "clinc150").glob("*/"))
    assert len(domains) == 10
    for domain in domains:
        assert [len(rows(domain / f"{split}.jsonl")) for split in SPLITS] == [1200, 300, 450]

    speakers = sorted((ASSETS / "shakespeare").glob("*/"))
    counts = [[len(rows(speaker / f"{split}.jsonl")) for split in SPLITS] for speaker in speakers]
    assert [sum(column) for column in zip(*counts, strict=True)] == [965, 120, 124]

    calibration = sorted((ASSETS / "calibration").glob("*.jsonl"))
    assert len(calibration) == 13
    assert sum(len(rows(path)) for path in calibration) == 4100


def test_no_intent_belongs_to_two_domains():
    domains = [
        {row["completion"] for row in rows(domain / "train.jsonl")}
        for domain in (ASSETS / "clinc150").glob("*/")
    ]
    assert all(len(domain) == 15 for domain in domains)
    assert len(set().union(*domains)) == 150


@pytest.mark.parametrize("devices", ["clinc150", "shakespeare"])
def test_no_calibration_row_or_prompt_occurs_in_a_device_set(devices):
    public = pairs(list((ASSETS / "calibration").glob("*.jsonl")))
    private = pairs(list((ASSETS / devices).glob("*/*.jsonl")))
    assert not public & private
    assert not {prompt for prompt, _ in public} & {prompt for prompt, _ in private}
