"""Process edge: Flower's own programs, as a coordinator uses them.

Only public commands, with their JSON output. The SuperLink listens on loopback, keeps its state in
a database, and starts nothing itself: a SuperExec beside it starts our ServerApp, so that a run
survives the death of the SuperLink. Its operators' API asks nobody who they are; that is why none
but this machine may reach it.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proxymoe.common.files import write_bytes
from proxymoe.common.identity import ssh_public_key
from proxymoe.common.offline import LOOPBACK, flower_environment
from proxymoe.server.run_directory import RunDirectory

COORDINATOR = "PROXYMOE_COORDINATOR"
"""Environment variable that tells the ServerApp its run directory."""
CONNECTION = "coordinator"
"""What Flower's commands call our SuperLink."""
BUNDLE = Path(__file__).parent / "bundle"
SCRIPTS = Path(sysconfig.get_path("scripts"))
ANSWER_SECONDS = 120.0
"""A command takes seconds, most of them to start; on a busy machine a dozen."""
NOT_RUNNING, KEY_IN_USE, NO_SUCH_NODE = "[code: 18]", "[code: 23]", "[code: 24]"
"""What the SuperLink says of a run that is over, of a key it knows, and of a node it does not."""


class SuperLinkError(OSError):
    """The SuperLink cannot be asked now, or answers other than it should."""


def environment(run: RunDirectory, inherited: Mapping[str, str]) -> dict[str, str]:
    """See `flower_environment`; Flower's programs are found, too, and print for files."""
    return flower_environment(run.flower, inherited) | {
        "PATH": os.pathsep.join(filter(None, [str(SCRIPTS), inherited.get("PATH")])),
        "PYTHONUNBUFFERED": "1",
        "TERM": "dumb",  # colours are for people, not for log files and JSON
        "FORCE_COLOR": "",
    }


def superlink_address(run: RunDirectory) -> str:
    """host:port of the SuperLink."""
    return f"{LOOPBACK}:{run.settings.network.superlink_port}"


def superlink_command(run: RunDirectory) -> tuple[str, ...]:
    """The command line of the SuperLink."""
    return (
        *_program("flower-superlink"),
        *("--host", LOOPBACK, "--port", str(run.settings.network.superlink_port)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(run.superexec_secret)),
        *("--database", str(run.flower / "superlink.db")),
        *("--ssl-ca-certfile", str(run.ca_certificate)),
        *("--ssl-certfile", str(run.server_certificate), "--ssl-keyfile", str(run.server_key)),
        *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
    )


def superexec_command(run: RunDirectory) -> tuple[str, ...]:
    """The command line of the SuperExec; it needs COORDINATOR in its environment."""
    return (
        *_program("flower-superexec"),
        *("--runtime-api-address", superlink_address(run)),
        *("--root-certificates", str(run.ca_certificate)),
        *("--superexec-auth-secret-file", str(run.superexec_secret)),
    )


def write_connection(run: RunDirectory) -> None:
    """Tells Flower's commands where the SuperLink is."""
    values = (CONNECTION, superlink_address(run), str(run.ca_certificate))
    name, address, authority = map(json.dumps, values)  # as TOML writes them
    write_bytes(
        run.flower / "config.toml",
        f"[superlink]\ndefault = {name}\n\n[superlink.{CONNECTION}]\n"
        f"address = {address}\nroot-certificates = {authority}\n".encode(),
    )


class SuperLink:
    """The running SuperLink, asked by Flower's commands; each of them takes seconds.

    Every method raises SuperLinkError, an OSError, if it cannot be asked now.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run

    def register(self, device: str, public_key: bytes) -> int | None:
        """The new node of a device with this PEM key; None if the SuperLink knows the key."""
        with tempfile.NamedTemporaryFile(suffix=".pub") as file:
            file.write(ssh_public_key(public_key))
            file.flush()
            asked = ("supernode", "register", file.name, CONNECTION, "--name", device)
            answer = self._ask(*asked, tolerated=KEY_IN_USE)
        return None if answer is None else _number(answer, "node-id")

    def unregister(self, node: int) -> None:
        """Forgets a node for good; its key can never be registered again."""
        self._ask("supernode", "unregister", str(node), CONNECTION, tolerated=NO_SUCH_NODE)

    def start_run(self) -> int:
        """Starts a run of our bundle, and returns its number; the ServerApp follows in seconds."""
        return _number(self._ask("run", str(BUNDLE), CONNECTION) or {}, "run-id")

    def unfinished_runs(self) -> list[int]:
        """Runs that Flower thinks are going on, dead ones too."""
        runs = (self._ask("list", CONNECTION) or {}).get("runs", [])
        return [_number(run, "run-id") for run in runs if not _over(run)]

    def stop_run(self, number: int) -> None:
        """Ends a run, also one whose ServerApp is dead; one that is over already is fine."""
        self._ask("stop", str(number), CONNECTION, tolerated=NOT_RUNNING)

    def _ask(self, *arguments: str, tolerated: str | None = None) -> dict[str, Any] | None:
        """What a command answers; None if it refuses with the `tolerated` code."""
        what = f"flwr {arguments[0]}"
        command = [*_program("flwr"), *arguments, "--format", "json"]
        try:
            done = subprocess.run(  # noqa: S603  our own program, and arguments stay arguments
                command,
                check=False,
                capture_output=True,
                env={**os.environ, **environment(self._run, os.environ)},
                stdin=subprocess.DEVNULL,
                timeout=ANSWER_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise SuperLinkError(f"{what}: no answer within {ANSWER_SECONDS:.0f} s") from None
        return _answer(what, done.stdout, done.stderr, tolerated)


def _answer(what: str, said: bytes, trouble: bytes, tolerated: str | None) -> dict[str, Any] | None:
    try:
        answer: dict[str, Any] = json.loads(said)
        succeeded = answer["success"]
    except (ValueError, TypeError, KeyError):
        words = " ".join((said + b" " + trouble).decode(errors="replace").split())
        raise SuperLinkError(f"{what}: no JSON, but {words[-300:]!r}") from None
    if succeeded:
        return answer
    reason = " ".join(str(answer.get("error-message", "no reason")).split())
    if tolerated and tolerated in reason:
        return None
    raise SuperLinkError(f"{what}: {reason[-300:]}")


def _number(answer: Mapping[str, Any], key: str) -> int:
    try:
        return int(answer[key])
    except (KeyError, TypeError, ValueError):
        raise SuperLinkError(f"no {key} in the answer {str(answer)[:300]!r}") from None


def _over(run: Mapping[str, Any]) -> bool:
    return str(run.get("status")).startswith("finished")


def _program(name: str) -> Sequence[str]:
    """How one of Flower's programs is started; not by its script, whose first line may be too long.

    The interpreter is ours, so that the programs are those that were installed with us.
    """
    return (sys.executable, "-P", str(SCRIPTS / name))
