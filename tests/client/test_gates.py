"""Every gate opens and closes as the policy says, whatever the machine answers."""

import subprocess
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.client.gates import (
    ON_MAINS,
    Machine,
    Need,
    Power,
    ask_network_manager,
    parse_metered,
    read_gates,
    read_power,
    readable_files,
    this_machine,
)
from proxymoe.client.policy import Data, Policy, Resources, When
from proxymoe.common.errors import DataError

NAMES = ["memory", "disk", "load", "battery", "charging", "network", "time"]
READY = Machine(
    free_memory=lambda: 4_000_000_000,
    free_disk=lambda: 9_000_000_000,
    load=lambda: 0.2,
    power=lambda: Power(has_battery=True, battery_percent=80.0, on_mains=True),
    is_metered=lambda: False,
    now=lambda: datetime(2026, 11, 22, 23, 30, tzinfo=UTC),
)


def gate(name, machine=READY, need=None, **when):
    """The state of one gate; all the others are open."""
    gates = {gate.name: gate for gate in read_gates(Policy(when=When(**when)), machine, need)}
    assert [other for other in NAMES if other != name and not gates[other].open] == []
    return gates[name]


def fail():
    raise OSError(5, "Input/output error")


def test_on_a_ready_machine_every_gate_is_open():
    gates = read_gates(Policy(), READY)
    assert [gate.name for gate in gates] == NAMES
    assert all(gate.open for gate in gates)
    assert str(gates[0]) == "memory: open; 4,000 MB free, needs 500 MB"


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("memory", {"free_memory": lambda: 499_999_999}, "500 MB free"),
        ("disk", {"free_disk": lambda: 0}, "0 MB free"),
        ("load", {"load": lambda: 0.71}, "0.71 per core"),
        ("load", {"load": lambda: float("nan")}, "nan per core"),
        ("battery", {"power": lambda: Power(True, 29.0, True)}, "29 %"),
        ("charging", {"power": lambda: Power(True, 90.0, False)}, "on battery"),
        ("network", {"is_metered": lambda: True}, "metered"),
    ],
)
def test_a_machine_that_is_not_ready_closes_one_gate_and_tells_the_value(name, change, told):
    found = gate(name, replace(READY, **change))
    assert not found.open
    assert found.value == told


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("memory", "free_memory"),
        ("disk", "free_disk"),
        ("load", "load"),
        ("network", "is_metered"),
        ("time", "now"),
    ],
)
def test_a_failing_reader_closes_its_gate_with_the_reason(name, reader):
    found = gate(name, replace(READY, **{reader: fail}))
    assert not found.open
    assert found.value == "cannot be read (OSError: [Errno 5] Input/output error)"


def test_a_power_supply_that_cannot_be_read_closes_both_its_gates():
    gates = read_gates(Policy(), replace(READY, power=fail))
    assert [gate.name for gate in gates if not gate.open] == ["battery", "charging"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("network", {"is_metered": lambda: None}),
        ("charging", {"power": lambda: Power(True, 90.0, None)}),
        ("battery", {"power": lambda: Power(True, None, True)}),
    ],
)
def test_what_a_machine_cannot_know_is_open_only_if_the_policy_says_so(name, change):
    machine = replace(READY, **change)
    assert not gate(name, machine).open
    assert gate(name, machine, unknown_is_open=True).open
    assert gate(name, machine).value.startswith("unknown; see when.unknown_is_open")


@pytest.mark.parametrize(
    ("name", "change", "wish"),
    [
        ("network", {"is_metered": lambda: True}, {"only_unmetered": False}),
        ("network", {"is_metered": fail}, {"only_unmetered": False}),
        ("charging", {"power": lambda: Power(True, 90.0, False)}, {"only_charging": False}),
        ("battery", {"power": lambda: Power(True, 1.0, True)}, {"battery_floor_percent": 0}),
    ],
)
def test_a_wish_that_is_switched_off_leaves_its_gate_open(name, change, wish):
    found = gate(name, replace(READY, **change), **wish)
    assert found.open
    assert found.limit == "not asked for"


def test_what_a_job_needs_comes_on_top_of_what_stays_free():
    policy = Policy(resources=Resources(spare_memory_mb=1000, spare_disk_mb=0))
    need = Need(memory_bytes=3_000_000_001, disk_bytes=9_000_000_000)
    memory, disk, *_ = read_gates(policy, READY, need)
    assert not memory.open
    assert disk.open
    assert read_gates(policy, READY, Need(memory_bytes=3_000_000_000))[0].open


def test_our_own_work_is_no_reason_to_stop():
    busy = replace(READY, load=lambda: 1.1)
    assert not gate("load", busy).open
    assert gate("load", busy, Need(own_load=1.0)).open


