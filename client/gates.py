"""Edge to the machine: may it be used now, as its owner's policy wants, and which files be read?

Each gate compares one reading of the machine with the policy. Nothing here raises but
`readable_files`: a gate whose reading fails is closed and says why, and what this machine cannot
know (is the network metered?) is open or closed as the policy says. A policy's wish that is
switched off leaves its gate open.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, time
from functools import partial
from pathlib import Path

import psutil

from proxymoe.client.policy import MB, Data, Policy
from proxymoe.common.errors import DataError

SUPPLIES = Path("/sys/class/power_supply")
NMCLI_SECONDS = 2.0
"""How long NetworkManager may take to answer."""
UNKNOWN = "unknown; see when.unknown_is_open in the policy"
CONNECTED = "100"
"""NetworkManager's number for a device that is in use."""


@dataclass(frozen=True, slots=True)
class GateState:
    """One gate, as `status` shows it; `value` and `limit` carry their units."""

    name: str
    open: bool
    value: str
    limit: str

    def __str__(self) -> str:
        return f"{self.name}: {'open' if self.open else 'closed'}; {self.value}, {self.limit}"


@dataclass(frozen=True, slots=True)
class Power:
    """What a machine runs on; None is unknown."""

    has_battery: bool
    battery_percent: float | None
    """Charge of the emptiest battery."""
    on_mains: bool | None


ON_MAINS = Power(False, None, True)
"""A machine without a battery."""


@dataclass(frozen=True, slots=True)
class Machine:
    """How the machine is read; every reading may raise."""

    free_memory: Callable[[], int]
    """Bytes that can be had without swapping."""
    free_disk: Callable[[], int]
    """Bytes free where models are stored."""
    load: Callable[[], float]
    """Load average over one minute, per core."""
    power: Callable[[], Power]
    is_metered: Callable[[], bool | None]
    """Whether a connected network is paid for by volume; None if unknown."""
    now: Callable[[], datetime]
    """Local time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a job is about to take, or takes already, of the machine."""

    memory_bytes: int = 0
    """Still to come: nothing, once the job has its memory."""
    disk_bytes: int = 0
    own_load: float = 0.0
    """Threads that we keep busy ourselves, per core; they are not held against us."""


def this_machine(store: Path) -> Machine:
    """The readers of this machine; `store` is a folder on the disk that models go to."""
    return Machine(
        free_memory=lambda: psutil.virtual_memory().available,
        free_disk=lambda: psutil.disk_usage(str(store)).free,
        load=lambda: psutil.getloadavg()[0] / (psutil.cpu_count() or 1),
        power=read_power,
        is_metered=ask_network_manager,
        now=lambda: datetime.now().astimezone(),
    )


def read_gates(policy: Policy, machine: Machine, need: Need | None = None) -> list[GateState]:
    """The state of every gate; the machine may be used while all are open."""
    need, when, resources = need or Need(), policy.when, policy.resources
    memory = need.memory_bytes + resources.spare_memory_mb * MB
    disk = need.disk_bytes + resources.spare_disk_mb * MB
    floor = when.battery_floor_percent
    return [
        _gate("memory", f"needs {_mb(memory)}", partial(_space, machine.free_memory, memory)),
        _gate("disk", f"needs {_mb(disk)}", partial(_space, machine.free_disk, disk)),
        _gate(
            "load",
            f"up to {when.largest_load:g} per core",
            lambda: _load(machine.load() - need.own_load, when.largest_load),
        ),
        _gate(
            "battery",
            f"at least {floor} %",
            lambda: _battery(machine.power(), floor, when.unknown_is_open),
            wanted=floor > 0,
        ),
        _gate(
            "charging",
            "only on mains power",
            lambda: _fact(machine.power().on_mains, True, "on mains power", "on battery", policy),
            wanted=when.only_charging,
        ),
        _gate(
            "network",
            "only unmetered",
            lambda: _fact(machine.is_metered(), False, "metered", "unmetered", policy),
            wanted=when.only_unmetered,
        ),
        _gate("time", f"within {when.window}", lambda: _time(machine.now().time(), when.window)),
    ]


def _gate(
    name: str, limit: str, read: Callable[[], tuple[bool, str]], *, wanted: bool = True
) -> GateState:
    try:
        is_open, value = read()
    except Exception as error:  # noqa: BLE001  whatever fails, the gate closes and tells
        is_open, value = False, f"cannot be read ({type(error).__name__}: {error})"
    return GateState(name, is_open or not wanted, value, limit if wanted else "not asked for")


def _space(read: Callable[[], int], needed: int) -> tuple[bool, str]:
    free = read()
    return free >= needed, f"{_mb(free)} free"


def _load(load: float, limit: float) -> tuple[bool, str]:
    return load <= limit, f"{max(load, 0.0):.2f} per core"


