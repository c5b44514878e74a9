"""Worker processes, and the in-process transport over them.

Two pools share one fork server that has imported torch once: a warm one whose workers live as
long as the run, and a solo one that gives each job a fresh process, so that its memory can be
measured.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, ParamSpec, Self, TypeVar

from proxymoe.common.errors import ProxyMoEError
from proxymoe.common.plan import Plan
from proxymoe.simulations import worker
from proxymoe.simulations.site import Site

P = ParamSpec("P")
R = TypeVar("R")
PRELOADED = ["torch", "transformers", "proxymoe.simulations.worker"]


class WorkerPool:
    """Processes that act as devices and as the server's evaluator; a context manager.

    Each worker computes on one thread, so results do not depend on how many there are.
    """

    def __init__(self, site: Site, workers: int) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.site = site
        self._warm = ProcessPoolExecutor(workers, context, worker.start, (site,))
        # One at a time: a measured device has the machine's memory to itself, like a real one.
        self._solo = ProcessPoolExecutor(1, context, max_tasks_per_child=1)

    def submit(self, job: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> "Future[R]":
        """Runs a job of `worker` on a warm worker."""
        return self._warm.submit(job, *args, **kwargs)

    def submit_alone(
        self, job: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs
    ) -> "Future[R]":
        """Runs a job in a process of its own."""
        return self._solo.submit(job, *args, **kwargs)

    def map(self, job: Callable[..., R], calls: list[tuple[Any, ...]]) -> list[R]:
        """Runs all calls on the warm workers; results in order."""
        futures = [self._warm.submit(job, *call) for call in calls]
        return [result_of(future) for future in futures]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for executor in (self._warm, self._solo):
            processes = list((executor._processes or {}).values())
            executor.shutdown(wait=kind is None, cancel_futures=True)
            if kind is not None:
                for process in processes:
                    process.kill()


class PoolTransport:
    """In-process transport: virtual devices answer in worker processes, in any order."""

    def __init__(self, pool: WorkerPool, plans: Mapping[str, Plan], measured_round: bool) -> None:
        self._pool = pool
        self._plans = plans
        self._alone = measured_round

    def devices(self) -> list[str]:
        """All virtual devices; none ever leaves."""
        return sorted(self._plans)

    def exchange(self, tasks: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        """See `server.round.Transport`."""
        futures: dict[Future[bytes], str] = {}
        for name, task in tasks.items():
            plan = self._plans[name]
            if self._alone:
                site = self._pool.site
                future = self._pool.submit_alone(worker.answer_alone, site, name, plan, task)
            else:
                future = self._pool.submit(worker.answer, name, plan, task)
            futures[future] = name
        for future in as_completed(futures):
            yield futures[future], result_of(future)


def result_of(future: "Future[R]") -> R:
    """The job's result; a worker that died becomes a clear error."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise ProxyMoEError(
            "a worker process died, perhaps for want of memory; use fewer workers or smaller "
            "batches, then go on with --resume"
        ) from error