@given(st.integers(0, 1439), st.integers(0, 1439), st.integers(0, 1440))
def test_a_window_is_open_from_its_start_up_to_its_end_also_across_midnight(now, start, end):
    if start == end:
        return
    clocks = [f"{minute // 60:02d}:{minute % 60:02d}" for minute in (start, end)]
    moment = datetime(2026, 11, 22, now // 60, now % 60, 59, tzinfo=UTC)
    found = gate("time", replace(READY, now=lambda: moment), window="-".join(clocks))
    length = (end - start) % 1440 or 1440
    assert found.open == ((now - start) % 1440 < length)


def supply(folder, **attributes):
    folder.mkdir(parents=True)
    for name, value in attributes.items():
        (folder / name).write_text(f"{value}\n")


BATTERY = {"type": "Battery", "capacity": 57}


@pytest.mark.parametrize(
    ("supplies", "expected"),
    [
        ({}, ON_MAINS),
        ({"AC": {"type": "Mains", "online": 0}}, ON_MAINS),
        ({"mouse": {**BATTERY, "scope": "Device"}}, ON_MAINS),
        ({"BAT0": {**BATTERY, "status": "Discharging"}}, Power(True, 57.0, False)),
        ({"BAT0": {**BATTERY, "status": "Charging"}}, Power(True, 57.0, True)),
        ({"BAT0": {**BATTERY, "status": "Not charging"}}, Power(True, 57.0, True)),
        ({"BAT0": {**BATTERY, "status": "Unknown"}}, Power(True, 57.0, None)),
        ({"BAT0": {"type": "Battery", "status": "Full"}}, Power(True, None, True)),
        (
            {"AC": {"type": "Mains", "online": 0}, "BAT0": {**BATTERY, "status": "Full"}},
            Power(True, 57.0, False),
        ),
        (
            {"usb": {"type": "USB", "online": 1}, "BAT0": {**BATTERY, "status": "Unknown"}},
            Power(True, 57.0, True),
        ),
        (
            {"BAT0": {**BATTERY, "status": "Full"}, "BAT1": {"type": "Battery", "capacity": 3}},
            Power(True, 3.0, True),
        ),
    ],
)
def test_power_supplies_are_read_as_linux_lists_them(tmp_path, supplies, expected):
    for name, attributes in supplies.items():
        supply(tmp_path / name, **attributes)
    assert read_power(tmp_path) == expected


def listing(*devices):
    names = ("GENERAL.STATE", "GENERAL.METERED", "IP4.GATEWAY", "IP6.GATEWAY")
    blocks = ["".join(f"{n}:{v}\n" for n, v in zip(names, d, strict=False)) for d in devices]
    return "\n".join(blocks)


WIFI = ("100 (connected)", "no (guessed)", "192.168.1.1", "")
BRIDGE = ("100 (connected (externally))", "no (guessed)", "", "")


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([], None),
        ([WIFI], False),
        ([WIFI, BRIDGE], False),
        ([BRIDGE], None),
        ([("100 (connected)", "yes (guessed)", "192.168.1.1", "")], True),
        ([WIFI, ("100 (connected)", "yes", "", "")], True),
        ([WIFI, ("30 (disconnected)", "yes", "", "")], False),
        ([("100 (connected)", "unknown", "10.0.0.1", ""), BRIDGE], None),
        ([("100 (connected)", "no", "--", r"fe80\:\:1")], False),
        ([("100 (connected)", "no", "--", "--")], None),
    ],
)
def test_a_network_is_unmetered_only_if_every_way_out_is(devices, expected):
    assert parse_metered(listing(*devices)) is expected


@given(st.text())
def test_whatever_network_manager_says_is_understood_or_unknown(answer):
    assert parse_metered(answer) in (True, False, None)


def program(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_network_manager_is_asked_in_bounded_time(tmp_path):
    answering = program(tmp_path / "answers", f"printf '%s' '{listing(WIFI)}'")
    assert ask_network_manager(answering) is False
    assert ask_network_manager(program(tmp_path / "fails", "exit 8")) is None
    assert ask_network_manager(str(tmp_path / "absent")) is None
    hanging = program(tmp_path / "hangs", "exec sleep 60")
    started = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        ask_network_manager(hanging, seconds=0.1)
    assert time.monotonic() - started < 30
    asked = replace(READY, is_metered=lambda: ask_network_manager(hanging, seconds=0.1))
    assert "TimeoutExpired" in gate("network", asked).value


def test_this_machine_answers_every_question(tmp_path):
    machine = this_machine(tmp_path)
    assert 0 < machine.free_memory() <= psutil.virtual_memory().total
    assert 0 < machine.free_disk() <= psutil.disk_usage("/").total
    assert machine.load() >= 0
    assert machine.now().utcoffset() is not None
    gates = read_gates(Policy(), machine)
    assert [gate.name for gate in gates] == NAMES
    assert not any("cannot be read" in gate.value for gate in gates)


def test_a_store_that_does_not_exist_closes_the_disk_gate(tmp_path):
    disk = read_gates(Policy(), this_machine(tmp_path / "gone"))[1]
    assert not disk.open
    assert "gone" in disk.value


def test_only_files_that_fit_and_lie_in_the_folder_may_be_read(tmp_path):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "notes.txt", "sub/c.jsonl"):
        (folder / name).write_text("{}")
    secret = tmp_path / "secret.jsonl"
    secret.write_text("{}")
    (folder / "link.jsonl").symlink_to(secret)
    (folder / "outside").symlink_to(tmp_path)
    names = [path.name for path in readable_files(Data(folder=folder))]
    assert names == ["a.jsonl", "b.jsonl"]
    deep = readable_files(Data(folder=folder, pattern="**/*.jsonl"))
    assert [path.name for path in deep] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    with pytest.raises(DataError, match="no file fits outside"):
        readable_files(Data(folder=folder, pattern="outside/*.jsonl"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (Data(), "no folder may be read; name one as data.folder"),
        (Data(folder=Path("/nowhere/at/all")), "cannot be read"),
        (Data(folder=Path(__file__).parent, pattern="a**b"), "cannot be read|no file fits"),
        (Data(folder=Path(__file__).parent, pattern="*.nothing"), "no file fits"),
    ],
)
def test_without_files_to_read_the_reason_is_told(data, reason):
    with pytest.raises(DataError, match=reason):
        readable_files(data)
