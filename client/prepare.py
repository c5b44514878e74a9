"""What `join` does first: come to a plan and its proxy submodel, however long that takes.

A coordinator that is away, and a machine that may not be used now, are waited for; whatever the
owner or the coordinator refuses is not.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from proxymoe.client import proxy
from proxymoe.client.bring import require_reachable
from proxymoe.client.gates import readable_files
from proxymoe.client.home import Home
from proxymoe.client.proxy import GatesClosed
from proxymoe.client.retry import TransferError, TransferRefused
from proxymoe.common.assignment import Application, Assignment
from proxymoe.common.supervise import Backoff, uniform

Result = TypeVar("Result")

PATIENCE = Backoff(first_seconds=2.0, cap_seconds=300.0)
"""For a coordinator that is away, and for a machine that may not be used now."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the owner says of the data, and how much model there may be; None says nothing."""

    domain: str | None = None
    mixture: bool = False
    """Whether the data is described by a noised domain mixture instead."""
    budget_bytes: int | None = None
    refresh: bool = False
    """Whether to ask for another plan although there is one."""

    @property
    def is_new(self) -> bool:
        """Whether the coordinator has to be asked, whatever it assigned before."""
        return self != Wish()


def prepare(
    home: Home,
    wish: Wish,
    tell: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
    pause: Callable[[float], None] = time.sleep,
    draw: Callable[[], float] = uniform,
) -> Assignment:
    """What this device is to do, with its proxy submodel in place; waits for as long as it takes.

    A coordinator that is away, and a machine that may not be used now, are waited for.

    Args:
        tell: told why there is something to wait for, ever more rarely.
        progress: told (verified bytes, all bytes) of what is fetched.

    Raises:
        ConfigError: not enrolled, a second client, or no folder with data.
        PolicyRefused: the coordinator asks for more than the owner allows.
        ProxyMoEError: the coordinator refuses, or an answer of it cannot be used.
    """
    with home.alone():
        home.enrolled()
        readable_files(home.policy().data)
        patiently = functools.partial(_patiently, tell=tell, pause=pause, draw=draw)
        assignment = patiently(lambda: _assigned(home, wish))

        def fetch() -> None:
            if not home.submodel(assignment.plan).is_dir():
                require_reachable(home)
            proxy.fetch_proxy(home, assignment, progress)

        patiently(fetch)
        return assignment


def _assigned(home: Home, wish: Wish) -> Assignment:
    held = None if wish.refresh else home.assignment()
    if held and not wish.is_new:
        return held
    require_reachable(home)
    budget = wish.budget_bytes
    if not wish.mixture:
        return proxy.apply(home, Application(domain=wish.domain, budget_bytes=budget))
    held = held or proxy.apply(home, Application(budget_bytes=budget))  # it names the table
    mixture = proxy.describe_data(home, proxy.fetch_table(home, held))
    return proxy.apply(home, Application(mixture=mixture, budget_bytes=budget))


def _patiently(
    attempt: Callable[[], Result],
    tell: Callable[[str], None],
    pause: Callable[[float], None],
    draw: Callable[[], float],
) -> Result:
    """What the attempt returns, as soon as the coordinator is there and the gates are open."""
    failures = 0
    while True:
        try:
            return attempt()
        except TransferRefused:
            raise
        except (TransferError, GatesClosed) as error:
            failures += 1
            seconds = PATIENCE.delay(failures, draw())
            if failures.bit_count() == 1:  # the first, second, fourth, eighth …
                tell(f"{error}; trying again, next in {seconds:.0f} s")
        pause(seconds)
