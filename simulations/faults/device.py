"""Level 3: a device's job process, ledger and store, killed in every phase and every write."""

import contextlib
import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from proxymoe.client.entries import Entry, Kind
from proxymoe.client.job import JobDied, JobProcess, Pair
from proxymoe.client.ledger import Ledger
from proxymoe.client.store import Store
from proxymoe.common.errors import ProxyMoEError
from proxymoe.common.files import digest_of
from proxymoe.simulations.faults.children import LONG, Child, Tell, Work, steps_of
from proxymoe.simulations.faults.chore import chore
from proxymoe.simulations.faults.report import Ground, Scenario

LEVEL = "device"
JOB_KILLS, LEDGER_KILLS, STORE_KILLS = 5, 20, 30
ENTRIES = 6
CHUNK, CHUNKS = 32 << 10, 6
"""Of each of the two blobs that a store is killed over."""

KillJob = Callable[[JobProcess, Ground], None]


def idle(jobs: JobProcess, _: Ground) -> None:
    """Killed when it has answered and waits."""
    _ask(jobs, b"before")
    _kill(jobs)


def importing(jobs: JobProcess, ground: Ground) -> None:
    """Killed when it has just been started."""
    jobs.close()
    jobs.ask((b"", b"a job"))
    time.sleep(ground.rng.uniform(0.0, 0.2))
    _kill(jobs)


def computing(jobs: JobProcess, ground: Ground) -> None:
    """Killed in the middle of a job."""
    marker = ground.folder() / "computing"
    jobs.ask((os.fsencode(marker), b"a job"))
    deadline = time.monotonic() + LONG
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    _kill(jobs)


def answering(jobs: JobProcess, _: Ground) -> None:
    """Killed in the middle of its answer."""
    jobs.ask((b"", b"a job"))
    jobs.poll(LONG)
    _kill(jobs)


def job_killed(ground: Ground) -> Iterator[str]:
    """Kills in every phase; an answer that was lost is an error, and the next job is answered."""
    with contextlib.closing(JobProcess(chore)) as jobs:
        for phase in (idle, importing, computing, answering):
            for number in range(JOB_KILLS):
                phase(jobs, ground)
                yield _job_complaint(jobs, phase, b"job %d" % number)


def _job_complaint(jobs: JobProcess, phase: KillJob, content: bytes) -> str:
    with contextlib.suppress(JobDied):
        if phase is not idle and jobs.poll(LONG):
            jobs.answer()
            return f"killed while {phase.__name__}, and it answered"
    for _ in range(2):  # whoever asks before the death shows is told of it once
        with contextlib.suppress(JobDied):
            digest, _rest = _ask(jobs, content)
            return "" if digest == hashlib.sha256(content).digest() else "a wrong answer"
    return f"killed while {phase.__name__}, and no job was answered after it"


def _ask(jobs: JobProcess, content: bytes) -> Pair:
    jobs.ask((b"", content))
    jobs.poll(LONG)
    return jobs.answer()


def _kill(jobs: JobProcess) -> None:
    assert jobs.pid is not None
    os.kill(jobs.pid, signal.SIGKILL)


def keep_book(tell: Tell, folder: Path) -> None:
    """A device's life that sends something again and again; tells what it has written down."""
    ledger = Ledger.create(folder / "ledger.db")
    for _ in range(ENTRIES):
        entry = Entry(kind=Kind.UPDATE, receiver="host:1", num_bytes=9, digest=digest_of(b"update"))
        number = ledger.write(entry)
        tell(number)
        ledger.confirm(number)


def ledger_killed(ground: Ground) -> Iterator[str]:
    """Kills at steps spread over all that the ledger writes."""
    yield from _killed(ground, keep_book, LEDGER_KILLS, _ledger_complaint)


def _ledger_complaint(folder: Path, told: list[int]) -> str:
    ledger = Ledger.create(folder / "ledger.db")
    ledger.verify()
    known = {record.number for record in ledger.newest()}
    if lost := set(told) - known:
        return f"entries {sorted(lost)} were sent, and are not in the ledger"
    keep_book(lambda _: None, folder)
    ledger.verify()
    return "" if len(ledger.newest()) == len(known) + ENTRIES else "an entry is missing"


def _blobs() -> list[bytes]:
    rng = np.random.default_rng(0)
    return [rng.bytes(CHUNK * CHUNKS) for _ in range(2)]


def stock(tell: Tell, folder: Path) -> None:
    """A device's life that receives two blobs; tells (blob, bytes verified) after each chunk."""
    store, blobs = Store(folder, 10**9), _blobs()
    store.pin("plan", {digest_of(blob): len(blob) for blob in blobs})
    for number, blob in enumerate(blobs):
        if (partial := store.begin(digest_of(blob), len(blob))) is None:
            continue
        with partial:
            tell((number, partial.num_verified))
            for start in range(partial.num_verified, len(blob), CHUNK):
                chunk = blob[start : start + CHUNK]
                partial.append(chunk, hashlib.sha256(chunk).digest())
                tell((number, partial.num_verified))
            partial.finish()


def store_killed(ground: Ground) -> Iterator[str]:
    """Kills at steps spread over all that the store writes, torn writes among them."""
    yield from _killed(ground, stock, STORE_KILLS, _store_complaint)


def _store_complaint(folder: Path, told: list[tuple[int, int]]) -> str:
    store, blobs = Store(folder, 10**9), _blobs()
    digests = [digest_of(blob) for blob in blobs]
    if any(store.holds(d, CHUNK * CHUNKS) and not store.verify(d) for d in digests):
        return "the store holds a damaged blob"
    kept: list[tuple[int, int]] = []
    stock(kept.append, folder)
    for number, reached in told[-1:]:
        begun = [verified for blob, verified in kept if blob == number]
        if begun and begun[0] < reached:
            return f"{reached} bytes were verified, and {begun[0]} are left"
    return "" if all(store.verify(digest) for digest in digests) else "a blob is not whole"


def _killed(
    ground: Ground, work: Work, kills: int, complaint_of: Callable[[Path, list[Any]], str]
) -> Iterator[str]:
    """Kills some work at steps spread over all of it; each time in a new folder."""
    steps = steps_of(work, ground.folder())
    for step in np.linspace(1, steps, kills).round().astype(int).tolist():
        folder = ground.folder()
        child = Child(work, folder, deadly=step)
        told = child.told()
        if not child.was_killed():
            yield f"step {step} of {steps} never came"
            continue
        try:
            yield complaint_of(folder, told)
        except ProxyMoEError as error:
            yield f"killed at step {step}: {type(error).__name__}: {error}"


SCENARIOS = (
    Scenario(
        LEVEL, "job process killed in every phase", "an error, the next answer is right", job_killed
    ),
    Scenario(
        LEVEL,
        "ledger killed in its writes",
        "chain verifies, all that was sent is in it",
        ledger_killed,
    ),
    Scenario(
        LEVEL,
        "store killed in its writes",
        "no verified byte lost, no damaged blob held",
        store_killed,
    ),
)
