"""Measured memory of this process; Linux reports it, elsewhere the numbers are coarser."""

import resource
import sys
from pathlib import Path


def peak_rss_mb() -> float:
    """High-water mark of this process's resident memory, MB (10⁶ bytes), file pages included."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
