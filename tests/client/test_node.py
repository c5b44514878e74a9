"""The SuperNode's command line, its environment, and the codes its process ends with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.client.node import (
    AGAIN,
    FLOWER,
    MAX_REFUSALS,
    MISCONFIGURED,
    REFUSALS,
    REFUSED,
    NodeSettings,
    command,
    exit_code,
    require_flower,
)
from proxymoe.common.addresses import is_loopback
from proxymoe.common.errors import ConfigError
from proxymoe.common.offline import flower_environment

SECRET, CA, KEY = Path("/d/secret"), Path("/d/ca.pem"), Path("/d/key")
PLAIN = NodeSettings("127.0.0.1:8000", 9094, SECRET, None, None)


def test_a_device_speaks_tls_with_its_key_and_the_runner_on_loopback():
    words = command(NodeSettings("moe.example:8443", 9094, SECRET, CA, KEY))
    assert words[:4] == (sys.executable, "-P", "-m", "proxymoe.client.node")
    flags = dict(zip(words[4::2], words[5::2], strict=True))
    assert flags == {
        "--isolation": "process",
        "--superlink": "moe.example:8443",
        "--host": "127.0.0.1",
        "--port": "9094",
        "--superexec-auth-secret-file": "/d/secret",
        "--root-certificates": "/d/ca.pem",
        "--auth-supernode-private-key": "/d/key",
    }


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "[::1]:8000", "localhost:8000"])
def test_plain_text_is_for_loopback(address):
    words = command(NodeSettings(address, 9094, SECRET, None, None))
    assert words[-1] == "--insecure"
    assert "--root-certificates" not in words


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (NodeSettings("moe.example:1", 9094, SECRET, None, None), "plain text to moe.example"),
        (NodeSettings("10.0.0.1:1", 9094, SECRET, None, None), "plain text to 10.0.0.1"),
        (NodeSettings("moe.example:1", 9094, SECRET, CA, None), "go together"),
        (NodeSettings("127.0.0.1:1", 9094, SECRET, None, KEY), "go together"),
        (NodeSettings("moe.example", 9094, SECRET, CA, KEY), "'moe.example': write host:port"),
        (NodeSettings("127.0.0.1:1", 0, SECRET, None, None), "port 0"),
        (NodeSettings("127.0.0.1:1", 1 << 16, SECRET, None, None), "port 65536"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        command(settings)


def test_a_name_is_not_loopback_because_it_looks_so():
    assert not is_loopback("localhost.example")
    assert not is_loopback("127.0.0.1.example")


def test_nothing_calls_home_and_loopback_takes_no_proxy():
    added = flower_environment(
        Path("/d/flower"), {"NO_PROXY": "intern", "HTTP_PROXY": "http://proxy:1"}
    )
    assert added["FLWR_TELEMETRY_ENABLED"] == "0"
    assert added["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert added["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert added["FLWR_HOME"] == "/d/flower"
    assert added["NO_PROXY"] == added["no_proxy"] == "intern,127.0.0.1"
    assert flower_environment(Path("/d"), {})["NO_PROXY"] == "127.0.0.1"


@pytest.mark.parametrize("version", [f"{FLOWER}.0", f"{FLOWER}.7", f"{FLOWER}.dev1"])
def test_any_release_of_the_minor_version_will_do(version):
    require_flower(version)


@pytest.mark.parametrize("version", ["1.40.9", "1.42.0", "1.410.0", "2.41.0", "1", ""])
def test_another_minor_version_is_refused_by_name_with_the_remedy(version):
    with pytest.raises(ConfigError, match=r"flwr .*installed.*pip install 'flwr==1\.41\.\*'"):
        require_flower(version or "0")


def test_the_installed_version_will_do():
    require_flower()


@pytest.mark.parametrize(
    ("code", "told", "expected"),
    [
        (None, "", AGAIN),  # its loop returned
        (0, "", AGAIN),  # it interrupted itself
        (1, "Exit Code: 305\nFailed to initialize\n[code: 2004] no", REFUSED),
        (1, "Exit Code: 305\nFailed to initialize\ncertificate verify failed", AGAIN),
        (1, "Exit Code: 302\nUnable to parse the private key file.", MISCONFIGURED),
        (1, "Exit Code: 604\nNo such file", MISCONFIGURED),
        (2, "", MISCONFIGURED),  # argparse
    ],
)
def test_an_end_tells_the_supervisor_what_to_do(code, told, expected):
    assert exit_code(code, told) == expected


@given(st.none() | st.integers() | st.text(), st.text() | st.text().map("Exit Code: 1".__add__))
def test_every_end_has_a_code_that_is_not_success(code, told):
    assert exit_code(code, told) in (AGAIN, REFUSED, MISCONFIGURED)


PROCESS = """
import logging, os, sys, threading, time
from proxymoe.client.node import keep

def lingers():
    threading.Thread(target=time.sleep, args=[3600]).start()

def breaks():
    raise RuntimeError("a 500")

def wrong():
    logging.getLogger("flwr").error("Exit Code: 302")
    logging.getLogger("flwr").error("and more")
    sys.exit(1)

def refused():
    print("try", flush=True)
    logging.getLogger("flwr").error("%s", "Exit Code: 305; [code: 2004]")
    sys.exit(1)

keep(globals()[sys.argv[1]])
"""


@pytest.mark.parametrize(
    ("end", "code", "tries"),
    [
        ("lingers", AGAIN, 0),
        ("breaks", AGAIN, 0),
        ("wrong", MISCONFIGURED, 0),
        ("refused", REFUSED, 3),
    ],
)
def test_the_process_ends_with_its_supernode_and_starts_anew_while_it_is_refused(end, code, tries):
    refused_before = str(MAX_REFUSALS + 1 - max(tries, 1))
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, end],
        env={**os.environ, REFUSALS: refused_before},
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.split() == ["try"] * tries
