"""Who signed this? The pinned identity keys of devices.

A directory that its reader has pinned is what secure aggregation rests on: whoever can change an
entry unnoticed can pretend to be that device. Devices sign with the one key they have (EC P-384,
see `identity`).
"""

from collections.abc import Callable, Mapping
from typing import Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
from cryptography.hazmat.primitives.hashes import SHA256

from proxymoe.common.errors import ProtocolError
from proxymoe.common.identity import load_device_key, load_device_public_key


class Directory(Protocol):
    """The identity keys of devices, pinned: nobody can change an entry unnoticed."""

    def check(self, device: str, message: bytes, signature: bytes) -> None:
        """Returns if the device of that name signed the message; ProtocolError otherwise."""


class PinnedKeys:
    """A directory of EC P-384 keys, PEM by device name.

    Raises:
        ProtocolError: a key is not one of a device.
    """

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._keys = {name: load_device_public_key(key) for name, key in keys.items()}

    def check(self, device: str, message: bytes, signature: bytes) -> None:
        """See `Directory.check`."""
        if device not in self._keys:
            raise ProtocolError(f"device {device!r}: not in the pinned directory")
        try:
            self._keys[device].verify(signature, message, ECDSA(SHA256()))
        except InvalidSignature:
            raise ProtocolError(f"device {device!r}: the signature is not its own") from None


def signer(key: bytes) -> Callable[[bytes], bytes]:
    """Signs messages with a device's private key (PEM), as `PinnedKeys` checks them.

    Raises:
        ProtocolError: not the private key of a device.
    """
    private = load_device_key(key)
    return lambda message: private.sign(message, ECDSA(SHA256()))
