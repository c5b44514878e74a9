"""Measured memory of the whole simulation: this process and all that it started."""

import contextlib
import threading
from typing import Self

import psutil

INTERVAL_SECONDS = 4.0
"""Summing a process's pages takes the kernel tens of milliseconds."""


class MemoryWatch:
    """Samples the process tree in the background; a context manager.

    A page that several processes share counts once: the proportional set size (PSS) where the
    system tells it, else the resident set size, which overstates.
    """

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._stop.wait(INTERVAL_SECONDS):
            total = 0
            for process in (own, *own.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    memory = process.memory_full_info()
                    total += getattr(memory, "pss", memory.rss)
            self.peak_mb = max(self.peak_mb, total / 1e6)
