"""Keeps libraries to themselves: nothing phones home, looks for updates, or installs anything.

Most of them read the environment once, when they are imported. So a command line goes offline
before it imports anything else, and what it starts inherits that.
"""

import os
from collections.abc import Mapping
from pathlib import Path

OFFLINE = {
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
LOOPBACK = "127.0.0.1"


def go_offline(**more: str) -> None:
    """Sets these variables, and `more`, where the environment does not say otherwise."""
    for name, value in (OFFLINE | more).items():
        os.environ.setdefault(name, value)


def flower_environment(home: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """What every Flower process needs in its environment, beside `inherited`.

    Nothing calls home or installs anything, Flower's files are in `home`, and what is said on
    loopback takes no proxy.
    """
    direct = [inherited.get(name) for name in ("NO_PROXY", "no_proxy")]
    no_proxy = ",".join(filter(None, [*direct, LOOPBACK]))
    return {
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
    }
