"""Levels 1 and 2 where answers are sealed: coordinators die, envelopes are damaged or moved.

In every round one device's envelope goes through a fault, on its way or on a device that lies. Who
comes after a coordinator that was killed has other round keys, and asks those who are missing.
"""

from functools import partial

import numpy as np

from proxymoe.common.messages import decode
from proxymoe.common.round_keys import RoundKeys
from proxymoe.common.sealing import seal
from proxymoe.server.engine import Receipt
from proxymoe.simulations.faults.cohort import honest
from proxymoe.simulations.faults.law import other
from proxymoe.simulations.faults.messages import (
    LEVEL,
    Fault,
    Sight,
    impostor,
    instead,
    strike,
    twice,
)
from proxymoe.simulations.faults.report import Scenario
from proxymoe.simulations.faults.rounds import HELD, killed_at_transitions
from proxymoe.simulations.faults.rounds import LEVEL as ROUNDS
from proxymoe.simulations.faults.sealed import SECONDS, SealingDevices


def _damaged(sight: Sight) -> bytes:
    """One bit is another."""
    changed = bytearray(sight.reply)
    changed[sight.rng.integers(len(changed))] ^= 1 << int(sight.rng.integers(8))
    return bytes(changed)


def _before(sight: Sight) -> bytes:
    """What was sent in the round before; at first, half of what is sent now."""
    return sight.before[1] if sight.before else sight.reply[: len(sight.reply) // 2]


def _for_others(sight: Sight) -> bytes:
    """It is sealed to keys that are not those of the round."""
    task, _ = decode(sight.task)
    keys = RoundKeys.new(task.run, task.round, 0, 0.0, SECONDS)
    assert isinstance(sight.devices, SealingDevices)
    return seal(
        honest(sight.task),
        keys.offer,
        sight.devices.private[sight.name],
        device=task.device,
        base=task.base,
        plan=task.plan,
        mode="plain",
    )


def _lie(sight: Sight) -> bytes:
    """A lie in an envelope is still one."""
    return sight.sent(honest(sight.task, lambda update: update * np.float32(np.nan)))


def _scenario(fault: str, checked: str, *faults: Fault) -> Scenario:
    inject = partial(strike, faults, devices_of=SealingDevices)
    return Scenario(LEVEL, f"envelope {fault}", f"{checked}; commit is the mean", inject)


SCENARIOS = (
    _scenario(
        "damaged, cut, missing or for other keys",
        "refused",
        instead(_damaged),
        instead(lambda sight: sight.reply[:-1]),
        instead(lambda sight: honest(sight.task)),
        instead(_for_others),
    ),
    _scenario("of the round before, replayed", "refused", instead(_before)),
    _scenario("under a stolen name", "refused, honest one counts", Fault(impostor)),
    _scenario("with a lie in it", "refused", instead(_lie)),
    _scenario(
        "twice, the same or another",
        "counted once, the other on record",
        twice(Receipt.DUPLICATE, lambda sight: sight.reply),
        twice(Receipt.CONFLICT, lambda sight: sight.sent(other(sight.task))),
    ),
    Scenario(
        ROUNDS,
        "coordinator of sealed rounds killed at each transition",
        HELD,
        partial(killed_at_transitions, devices_of=SealingDevices),
    ),
)
