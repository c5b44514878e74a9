"""Disk edge of the device: everything that one device keeps, in one folder of its own.

    policy.toml                 what the owner allows; the owner may edit it
    identity/                   device.key, device.ssh, device.pem, authority.pem; 0600
    enrolment.json              who this device is, and to whom; written last by enrolment
    assignment.bin              what the coordinator assigned, signed
    ledger.db                   everything that ever left
    mixture.json sums.db        the noised domain mixture; keys of peers, and masked sums so far
    store/ submodels/ adapters/ blobs, proxy submodels by plan, the personal adapter
    flower/ log/ runtime.secret files of the processes that run
    usage.json                  seconds trained by day, and the peak memory of a training job

The folder is 0700. A folder with a ledger in it is the home of a device; `wipe` removes what
stands above and nothing else. No model code is imported here.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Annotated, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from proxymoe.client.ledger import Ledger
from proxymoe.client.partial import lock_file
from proxymoe.client.policy import MB, Policy, Usage, load_policy
from proxymoe.client.store import Store
from proxymoe.common.assignment import Assignment, verify_assignment
from proxymoe.common.errors import ConfigError
from proxymoe.common.files import atomic_writer, sync_folder
from proxymoe.common.identity import DeviceName, PublicKey

PRIVATE_FOLDER, PRIVATE_FILE = 0o700, 0o600
DAYS_KEPT = 7
"""Of the record of training seconds."""
NOBODY = "no device is enrolled here; enrol first"
OURS = (
    *("identity", "runtime.secret", "adapters", "submodels", "store", "flower", "log"),
    *("assignment.bin", "mixture.json", "sums.db", "usage.json", "usage.lock", "enrolment.json"),
    *("policy.toml", "ledger.db-wal", "ledger.db-shm", "ledger.db", "lock"),
)
"""What `wipe` removes, in this order: secrets first, and last what tells that this is a home."""
BEFORE = {"policy.toml", "ledger.db", "ledger.db-wal", "ledger.db-shm", "ledger.db-journal", "lock"}
"""What may be in a folder that is not a home yet: an owner's policy, and an attempt cut short."""


