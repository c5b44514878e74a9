"""Process edge: Flower's SuperNode, as a process that ends when it has stopped to work.

`flower-supernode` can return and yet not leave, and it leaves with the same code for reasons that
pass and for reasons that stay. Here every end is an exit whose code tells a supervisor what to
do. A device that comes back at once finds its old session still alive at the coordinator, for up
to a minute, and is refused: then the process starts itself anew until that has lapsed.
"""

import importlib.metadata
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from proxymoe.common.addresses import is_loopback, split_address
from proxymoe.common.errors import ConfigError
from proxymoe.common.offline import LOOPBACK

FLOWER = "1.41"
"""The minor version of flwr that a device runs with."""
AGAIN, REFUSED, MISCONFIGURED = 75, 77, 78
"""Exit codes, as in sysexits.h: start it again; the coordinator does not want this device; it
cannot start like this. An end that was asked for is an AGAIN, too: who asked knows better."""
LAPSE_SECONDS = 10.0
"""Between two starts while the coordinator refuses."""
MAX_REFUSALS = 8
"""Refusals in a row that an old session can explain; it lapses 60 s after its last heartbeat."""
REFUSALS = "PROXYMOE_NODE_REFUSALS"
"""Environment variable of a process that started itself anew: how often it has been refused."""

EXIT = re.compile(r"Exit Code: (\d+)")
ACTIVATION_REFUSED = "[code: 2004]"
SETTINGS = {302, 303, 304, 401, 600, 602, 603, 604, 605, 606}
"""Flower's exit codes for keys, certificates, files, addresses and versions that do not do."""
USAGE = 2
"""Exit code of a command line that cannot be parsed."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """How the SuperNode of a device is started."""

    coordinator: str
    """host:port of the coordinator's gateway."""
    runtime_port: int
    """Port on loopback for the runner."""
    secret: Path
    """File with the secret that SuperNode and runner share."""
    authority: Path | None
    """PEM file of the coordinator's CA; None for plain text, on loopback only."""
    key: Path | None
    """The device's private key in OpenSSH's format; None, with plain text, for a node unknown."""


def require_flower(version: str | None = None) -> None:
    """Returns if `version`, by default the installed one, is of flwr's minor version FLOWER.

    Raises:
        ConfigError: it is of another one.
    """
    version = version or importlib.metadata.version("flwr")
    if version.split(".")[:2] != FLOWER.split("."):
        raise ConfigError(
            f"flwr {version} is installed, but a device runs with flwr {FLOWER} only: "
            f"pip install 'flwr=={FLOWER}.*'"
        )


def command(settings: NodeSettings) -> tuple[str, ...]:
    """The command line of a device's SuperNode.

    Raises:
        ConfigError: plain text to another machine, or an address or a port that is none.
    """
    host, _ = split_address(settings.coordinator)
    if not 0 < settings.runtime_port < 1 << 16:
        raise ConfigError(f"port {settings.runtime_port}: write one from 1 to 65535")
    flags = ["--isolation", "process", "--superlink", settings.coordinator]
    flags += ["--host", LOOPBACK, "--port", str(settings.runtime_port)]
    flags += ["--superexec-auth-secret-file", str(settings.secret)]
    if settings.authority and settings.key:
        flags += ["--root-certificates", str(settings.authority)]
        flags += ["--auth-supernode-private-key", str(settings.key)]
    elif settings.authority or settings.key:
        raise ConfigError("a device's key and its coordinator's CA go together; enrol again")
    elif not is_loopback(host):
        raise ConfigError(f"plain text to {host}: it is for loopback only; enrol, and use TLS")
    else:
        flags += ["--insecure"]
    return (sys.executable, "-P", "-m", "proxymoe.client.node", *flags)


def exit_code(code: object, told: str) -> int:
    """AGAIN, REFUSED or MISCONFIGURED, by how Flower ended.

    Args:
        code: what it wanted to exit with; None if it returned.
        told: the last that it said about an exit code of its own, "" if it said nothing.
    """
    if found := EXIT.match(told):
        if ACTIVATION_REFUSED in told:
            return REFUSED
        return MISCONFIGURED if int(found[1]) in SETTINGS else AGAIN
    return MISCONFIGURED if code == USAGE else AGAIN


def keep(supernode: Callable[[], object]) -> NoReturn:
    """Runs a SuperNode in this process, and ends the process with it, whatever it leaves behind."""
    said = _LastWords()
    logging.getLogger("flwr").addHandler(said)
    code: object = None
    try:
        supernode()
    except SystemExit as end:
        code = end.code
    except BaseException:
        log.exception("the SuperNode broke")
    refusals = int(os.environ.get(REFUSALS, "0")) + 1
    ending = exit_code(code, said.words)
    sys.stdout.flush()
    sys.stderr.flush()
    if ending == REFUSED and refusals <= MAX_REFUSALS:
        # Flower has set a timer to kill this process image, but not the one that follows.
        os.environ[REFUSALS] = str(refusals)
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606  the very command line that we are
    os._exit(ending)


def main() -> NoReturn:
    """`python -m proxymoe.client.node`, with the arguments of `flower-supernode`."""
    if REFUSALS in os.environ:
        time.sleep(LAPSE_SECONDS)  # before Flower is imported: who waits needs little memory
    require_flower()
    sys.argv[0] = "flower-supernode"
    (script,) = importlib.metadata.entry_points(group="console_scripts", name=sys.argv[0])
    keep(script.load())


class _LastWords(logging.Handler):
    """Keeps what Flower said last about its exit code."""

    words = ""

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        self.words = said if EXIT.match(said) else self.words


if __name__ == "__main__":
    main()
