"""Worker processes: they do what this process would do, and their death is told."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from proxymoe.common.config import ExtractSettings
from proxymoe.common.errors import ProxyMoEError
from proxymoe.server.aggregate import PlainSum
from proxymoe.server.journal import initial_state
from proxymoe.server.round import run_round
from proxymoe.simulations import worker
from proxymoe.simulations.federate import federation_of
from proxymoe.simulations.pool import PoolTransport, WorkerPool, result_of
from proxymoe.simulations.world import World, profile_base
from tests.waiting import is_running, until
from tests.worlds import tiny_site

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    root = tmp_path_factory.mktemp("pool")
    site, base = tiny_site(root)
    with WorkerPool(site, workers=1) as pool:
        profile = profile_base(pool, base, root / "cache", lambda *_: None)
        yield pool, World(site, base, profile)


def die() -> None:
    os._exit(1)


def test_a_round_is_the_same_on_shared_workers_and_in_processes_of_their_own(pool):
    workers, world = pool
    settings = ExtractSettings(kept_fraction=0.5)
    plans = {d.name: world.cut(d, settings, seed=0).plan for d in world.site.devices}
    federation = federation_of(workers, plans, world.site.experiment, "run")
    adapters = []
    for alone in (False, True):
        state, report = run_round(
            federation,
            initial_state(federation.layout.size),
            PoolTransport(workers, plans, alone),
            PlainSum(federation.layout),
        )
        assert report.num_updates == 2
        adapters.append(state.adapter)
    assert torch.equal(*adapters)


def test_profiles_come_from_the_cache_the_second_time(pool):
    workers, world = pool
    told = []
    cache = world.site.submodels.parent
    profile_base(workers, world.base, cache, lambda *progress: told.append(progress))
    assert told == [("profile", 1, 1)]


def test_results_keep_the_order_of_the_calls(pool):
    workers, _ = pool
    losses = workers.map(worker.public_loss, [(None, rows, 48) for rows in (1, 2, 3, 1)])
    assert losses[0] == losses[3] != losses[1]


def test_a_worker_that_dies_is_told_with_the_remedy(pool):
    workers, _ = pool
    with pytest.raises(ProxyMoEError, match=r"a worker process died.*use fewer workers"):
        result_of(workers.submit_alone(die))


KILLED = """
import os, signal, time
from concurrent.futures import ProcessPoolExecutor
from proxymoe.simulations import worker
from proxymoe.simulations.forkserver import start_forkserver

pool = ProcessPoolExecutor(1, start_forkserver(), worker.obey)
pid = pool.submit(os.getpid).result()
pool.submit(time.sleep, 60)
print(pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_busy_worker_does_not_outlive_a_run_that_is_killed():
    done = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, check=False)
    assert done.returncode == -signal.SIGKILL
    until(lambda: not is_running(int(done.stdout)))
