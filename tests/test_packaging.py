"""The systemd unit: accepted by systemd, locked down, and of the command that is installed."""

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from proxymoe.client.cli import app, join
from proxymoe.client.service import HOME

UNIT = Path(__file__).parent.parent / "packaging" / "proxymoe-device.service"
COMMAND = "/opt/proxymoe/bin/proxymoe-device"


@pytest.fixture
def settings():
    """{key: its values, in order}."""
    found = defaultdict(list)
    for line in UNIT.read_text().splitlines():
        if match := re.fullmatch(r"(\w+)=(.*)", line):
            found[match[1]].append(match[2])
    return found


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_systemd_finds_nothing_wrong_with_it(tmp_path):
    unit = tmp_path / UNIT.name
    here = {COMMAND: "/bin/true", "=proxymoe\n": "=root\n"}  # neither is installed on this machine
    text = UNIT.read_text()
    for name, stand_in in here.items():
        text = text.replace(name, stand_in)
    unit.write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_runs_as_a_user_of_its_own_in_a_home_of_its_own(settings):
    assert settings["User"] == settings["Group"] == settings["StateDirectory"] == ["proxymoe"]
    assert settings["StateDirectoryMode"] == ["0700"]
    assert f"{HOME}=/var/lib/proxymoe" in settings["Environment"]
    assert settings["ReadWritePaths"] == ["/var/lib/proxymoe"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("NoNewPrivileges", "yes"),
        ("PrivateTmp", "yes"),
        ("ProtectSystem", "strict"),
        ("ProtectHome", "tmpfs"),
        ("CapabilityBoundingSet", ""),
        ("RestrictAddressFamilies", "AF_INET AF_INET6 AF_UNIX AF_NETLINK"),
        ("SystemCallFilter", "@system-service"),
        ("MemoryMax", "3G"),
    ],
)
def test_it_is_locked_down(settings, key, value):
    assert settings[key][0] == value


def test_what_python_and_torch_need_stays_open(settings):
    assert not {"MemoryDenyWriteExecute", "ProcSubset"} & set(settings)


def test_it_starts_a_command_that_there_is(settings):
    (command,) = settings["ExecStart"]
    verbs = [entry.callback for entry in app.registered_commands]
    assert join in verbs
    assert command == f"{COMMAND} join"