def _battery(power: Power, floor: int, unknown_is_open: bool) -> tuple[bool, str]:
    if not power.has_battery:
        return True, "no battery"
    if power.battery_percent is None:
        return unknown_is_open, UNKNOWN
    return power.battery_percent >= floor, f"{power.battery_percent:.0f} %"


def _fact(found: bool | None, wanted: bool, yes: str, no: str, policy: Policy) -> tuple[bool, str]:
    if found is None:
        return policy.when.unknown_is_open, UNKNOWN
    return found is wanted, yes if found else no


def _time(now: time, window: str) -> tuple[bool, str]:
    start, end = (60 * int(clock[:2]) + int(clock[3:]) for clock in window.split("-"))
    minute = 60 * now.hour + now.minute
    inside = start <= minute < end if start < end else not end <= minute < start
    return inside, f"{now:%H:%M}"


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / MB:,.0f} MB"


def read_power(supplies: Path = SUPPLIES) -> Power:
    """What Linux knows of this machine's power supplies; elsewhere, what psutil knows.

    Batteries of mice and headsets, which power themselves only, do not count.
    """
    if not supplies.is_dir():
        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
        return Power(True, battery.percent, battery.power_plugged) if battery else ON_MAINS
    found = [_attributes(folder) for folder in sorted(supplies.iterdir())]
    system = [supply for supply in found if supply["scope"] != "Device"]
    batteries = [supply for supply in system if supply["type"] in ("Battery", "UPS")]
    if not batteries:
        return ON_MAINS
    charges = [float(supply["capacity"]) for supply in batteries if supply["capacity"]]
    lines = {supply["online"] for supply in system if supply not in batteries}
    states = {supply["status"] for supply in batteries}
    on_mains = None
    if "1" in lines or "Charging" in states:
        on_mains = True
    elif "0" in lines or "Discharging" in states:
        on_mains = False
    elif states & {"Full", "Not charging"}:
        on_mains = True
    percent = min(charges) if len(charges) == len(batteries) else None
    return Power(True, percent, on_mains)


def _attributes(supply: Path) -> dict[str, str]:
    """Attributes of one power supply; empty where it has none, or the driver does not answer."""

    def read(name: str) -> str:
        try:
            return (supply / name).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return ""

    return {name: read(name) for name in ("type", "scope", "capacity", "status", "online")}


def ask_network_manager(command: str = "nmcli", seconds: float = NMCLI_SECONDS) -> bool | None:
    """Whether NetworkManager takes a connected network for metered; None if it cannot be asked.

    Raises:
        subprocess.TimeoutExpired: it did not answer in time.
    """
    program = shutil.which(command)
    if program is None:
        return None
    fields = "GENERAL.STATE,GENERAL.METERED,IP4.GATEWAY,IP6.GATEWAY"
    answer = subprocess.run(  # noqa: S603  a fixed command; nothing in it comes from outside
        [program, "-t", "-f", fields, "device", "show"],
        capture_output=True,
        check=False,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "LC_ALL": "C"},
        timeout=seconds,
    )
    return parse_metered(answer.stdout) if answer.returncode == 0 else None


def parse_metered(answer: str) -> bool | None:
    """What nmcli's device listing says: metered, unmetered, or unknown.

    One connected metered device is enough for a yes. For a no, every connected device that leads
    to other networks must be unmetered, and there must be one: bridges and the like always are.
    """
    gateways = []
    for device in _devices(answer):
        if device.get("GENERAL.STATE", "").split(" ")[0] != CONNECTED:
            continue
        metered = device.get("GENERAL.METERED", "").split(" ")[0]  # "no (guessed)" is a no
        if metered == "yes":
            return True
        if device.get("IP4.GATEWAY") or device.get("IP6.GATEWAY"):
            gateways.append(metered)
    return False if gateways and set(gateways) == {"no"} else None


def _devices(answer: str) -> Iterator[dict[str, str]]:
    """The devices of a listing in nmcli's terse form: lines name:value, each from its state on."""
    device: dict[str, str] = {}
    for line in answer.splitlines():
        name, _, value = line.partition(":")
        if name == "GENERAL.STATE" and device:
            yield device
            device = {}
        device[name] = "" if value == "--" else value
    yield device


def readable_files(data: Data) -> list[Path]:
    """The files that may be read, sorted; links that lead out of the folder are left out.

    Raises:
        DataError: no folder is allowed, it cannot be read, or no file fits.
    """
    if data.folder is None:
        raise DataError("no folder may be read; name one as data.folder in the policy")
    try:
        root = data.folder.resolve(strict=True)
        found = [path for path in sorted(root.glob(data.pattern)) if path.is_file()]
        inside = [path for path in found if path.resolve(strict=True).is_relative_to(root)]
    except (OSError, ValueError) as error:
        raise DataError(f"{data.folder}: {data.pattern} cannot be read ({error})") from error
    if not inside:
        raise DataError(f"{data.folder}: no file fits {data.pattern}; see [data] in the policy")
    return inside
