"""Worker processes, and the in-process transport over them.

One fork server imports torch once, for warm workers that live as long as the run, and for solo
processes of one job each, so that the job's memory can be measured.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import (
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
)
from concurrent.futures.process import BrokenProcessPool
from typing import Any, ParamSpec, Self, TypeVar

from proxymoe.common.errors import ProxyMoEError
from proxymoe.common.plan import Plan
from proxymoe.server.round import Answer
from proxymoe.simulations import worker
from proxymoe.simulations.forkserver import start_forkserver
from proxymoe.simulations.site import Site

P = ParamSpec("P")
R = TypeVar("R")


class WorkerPool:
    """Processes that act as devices and as the server's evaluator; a context manager.

    Each worker computes on one thread, so results do not depend on how many there are.
    """

    def __init__(self, site: Site, workers: int) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._context = start_forkserver()
        self.site = site
        self._warm = ProcessPoolExecutor(workers, self._context, worker.start, (site,))
        self._solo = ThreadPoolExecutor(workers)
        self._alone = set[ProcessPoolExecutor]()

    def submit(self, job: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> "Future[R]":
        """Runs a job of `worker` on a warm worker."""
        return self._warm.submit(job, *args, **kwargs)

    def submit_alone(
        self, job: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs
    ) -> "Future[R]":
        """Runs a job in a process of its own, as many at a time as there are workers."""

        def run() -> R:
            with ProcessPoolExecutor(1, self._context) as process:
                self._alone.add(process)
                try:
                    return process.submit(job, *args, **kwargs).result()
                finally:
                    self._alone.discard(process)

        return self._solo.submit(run)

    def map(self, job: Callable[..., R], calls: list[tuple[Any, ...]]) -> list[R]:
        """Runs all calls on the warm workers; results in order."""
        futures = [self._warm.submit(job, *call) for call in calls]
        return [result_of(future) for future in futures]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._solo.shutdown(wait=False, cancel_futures=True)
        for executor in (self._warm, *self._alone):
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

    def exchange(self, tasks: Mapping[str, bytes]) -> Iterator[Answer]:
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
