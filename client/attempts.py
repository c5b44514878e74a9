"""Edge to the clock: a call that a coordinator cannot answer now is tried again, with jitter."""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from proxymoe.client.retry import Backoff, TransferError

T = TypeVar("T")


class Busy(Exception):
    """No answer, or "not now": why, and how long the coordinator asks to wait, seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait


@dataclass(frozen=True, slots=True)
class Patience:
    """How often to try, and how to wait."""

    backoff: Backoff = field(default_factory=Backoff)
    draw: Callable[[], float] = secrets.SystemRandom().random
    """A random number from [0, 1)."""
    pause: Callable[[float], None] = time.sleep
    """Waits so many seconds."""

    def until_answered(self, who: str, call: Callable[[], T]) -> T:
        """What the call returns, once it does not raise Busy.

        Raises:
            TransferError: it did so too often in a row.
        """
        failures = 0
        while True:
            try:
                return call()
            except Busy as busy:
                failures += 1
                if failures > self.backoff.retries:
                    raise TransferError(
                        f"{who}: {busy.reason}, at {failures} attempts; is the coordinator "
                        "running, and can this device reach it? Try again later"
                    ) from busy
                self.pause(max(self.backoff.seconds(failures, self.draw()), busy.wait))
