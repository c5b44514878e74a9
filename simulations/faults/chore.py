"""What a job process is given to do while it is killed; it imports nothing heavy."""

import hashlib
import time
from pathlib import Path

ANSWER_BYTES = 8 << 20
"""More than any pipe holds, so that a kill finds the process in the middle of answering."""


def chore(job: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    """The digest of the second part, and much besides.

    With a file's name as the first part it makes that file, and computes for ever.
    """
    marker, content = job
    if marker:
        Path(marker.decode()).touch()
        while True:
            time.sleep(1.0)
    return hashlib.sha256(content).digest(), bytes(ANSWER_BYTES)
