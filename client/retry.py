"""When to ask again for a blob, and when to stop: decisions, without clock or network."""

from dataclasses import dataclass

from proxymoe.common.backoff import backoff_seconds
from proxymoe.common.errors import IntegrityError, ProxyMoEError

MAX_DAMAGED = 2
"""How often bytes may be wrong at one place before the coordinator's copy must be."""


class TransferError(ProxyMoEError):
    """Blobs could not be fetched now; what was received is kept, and trying again goes on."""


class TransferRefused(TransferError):
    """The coordinator will not send a blob to this device; trying again will not help."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """How many failures in a row there may be, and how long to wait after each."""

    retries: int = 8
    first_seconds: float = 0.5
    max_seconds: float = 30.0

    def seconds(self, failures: int, draw: float) -> float:
        """The pause after so many failures in a row; see `backoff_seconds`."""
        return backoff_seconds(self.first_seconds, self.max_seconds, failures, draw)


class Failures:
    """The failures in a row at one blob.

    An attempt that gets further than all before it starts a new row: however often a connection
    is cut, a transfer that moves on is not given up, and one that does not is, after a bounded
    number of attempts.
    """

    def __init__(self, retries: int, reached: int) -> None:
        self._retries = retries
        self._furthest = reached
        self._number = self._damaged = 0

    def add(self, reason: str, reached: int, damaged: bool) -> int:
        """How many failures there are in a row, with this one.

        Args:
            reason: what went wrong, for people.
            reached: how many bytes of the blob had been verified when it did.
            damaged: whether bytes came, but wrong ones.

        Raises:
            IntegrityError: they were wrong too often at one place.
            TransferError: too many failures in a row.
        """
        if reached > self._furthest:
            self._furthest, self._number, self._damaged = reached, 0, 0
        self._number += 1
        self._damaged += damaged
        if self._damaged > MAX_DAMAGED:
            raise IntegrityError(
                f"{reason}; wrong {self._damaged} times in a row, so the coordinator's copy is "
                "damaged and has to be restored there"
            )
        if self._number > self._retries:
            raise TransferError(
                f"{reason}; {self._number} failures in a row, the limit is {self._retries} "
                "retries; check the network and try again, what was received is kept"
            )
        return self._number
