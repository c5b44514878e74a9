"""What privacy has cost so far, in the coordinator's own database, written before it is spent.

A release is put on record, within the transaction of the caller, before its noise is drawn: a
crash may cost epsilon that nothing was gained for, and never gives any back. Every device has an
exposure of its own, over all rounds and runs of this database, so nobody is counted for rounds that
they were not in, and a run stops before the first device would spend more than it was promised.
"""

import json
import sqlite3
from collections import Counter
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from proxymoe.common.accounting import Accountant, Exposure, epsilon_of
from proxymoe.common.errors import ConfigError, PrivacySpent, ProtocolError
from proxymoe.common.files import canonical_json
from proxymoe.common.identity import DeviceName

SCHEMA = """
CREATE TABLE IF NOT EXISTS releases (
    number INTEGER PRIMARY KEY, run TEXT NOT NULL, round INTEGER NOT NULL,
    attempt INTEGER NOT NULL, time REAL NOT NULL, content TEXT NOT NULL,
    UNIQUE (run, round, attempt)
) STRICT;
CREATE TABLE IF NOT EXISTS exposures (
    device TEXT NOT NULL, release INTEGER NOT NULL REFERENCES releases (number),
    inverse_square REAL NOT NULL, PRIMARY KEY (device, release)
) STRICT;
""" + "".join(
    f"CREATE TRIGGER IF NOT EXISTS {table}_no_{change} BEFORE {change} ON {table} "
    "BEGIN SELECT RAISE (ABORT, 'what was spent stays on record'); END;\n"
    for table in ("releases", "exposures")
    for change in ("UPDATE", "DELETE")
)

RELEASES = "SELECT content FROM releases ORDER BY number"


class Release(BaseModel):
    """One sum that is about to be noised and shown."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    run: str = Field(max_length=128)
    round: int = Field(ge=0)
    attempt: int = Field(ge=0)
    mode: str
    clip_norm: float = Field(gt=0)
    noise_multiplier: float = Field(gt=0)
    """Of everything in it, a count of clipped updates included."""
    probability: float | None = Field(default=None, gt=0, le=1)
    """Of `accounting.poisson_cohort`; None if the cohort was dealt."""
    devices: tuple[DeviceName, ...]
    """Whose updates are asked for; who does not answer has spent all the same."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What is promised to every device."""

    epsilon: float
    delta: float
    accountant: Accountant = "rdp"


def reserve(database: sqlite3.Connection, time: float, release: Release, budget: Budget) -> float:
    """Puts a release on record; epsilon of the most exposed device in it, this one included.

    Part of the caller's transaction: only when that is committed may noise be drawn. The same
    release again, after a crash, costs nothing more: of the two, the caller shows one.

    Raises:
        PrivacySpent: a device would spend more than its budget; nothing is recorded.
        ProtocolError: another release is on record for this attempt.
        ConfigError: a device is in the cohort twice, or `dp-accounting` is not installed.
    """
    slot = release.run, release.round, release.attempt
    content = canonical_json(release.model_dump()).decode()
    if len(set(release.devices)) != len(release.devices):
        raise ConfigError(f"round {release.round}: a device is in the cohort twice")
    known = database.execute(
        "SELECT content FROM releases WHERE run = ? AND round = ? AND attempt = ?", slot
    ).fetchone()
    if known is not None and known[0] != content:
        raise ProtocolError(
            f"attempt {release.attempt} of round {release.round}: another release is on record; "
            "make another attempt"
        )
    before = _worst(database, release)
    if known is not None:
        return epsilon_of(before, budget.delta, budget.accountant)
    after = before.after(release.noise_multiplier, release.probability)
    epsilon = epsilon_of(after, budget.delta, budget.accountant)
    if not epsilon <= budget.epsilon:
        spent = epsilon_of(before, budget.delta, budget.accountant)
        raise PrivacySpent(
            f"round {release.round}: epsilon {epsilon:.3g} after it, {budget.epsilon:.3g} promised "
            f"at delta {budget.delta:.1g}, {spent:.3g} spent; the run ends here, or goes on with "
            "devices that took part less often"
        )
    number = database.execute(
        "INSERT INTO releases (run, round, attempt, time, content) VALUES (?, ?, ?, ?, ?)",
        (*slot, time, content),
    ).lastrowid
    share = 0.0 if release.probability is not None else release.noise_multiplier**-2
    database.executemany(
        "INSERT INTO exposures VALUES (?, ?, ?)",
        [(device, number, share) for device in release.devices],
    )
    return epsilon


def exposures(database: sqlite3.Connection) -> dict[str, Exposure]:
    """{device: what was released about it}, of every device that ever was in a cohort."""
    sampled = _sampled(database)
    sums = database.execute("SELECT device, total(inverse_square) FROM exposures GROUP BY device")
    return {device: Exposure(spent, sampled) for device, spent in sums}


def _worst(database: sqlite3.Connection, release: Release) -> Exposure:
    """The largest exposure so far of those whom a release exposes further."""
    found = exposures(database)
    if release.probability is None:
        found = {device: found[device] for device in release.devices if device in found}
    largest = max((exposure.inverse_squares for exposure in found.values()), default=0.0)
    return Exposure(largest, _sampled(database))


def _sampled(database: sqlite3.Connection) -> dict[tuple[float, float], int]:
    """{(z, probability): rounds}; these expose every device, for none must be known to be out."""
    contents = [json.loads(content) for (content,) in database.execute(RELEASES)]
    drawn = [content for content in contents if content["probability"] is not None]
    return Counter((content["noise_multiplier"], content["probability"]) for content in drawn)
