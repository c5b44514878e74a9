"""Fixtures that all tests share; nothing here is a mock."""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers.utils import logging as transformers_logging

import proxymoe.simulations.site as site
from tests.tiny import FAMILIES, TinyBase

torch.set_num_threads(1)
transformers_logging.disable_progress_bar()

# Derandomised: a failure is the code's, not the day's. `--hypothesis-profile=explore` searches on.
settings.register_profile(
    "default",
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", settings.get_profile("default"), derandomize=False)
settings.load_profile("default")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyBase]:
    """`tiny(family)`: that family's tiny checkpoint, one per session."""
    return lru_cache(maxsize=None)(lambda family: TinyBase(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tiny: Callable[[str], TinyBase]) -> TinyBase:
    """The tiny checkpoint of every family in turn."""
    return tiny(request.param)


@pytest.fixture(scope="session")
def qwen(tiny: Callable[[str], TinyBase]) -> TinyBase:
    """One tiny checkpoint, where a law does not depend on the family."""
    return tiny("qwen2_moe")


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    """The model that comes with the repository."""
    base = TinyBase("tiny-moe", tmp_path_factory.mktemp("shipped"))
    base.folder = site.asset("tiny-moe")
    return base
