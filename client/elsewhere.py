"""Has the jobs of `client/submodel.py` done in a process of their own, which ends with the job.

Who asks stays small: model code costs 200 MB, and here only its name is known.
"""

import json
from collections.abc import Callable
from contextlib import closing

from proxymoe.client.job import JobProcess, Pair
from proxymoe.common import errors
from proxymoe.common.errors import ProxyMoEError

POLL_SECONDS = 1.0

Work = Callable[[Pair], Pair]
"""Does a job: (name, arguments as JSON) to (b"", result), or to the kind and words of an error."""


def result_of(work: Work | None, name: str, **arguments: str) -> bytes:
    """The result of the job of `client/submodel.py` with this name.

    Args:
        work: does it; None for a process of its own.

    Raises:
        ProxyMoEError: what the job raised; or JobDied, for want of memory above all.
    """
    job = name.encode(), json.dumps(arguments).encode()
    kind, content = work(job) if work else _done_elsewhere(job)
    if kind:
        raise getattr(errors, kind.decode(), ProxyMoEError)(content.decode())
    return content


def do_job(job: Pair) -> Pair:
    """In a job process: the job, for which model code is imported."""
    from proxymoe.client import submodel  # noqa: PLC0415  here, and in nobody who names this

    return submodel.answer(job)


def _done_elsewhere(job: Pair) -> Pair:
    with closing(JobProcess(do_job)) as process:
        process.ask(job)
        while not process.poll(POLL_SECONDS):
            pass  # so that an interrupt ends the job
        return process.answer()
