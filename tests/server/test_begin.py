"""Settings of a new coordinator: options over file over defaults; see also test_cli."""

from pathlib import Path

import pytest

from proxymoe.common.errors import ConfigError
from proxymoe.server.begin import settings_of
from proxymoe.simulations.site import asset

MODEL, TEXT = asset("tiny-moe"), asset("calibration")


def test_options_win_over_the_file(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('run = "file"\nseed = 3\n[network]\ngateway_port = 1234\nnames = ["a.eu"]\n')
    settings = settings_of(path, MODEL, TEXT, "option", ("b.eu",))
    assert (settings.run, settings.seed, settings.network.gateway_port) == ("option", 3, 1234)
    assert settings.network.names == ("b.eu", "localhost", "127.0.0.1")


def test_a_run_without_a_name_is_called_like_its_base_model():
    assert settings_of(None, MODEL, TEXT, None, ()).run == MODEL.name


def test_paths_that_were_given_are_kept_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(MODEL.parent)
    settings = settings_of(None, MODEL.relative_to(MODEL.parent), TEXT, None, ())
    assert settings.base_model == Path.cwd() / MODEL.name


@pytest.mark.parametrize("text", ["run = ", "\xff"])
def test_what_is_no_toml_is_refused(tmp_path, text):
    path = tmp_path / "c.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="not TOML"):
        settings_of(path, MODEL, TEXT, None, ())
