"""What a device tells its owner about itself, as plain data."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from proxymoe.client.gates import Need, read_gates, this_machine
from proxymoe.client.home import Home
from proxymoe.client.policy import MB, Policy, Usage
from proxymoe.client.records import Records
from proxymoe.common.supervise import STATE

LAST_REFUSALS = 5


def status_of(home: Home, now: float) -> dict[str, Any]:
    """Who the device is, what it holds, whether it may work now, and what it has used up.

    Args:
        now: unix seconds.

    Raises:
        ConfigError: not enrolled, or the policy file is wrong.
        ProxyMoEError: another file of the home cannot be read.
    """
    record, policy, assignment = home.enrolled(), home.policy(), home.assignment()
    running = processes(home.log / STATE)
    memory = home.peak() or (assignment.memory_bytes if assignment else 0)
    gates = read_gates(policy, this_machine(home.path), Need(memory_bytes=memory))
    return {
        "device": record.device,
        "home": str(home.path),
        "coordinator": record.coordinator,
        "public_key": record.public_key,
        "assignment": assignment.model_dump(mode="json") if assignment else None,
        "is_fetched": assignment is not None and home.submodel(assignment.plan).is_dir(),
        "has_personal_adapter": home.personal_adapter.exists(),
        "gates": [asdict(gate) for gate in gates],
        "used": _used(policy, home.usage(now)),
        "peers": Records(home.records_file).peers() if home.records_file.exists() else {},
        "processes": running,
        "refusals": _refusals(home.refusals),
    }


def processes(state: Path) -> dict[str, dict[str, Any]]:
    """The supervisor's children as it last wrote them down, as far as they still run."""
    try:
        children: dict[str, dict[str, Any]] = json.loads(state.read_bytes())
    except (OSError, ValueError):
        return {}
    started = {name: child for name, child in children.items() if child["pid"] is not None}
    return {name: child for name, child in started.items() if psutil.pid_exists(child["pid"])}


def _used(policy: Policy, used: Usage) -> dict[str, dict[str, float]]:
    """{policy key: what is used up of it, and the limit}."""
    resources = policy.resources
    amounts = {
        "resources.network_mb_per_month": (
            used.network_bytes / MB,
            resources.network_mb_per_month,
        ),
        "resources.seconds_per_day": (used.seconds, resources.seconds_per_day),
        "privacy.largest_epsilon": (used.epsilon, policy.privacy.largest_epsilon),
    }
    return {key: {"used": before, "limit": limit} for key, (before, limit) in amounts.items()}


def _refusals(path: Path) -> list[Any]:
    """What was refused last, the newest first."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [json.loads(line) for line in reversed(lines[-LAST_REFUSALS:])]
