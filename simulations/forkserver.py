"""The process that all workers are forked from; it imports what they need once.

It can be started before this process imports the same: the two then do so side by side.
"""

import multiprocessing
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running

PRELOADED = ["torch", "transformers", "proxymoe.simulations.worker"]


def start_forkserver() -> ForkServerContext:
    """Starts the fork server if it does not run yet, without waiting for its imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ensure_running()
    return context
