"""A rehearsal does full rows, and tells what a process of its own has taken."""

import pytest

from proxymoe.client.rehearse import STEPS, Rehearsal, full_rows, rehearse
from proxymoe.common.config import AdapterSettings, TrainSettings
from proxymoe.common.errors import DataError
from proxymoe.common.measure import measured
from tests.worlds import write_rows


def test_rows_are_full_and_go_on_where_the_last_one_ended():
    rows = list(full_rows(range(7), count=3, length=5))
    assert [row.tokens for row in rows] == [(0, 1, 2, 3, 4), (5, 6, 0, 1, 2), (3, 4, 5, 6, 0)]
    assert {row.start for row in rows} == {1}


def test_a_text_without_tokens_is_refused():
    with pytest.raises(DataError, match="needs public text"):
        list(full_rows([], count=1, length=5))


def test_a_rehearsal_runs_all_its_steps_and_measures_its_process(qwen, tmp_path, monkeypatch):
    write_rows(tmp_path / "text.jsonl", [{"text": "all of it is public"}])
    train = TrainSettings(batch_size=2, max_tokens=24, dtype="float32", steps=99)
    steps = []

    def rate(step: int, settings: TrainSettings) -> float:
        steps.append(settings.steps)
        return 1.0

    monkeypatch.setattr("proxymoe.client.train.rate", rate)
    asked = Rehearsal(
        folder=qwen.full_folder,
        text=tmp_path / "text.jsonl",
        adapter=AdapterSettings(rank=2),
        train=train,
    )
    found = rehearse(Rehearsal.model_validate_json(asked.model_dump_json()))
    assert steps == [STEPS] * STEPS
    assert found.peak > found.anonymous > 0
    assert found.own_file_backed <= found.file_backed
    assert measured().peak >= found.peak
