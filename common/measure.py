"""Measured memory of this process; Linux reports it, elsewhere the numbers are coarser."""

import resource
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict

SELF = Path("/proc/self")


class Measured(BaseModel):
    """What a process took, in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    peak: int
    """High-water mark of resident memory, file pages included."""
    file_backed: int
    """Resident pages of mapped files, weights above all. The kernel may drop these when memory
    gets short, and reads them again."""
    own_file_backed: int
    """The same, a page that n processes share counted as 1/n (PSS)."""

    @property
    def anonymous(self) -> int:
        """The rest of the peak, which no kernel can drop: mapped files stay to the end."""
        return max(0, self.peak - self.file_backed)


def measured() -> Measured:
    """The memory of this process so far; without Linux' accounts, all of it counts as anonymous."""
    file_backed = sum(_kilobytes("status", name) for name in ("RssFile", "RssShmem"))
    shared_out = sum(_kilobytes("smaps_rollup", name) for name in ("Pss_File", "Pss_Shmem"))
    return Measured(
        peak=round(1e6 * peak_rss_mb()),
        file_backed=1024 * file_backed,
        own_file_backed=1024 * shared_out,
    )


def peak_rss_mb() -> float:
    """High-water mark of this process's resident memory, MB (10⁶ bytes), file pages included."""
    if kilobytes := _kilobytes("status", "VmHWM"):
        return kilobytes * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _kilobytes(account: str, name: str) -> int:
    """A line of one of Linux' accounts of this process; 0 where there is none."""
    path = SELF / account
    if not path.exists():
        return 0
    lines = path.read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)
