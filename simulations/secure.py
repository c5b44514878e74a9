"""Secure aggregation in one process: every device and the coordinator, every letter, no network.

What runs is the code that real devices run; only the letters do not travel. `MaskedSum` makes it a
`Summation`, so any simulated round can be summed under masks.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from proxymoe.common.adapter import AdapterLayout
from proxymoe.common.contribution import Limits
from proxymoe.common.errors import ProtocolError
from proxymoe.common.masking import Device
from proxymoe.common.secagg import Phase, Terms
from proxymoe.common.unmasking import Coordinator
from proxymoe.server.aggregate import BlockSum
from proxymoe.server.secure_sum import SecureSum, contribution, terms_for

Lost = Callable[[Phase, str], bool]
"""Whether a device's answer in this phase never arrives."""


def aggregate(
    coordinator: Coordinator,
    devices: Mapping[str, Device],
    lost: Lost = lambda _phase, _device: False,
) -> None:
    """Carries letters until the attempt is over; `coordinator.result` is the outcome.

    Raises:
        ProtocolError: too many answers were lost.
    """
    answers = {name: device.announce() for name, device in devices.items()}
    while coordinator.phase is not Phase.OVER:
        for name, step in answers.items():
            if not lost(coordinator.phase, name):
                coordinator.receive(step.reply)
        questions = coordinator.close()
        answers = {name: devices[name].answer(asked) for name, asked in questions.items()}


class SimulatedKeys:
    """Identities of simulated devices: both halves of quickly checked keys (Ed25519)."""

    def __init__(self) -> None:
        self._keys: dict[str, Ed25519PrivateKey] = {}

    def signer(self, device: str) -> Callable[[bytes], bytes]:
        """Signs as this device, which need not have been heard of before."""
        return self._keys.setdefault(device, Ed25519PrivateKey.generate()).sign

    def check(self, device: str, message: bytes, signature: bytes) -> None:
        """See `common.directory.Directory.check`."""
        try:
            self._keys[device].public_key().verify(signature, message)
        except (KeyError, InvalidSignature):
            raise ProtocolError(f"device {device!r}: the signature is not its own") from None


class MaskedSum:
    """A `Summation` over simulated devices that runs the whole protocol when it is asked to sum.

    Args:
        full: layout of the full adapter.
        clip_norm: of every update; None for whole numbers, see `terms_for`.
        smallest: fewest devices in a cohort and in a class.
        rng: for stochastic rounding.
    """

    def __init__(
        self, full: AdapterLayout, clip_norm: float | None, smallest: int, rng: np.random.Generator
    ) -> None:
        self.notice = "masked sum of simulated devices (experimental)"
        self._full, self._clip_norm, self._smallest, self._rng = full, clip_norm, smallest, rng
        self._added: dict[str, tuple[AdapterLayout, Tensor, float]] = {}

    def add(self, device: str, layout: AdapterLayout, update: Tensor, weight: float) -> None:
        """See `Summation.add`; ProtocolError if the device has been added before."""
        layout.require(update)
        if device in self._added:
            raise ProtocolError(f"second update of device {device!r} in one round")
        self._added[device] = layout, update, weight

    def sum(self) -> BlockSum:
        """See `Summation.sum`.

        Raises:
            ConfigError: too few devices, or no block has enough holders.
        """
        terms = terms_for(
            self._full,
            {name: layout for name, (layout, _, _) in self._added.items()},
            run=os.urandom(8).hex(),
            round=0,
            attempt=0,
            base=self._full.digest,
            clip_norm=self._clip_norm,
            smallest_cohort=self._smallest,
            smallest_class=self._smallest,
        )
        keys = SimulatedKeys()
        heaviest = max(weight for _, _, weight in self._added.values())
        devices = {name: self._device(name, terms, keys, heaviest) for name in sorted(self._added)}
        secure = SecureSum(self._full, terms, keys, threads=os.cpu_count() or 1)
        aggregate(secure.coordinator, devices)
        found = secure.sum()
        return replace(found, total=found.total * heaviest, weight=found.weight * heaviest)

    def _device(self, name: str, terms: Terms, keys: SimulatedKeys, heaviest: float) -> Device:
        layout, update, weight = self._added[name]
        given = contribution(self._full, layout, update, weight / heaviest)
        limits = Limits(self._smallest, self._smallest)
        return Device(name, keys.signer(name), keys, terms, limits, given, [], self._rng)
