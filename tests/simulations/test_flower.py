"""The rounds through Flower end in the same bits as in process, and leave nothing behind."""

import dataclasses
import os
import shutil
import signal
import tempfile
import threading
from pathlib import Path

import psutil
import pytest

from proxymoe.common.errors import ConfigError, ProxyMoEError
from proxymoe.common.experiment import Experiment
from proxymoe.common.files import digest_of
from proxymoe.server.aggregate import PlainSum
from proxymoe.server.journal import Journal, initial_state
from proxymoe.server.round import RoundReport, run_round
from proxymoe.simulations.faults.cohort import InMemory, plain, small_federation
from proxymoe.simulations.federate import federate, federation_of, pool_transports
from proxymoe.simulations.flower import Complete, flower_backend, virtual_nodes
from proxymoe.simulations.pool import WorkerPool
from proxymoe.simulations.world import World, open_site, profile_base

pytestmark = [
    # Ray leaves its log files open.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

EXPERIMENT = {
    "name": "flower",
    "devices": [{"data": "clinc150", "names": ["banking", "meta", "travel"]}],
    "calibration_tokens": 256,
    "train": {"steps": 2, "batch_size": 4, "max_tokens": 64},
    "federation": {"rounds": 2},
}


@pytest.fixture(scope="module")
def pool_and_federation(tmp_path_factory):
    """The shipped model, three devices with their submodels, two workers."""
    cache = tmp_path_factory.mktemp("cache")
    experiment = Experiment.model_validate(EXPERIMENT)
    site, base = open_site(experiment, cache)
    with WorkerPool(site, experiment.workers) as pool:
        world = World(site, base, profile_base(pool, base, cache, lambda *_: None))
        plans = {
            device.name: world.cut(device, experiment.extract, experiment.seed).plan
            for device in site.devices
        }
        yield pool, federation_of(pool, plans, experiment, "run")


@pytest.fixture
def empty():
    """A temporary folder, used by everything started, that must be empty afterwards."""
    folder = tempfile.mkdtemp(prefix="px")  # a short path: Ray puts sockets there
    before, tempfile.tempdir = tempfile.tempdir, folder
    environment = variables()
    yield
    tempfile.tempdir = before
    left = list(Path(folder).iterdir())
    shutil.rmtree(folder)
    processes = [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)]
    assert left == []
    assert [name for name in processes if "ray" in name] == []
    assert variables() == environment


def variables():
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def plans_of(federation):
    return {name: member.plan.digest for name, member in federation.members.items()}


def nowhere(number):
    raise AssertionError("the backend brings its own transport")


def test_silence_of_a_virtual_device_is_an_error_that_names_it():
    federation, tasks = small_federation(), dict.fromkeys("abc", b"task")
    answers = {"b": None, "a": bytes, "c": bytes}
    transport = Complete(InMemory(answers=answers), ["a", "b", "c"])
    replies = transport.exchange(tasks)
    assert [(next(replies) or "")[0], (next(replies) or "")[0]] == ["a", "c"]
    with pytest.raises(ProxyMoEError, match="no answer from b "):
        next(replies)
    with pytest.raises(ProxyMoEError, match="no answer from d, e "):
        Complete(InMemory(), ["a", "b", "c", "d", "e"]).devices()

    state = initial_state(federation.layout.size)
    whole = Complete(InMemory(), ["a", "b", "c"])
    _, report = run_round(federation, state, whole, PlainSum(federation.layout))
    assert report.num_updates == 3


def test_plans_that_rotate_are_refused_over_flower(pool_and_federation):
    site = pool_and_federation[0].site
    extract = site.experiment.extract.model_copy(update={"rotate": 0.5})
    turning = site.experiment.model_copy(update={"extract": extract})
    with pytest.raises(ConfigError, match=r"extract\.rotate = 0\.5: .*set it to 0"):
        flower_backend(dataclasses.replace(site, experiment=turning))


@pytest.mark.flower
def test_two_rounds_end_in_the_same_bits_as_in_process(pool_and_federation, tmp_path, empty):
    pool, federation = pool_and_federation
    plans = {name: member.plan for name, member in federation.members.items()}
    local = federate(
        federation, pool_transports(pool, lambda _: plans), plain(federation), None, lambda _: None
    )
    rounds: list[RoundReport] = []
    journal = Journal(tmp_path)
    flower = flower_backend(pool.site)(
        federation, nowhere, plain(federation), journal, rounds.append, None
    )

    digests = [digest_of(end.state.adapter.numpy().tobytes()) for end in (local, flower)]
    print(digests)  # noqa: T201  the acceptance criterion, for eyes
    assert digests[0] == digests[1]
    assert local.state.adapter.any()
    for one, other in zip(local.reports, flower.reports, strict=True):
        for field in ("committed", "canary_loss", "losses", "norms", "num_updates"):
            assert one[field] == other[field]
    assert [report.num_updates for report in rounds] == [3, 3]
    assert journal.latest(federation.layout.size).round == 2


@pytest.mark.flower
def test_an_interrupt_in_mid_training_ends_everything(pool_and_federation, empty):
    pool, federation = pool_and_federation
    endless = federation.train.model_copy(update={"steps": 100_000})
    federation = dataclasses.replace(federation, train=endless)
    state = initial_state(federation.layout.size)

    def interrupted_round():
        with virtual_nodes(pool.site, plans_of(federation)) as transport:
            assert transport.devices() == ["banking", "meta", "travel"]
            threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGINT)).start()
            run_round(federation, state, transport, PlainSum(federation.layout))

    with pytest.raises(KeyboardInterrupt):
        interrupted_round()


@pytest.mark.flower
def test_what_a_round_raises_reaches_the_caller(pool_and_federation, empty):
    pool, federation = pool_and_federation

    def canary(adapter):
        raise ValueError("the canary died")

    federation = dataclasses.replace(federation, canary=canary)
    with pytest.raises(ValueError, match="the canary died"):
        flower_backend(pool.site)(
            federation, nowhere, plain(federation), None, lambda _: None, None
        )


@pytest.mark.flower
def test_a_runtime_that_does_not_start_is_an_error_with_its_cause(pool_and_federation, empty):
    pool, federation = pool_and_federation
    deep = Path(tempfile.gettempdir(), "x" * 90)
    deep.mkdir()
    tempfile.tempdir = str(deep)
    with (
        pytest.raises(ProxyMoEError, match="AF_UNIX path length"),
        virtual_nodes(pool.site, plans_of(federation)),
    ):
        raise AssertionError("the block must not run")
    deep.rmdir()
