"""Fixtures that all tests share; nothing here is a mock.

The process that only hands tests out to workers reads this file, too, and they wait for it: what
takes seconds to load is loaded by the fixtures.
"""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.families import FAMILIES
from tests.laws import FULL

if TYPE_CHECKING:
    from tests.tiny import TinyBase

# Processes are killed in tests, but no power is cut: on a disk, every flush is only a wait.
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 1 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

# Derandomised: a failure is the code's, not the day's. `--hypothesis-profile=thorough` tries twice
# as many examples, and `explore` others every time.
settings.register_profile(
    "default",
    derandomize=True,
    deadline=None,
    max_examples=FULL // 2,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=FULL)
settings.register_profile("explore", settings.get_profile("thorough"), derandomize=False)
settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Workers share the machine: each computes in one thread, and what stays is not collected."""
    import torch
    from transformers.utils import logging

    # Whom a shell starts in the background is born to ignore interrupts, and so are its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    gc.freeze()


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A test leaves the answers to signals as they were: the next one may need them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    after = {number: signal.getsignal(number) for number in before}
    for number, handler in before.items():
        if handler is not after[number] and handler is not None:
            signal.signal(number, handler)
    assert after == before


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[str], TinyBase]":
    """`tiny(family)`: that family's tiny checkpoint, one per session."""
    from tests.tiny import TinyBase

    return lru_cache(maxsize=None)(lambda family: TinyBase(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tiny: "Callable[[str], TinyBase]") -> "TinyBase":
    """The tiny checkpoint of every family in turn."""
    return tiny(request.param)


@pytest.fixture(scope="session")
def qwen(tiny: "Callable[[str], TinyBase]") -> "TinyBase":
    """One tiny checkpoint, where a law does not depend on the family."""
    return tiny("qwen2_moe")


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> "TinyBase":
    """The model that comes with the repository."""
    import proxymoe.simulations.site as site
    from tests.tiny import TinyBase

    base = TinyBase("tiny-moe", tmp_path_factory.mktemp("shipped"))
    base.folder = site.asset("tiny-moe")
    return base
