"""What a device says of itself is what it would say if it were open, no more than is there."""

import shutil

import pytest

from proxymoe.client.inventory import CONTENTS, describe, is_whole, list_contents
from proxymoe.client.submodel import open_device
from proxymoe.common.errors import CheckpointError, ConfigError, DataError, LayoutMismatch
from proxymoe.common.plan import PLAN_FILE
from tests.settled import enrolled, settle, write_policy


@pytest.fixture
def home(tmp_path):
    return enrolled(tmp_path)


@pytest.fixture
def folder(home, qwen):
    """The submodel in place."""
    return home.submodel(settle(home, qwen).plan)


def test_a_device_says_of_itself_what_it_would_say_if_it_were_open(home, folder):
    told, device = describe(home), open_device(home)
    assert (told.device, told.plan) == (device.name, device.loaded.plan.digest)
    assert told.plan == folder.name


def test_without_an_assignment_there_is_nothing_to_say(home):
    with pytest.raises(ConfigError, match="no plan is assigned"):
        describe(home)


@pytest.mark.parametrize("missing", ["", CONTENTS, PLAN_FILE, "config.json", "model.safetensors"])
def test_a_submodel_that_is_not_there_or_lacks_a_file_is_not_offered(home, folder, missing):
    shutil.rmtree(folder) if missing == "" else (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=missing or PLAN_FILE):
        describe(home)


@pytest.mark.parametrize("content", ["", "{", "7", "[1]"])
def test_a_list_of_files_that_is_none_is_damage(home, folder, content):
    (folder / CONTENTS).write_text(content)
    assert not is_whole(folder)
    with pytest.raises(CheckpointError, match="no list of files"):
        describe(home)


def test_a_submodel_of_another_plan_is_not_offered(home, folder, qwen):
    other = qwen.base.keep_all().model_copy(update={"mode": "other"})
    (folder / PLAN_FILE).write_text(other.model_dump_json())
    with pytest.raises(LayoutMismatch, match=f"of plan {other.digest[:12]}, assigned was"):
        describe(home)


def test_who_may_read_no_data_does_not_offer_to_train(home, folder):
    write_policy(home)
    with pytest.raises(DataError, match="no folder may be read"):
        describe(home)


def test_a_folder_is_whole_until_a_byte_of_it_changes(folder):
    (folder / CONTENTS).unlink()
    assert not is_whole(folder)
    list_contents(folder)
    assert is_whole(folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert not is_whole(folder)