class _Note(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Note = TypeVar("Note", bound=_Note)


class EnrolmentRecord(_Note):
    """Who this device is, and to whom; addresses are host:port."""

    device: DeviceName
    coordinator: str
    """Address of the gateway."""
    blobs: str
    """Address of the blob service, which also assigns plans."""
    public_key: PublicKey
    """The coordinator's; verifies assignments and job tickets."""


class ReleasedMixture(_Note):
    """A domain mixture that was noised to leave this device, and what that costs, once."""

    table: str
    """Digest of the domain table that it belongs to."""
    mixture: dict[str, float]
    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    is_spent: bool = False
    """Whether the cost stands in the ledger; sending the same again costs nothing."""


class _Uses(_Note):
    seconds: dict[str, Annotated[float, Field(ge=0)]] = {}
    """By day, as in 2026-11-22, UTC."""
    peak_bytes: int = Field(default=0, ge=0)


class Home:
    """The folder of one device; nothing is read or made before a method is called.

    Raises:
        ConfigError: in any method, when a file is missing or damaged; tells which and what to do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.policy_file = path / "policy.toml"
        self.identity = path / "identity"
        self.certificate = self.identity / "device.pem"
        self.key = self.identity / "device.key"
        self.ssh_key = self.identity / "device.ssh"
        self.authority = self.identity / "authority.pem"
        self.enrolment_file = path / "enrolment.json"
        self.assignment_file = path / "assignment.bin"
        self.ledger_file = path / "ledger.db"
        self.mixture_file = path / "mixture.json"
        self.records_file, self.store_folder = path / "sums.db", path / "store"
        self.submodels = path / "submodels"
        self.adapters = path / "adapters"
        self.personal_adapter = self.adapters / "personal.safetensors"
        self.flower, self.log = path / "flower", path / "log"
        self.refusals = self.log / "refusals.jsonl"
        self.usage_file = path / "usage.json"
        self.runtime_secret = path / "runtime.secret"
        self._lock: FileIO | None = None

    @classmethod
    def create(cls, path: Path) -> Self:
        """The home in a folder, which is made if it is none yet; again is fine.

        Raises:
            ConfigError: the folder has other things in it.
            IntegrityError, DataError: its ledger is damaged, or cannot be written.
        """
        home = cls(path.absolute())
        others = [] if home.ledger_file.exists() else sorted(_names(home.path) - BEFORE)
        if others:
            raise ConfigError(
                f"{path}: not the home of a device, and not empty ({', '.join(others[:3])}); "
                "name another folder, or wipe what is left of a device there"
            )
        for folder in (home.path, home.identity, home.adapters, home.flower, home.log):
            folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
            folder.chmod(PRIVATE_FOLDER)
            if folder == home.path:
                Ledger.create(home.ledger_file)
        return home

    def enrolment(self) -> EnrolmentRecord | None:
        """Who this device is; None before it is enrolled."""
        return self._note(EnrolmentRecord, self.enrolment_file, "enrol again")

    def enrolled(self) -> EnrolmentRecord:
        """Who this device is; ConfigError before it is enrolled."""
        if record := self.enrolment():
            return record
        raise ConfigError(f"{self.path}: {NOBODY}")

    def keep_enrolment(self, record: EnrolmentRecord) -> None:
        """Notes, durably, who this device is."""
        self.write_private(self.enrolment_file, record.model_dump_json(indent=1).encode())

    def policy(self) -> Policy:
        """What the owner allows, as the file says now."""
        return load_policy(self.policy_file)

    def ledger(self) -> Ledger:
        """The ledger of all that left; see there for its errors."""
        return Ledger(self.ledger_file)

    def store(self, reserved_bytes: int = 0) -> Store:
        """The blobs, with what the policy's `disk_mb` leaves of it for them as the quota.

        Args:
            reserved_bytes: of that, for what is about to be written beside the store.
        """
        taken = sum(_size(folder) for folder in (self.submodels, self.adapters))
        left = self.policy().resources.disk_mb * MB - taken - reserved_bytes
        return Store(self.store_folder, max(left, 0))

    def assignment(self) -> Assignment | None:
        """What the coordinator assigned, with its signature checked; None if there is nothing.

        Raises:
            ProtocolError: damaged, or not by the coordinator of this device; apply again.
        """
        try:
            content = self.assignment_file.read_bytes()
        except FileNotFoundError:
            return None
        record = self.enrolled()
        return verify_assignment(content, record.public_key, record.device)

    def keep_assignment(self, content: bytes) -> Assignment:
        """Notes, durably, what the coordinator assigned, signed; another plan forgets the peak.

        Raises:
            ProtocolError: not an assignment by the coordinator for this device.
        """
        record = self.enrolled()
        assignment = verify_assignment(content, record.public_key, record.device)
        if not self.submodel(assignment.plan).exists():
            self._use(lambda u: u.model_copy(update={"peak_bytes": 0}))
        self.write_private(self.assignment_file, content)
        return assignment

    def submodel(self, plan: str) -> Path:
        """Where the proxy submodel of the plan with this digest is, or would be."""
        return self.submodels / plan

    def mixture(self) -> ReleasedMixture | None:
        """The domain mixture that was released; None if there is none."""
        return self._note(ReleasedMixture, self.mixture_file, "restore it, or wipe this device")

    def keep_mixture(self, released: ReleasedMixture) -> None:
        """Notes the released mixture, durably, so that none is ever noised twice."""
        self.write_private(self.mixture_file, released.model_dump_json().encode())

    def usage(self, now: float) -> Usage:
        """What has been used up, at a time in unix seconds: of its month, of its day, and ever.

        Raises:
            IntegrityError, DataError: the ledger is damaged, or cannot be read now.
        """
        ledger, when = self.ledger(), datetime.fromtimestamp(now, UTC)
        month, ever = ledger.totals(since=f"{when:%Y-%m}"), ledger.totals()
        return Usage(
            network_bytes=month.sent_bytes + month.fetched_bytes,
            seconds=self._uses().seconds.get(f"{when:%Y-%m-%d}", 0.0),
            epsilon=ever.epsilon,
            exposure=ever.exposure,
        )

    def add_seconds(self, seconds: float, now: float) -> None:
        """Counts training time to the day of `now`, unix seconds."""
        day = f"{datetime.fromtimestamp(now, UTC):%Y-%m-%d}"

        def added(uses: _Uses) -> _Uses:
            others = [entry for entry in uses.seconds.items() if entry[0] != day]
            days = [*others[1 - DAYS_KEPT :], (day, uses.seconds.get(day, 0.0) + seconds)]
            return uses.model_copy(update={"seconds": dict(days)})

        self._use(added)

    def note_peak(self, num_bytes: int) -> None:
        """Notes the peak memory of a training job; the largest one is kept."""
        self._use(lambda u: u.model_copy(update={"peak_bytes": max(num_bytes, u.peak_bytes)}))

    def peak(self) -> int:
        """Largest peak memory of a training job on this plan, bytes; 0 before the first."""
        return self._uses().peak_bytes

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other clients away, or ConfigError; within itself it may be entered again."""
        if self._lock is not None:
            yield
            return
        if not self.path.is_dir():
            raise ConfigError(f"{self.path}: {NOBODY}")
        self._lock = lock_file(self.path / "lock", os.O_CREAT)
        if self._lock is None:
            remedy = "stop the one at work here first, or give this one a home of its own"
            raise ConfigError(f"{self.path}: a second client; {remedy}")
        try:
            with self._lock:
                yield
        finally:
            self._lock = None

    def wipe(self) -> None:
        """Removes all of this device: its keys first, then all else that stands at the top.

        What others have put into the folder stays. Cut short, it can be asked for again.

        Raises:
            ConfigError: this is not a home, or a client is at work here.
        """
        if not any(sign.exists() for sign in (self.ledger_file, self.identity)):
            raise ConfigError(f"{self.path}: not the home of a device; nothing was removed")
        with self.alone():
            for name in OURS:
                path = self.path / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
                sync_folder(self.path)
            with suppress(OSError):  # not empty: the rest is not ours
                self.path.rmdir()

    def write_private(self, path: Path, content: bytes) -> None:
        """Writes a file that only its owner can read, atomically; durable when this returns."""
        with atomic_writer(path) as file:
            os.fchmod(file.fileno(), PRIVATE_FILE)
            file.write(content)
        sync_folder(path.parent)

    def _note(self, kind: type[Note], path: Path, remedy: str) -> Note | None:
        try:
            return kind.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError:
            raise ConfigError(f"{path}: damaged, or of another version; {remedy}") from None

    def _uses(self) -> _Uses:
        return self._note(_Uses, self.usage_file, "remove it, and counting begins anew") or _Uses()

    def _use(self, change: Callable[[_Uses], _Uses]) -> None:
        with (self.path / "usage.lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # the runner and a local training may count at once
            self.write_private(self.usage_file, change(self._uses()).model_dump_json().encode())


def _names(path: Path) -> set[str]:
    """Of what is in a folder, without files that were never finished."""
    if not path.is_dir():
        return {"a file"} if path.exists() else set()
    return {found.name for found in path.iterdir() if found.suffix != ".partial"}


def _size(folder: Path) -> int:
    """Bytes of all files in a folder and below."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another process has just replaced it
            total += 0 if path.is_dir() else path.lstat().st_size
    return total
