"""The coordinator's settings, and the run directory that holds all it owns.

Settings are one strict TOML file; defaults stand here and in `common/config.py`, and so do the
comments of the file that `init` writes: they are the docstrings below. Importing torch takes
seconds, which reading settings must not cost: what needs it is imported where it is made.
"""

import os
import secrets
import shutil
import tomllib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, ValidationError, model_validator

from proxymoe.common.addresses import is_loopback, split_address
from proxymoe.common.certificates import Identity, new_authority, new_server_certificate
from proxymoe.common.config import (
    AdapterSettings,
    ExtractSettings,
    FederationSettings,
    TrainSettings,
)
from proxymoe.common.errors import ConfigError
from proxymoe.common.identity import new_signing_key
from proxymoe.common.price import unkept
from proxymoe.common.privacy import Mode, PrivacySettings
from proxymoe.common.section import Section, commented_toml

if TYPE_CHECKING:
    from proxymoe.server.blobs import BlobLimits
    from proxymoe.server.engine import Rules
    from proxymoe.server.store import RoundStore

SETTINGS_FILE = "coordinator.toml"
Port = Annotated[int, Field(ge=1, lt=1 << 16)]


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class NetworkSettings(Section):
    """Where the coordinator listens, and under which names devices find it."""

    host: str = "127.0.0.1"
    """Address to listen at: gateway and blob service; the others stay on loopback."""
    names: tuple[str, ...] = Field(default=("localhost", "127.0.0.1"), min_length=1)
    """Host names or addresses that devices connect to; the first goes into enrolment tokens, all
    into the server certificate, which is made by `init`."""
    gateway_port: Port = 9443
    """Enrolment and messages; open to devices."""
    blob_port: Port = 9444
    """Models and assignments; open to devices."""
    status_port: Port = 9445
    """Status API, loopback only."""
    superlink_port: Port = 9446
    """Flower's SuperLink, loopback only."""
    plain_text: bool = False
    """Whether the gateway does without TLS; only where `host` is loopback."""

    @property
    def gateway_address(self) -> str:
        """host:port of the gateway, as devices reach it."""
        return _address(self.names[0], self.gateway_port)

    @property
    def blob_address(self) -> str:
        """host:port of the blob service, as devices reach it."""
        return _address(self.names[0], self.blob_port)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.names:
            try:
                split_address(_address(name, self.gateway_port))
            except ConfigError:
                raise ValueError(f"{name!r} is neither a host name nor an address") from None
        ports = [self.gateway_port, self.blob_port, self.status_port, self.superlink_port]
        if len(set(ports)) < len(ports):
            raise ValueError(f"ports {ports} must be distinct")
        if self.plain_text and not is_loopback(self.host):
            raise ValueError(f"plain_text with host {self.host}: only loopback may do without TLS")
        return self


class RuleSettings(Section):
    """When a round starts, when it stops waiting, and when it counts."""

    min_devices: int = Field(default=1, ge=1)
    """Fewest devices whose updates are ever summed; a round waits until so many are there."""
    over_selection: float = Field(default=1.0, ge=1, le=10)
    """The cohort is this many times as large as asked for; some will not answer."""
    quorum: float = Field(default=0.8, gt=0, le=1)
    """Share of the cohort size that must answer for the round to count."""
    deadline_seconds: float = Field(default=3600.0, gt=0)
    """Longest wait for replies."""
    patience: float = Field(default=1.0, ge=0)
    """After the quorum, stragglers get this share of the time that the quorum took."""
    asking_seconds: float = Field(default=15.0, gt=0)
    """Pause before those whose answers were lost on the way are asked again."""
    selecting_seconds: float = Field(default=60.0, gt=0)
    """Pause between two looks for devices while there are too few."""

    def rules(self) -> "Rules":
        """The same for the round engine."""
        from proxymoe.server.engine import Rules  # noqa: PLC0415  see above

        return Rules(**dict(self))


class BlobSettings(Section):
    """How much the blob service gives away at a time."""

    streams: int = Field(default=32, ge=1, le=1024)
    """At most so many transfers at once."""
    streams_per_device: int = Field(default=4, ge=1, le=1024)
    """At most so many of them to one device."""
    bytes_per_second: float | None = Field(default=None, gt=0)
    """Of all transfers together; without it, as fast as it goes."""

    def limits(self) -> "BlobLimits":
        """The same for the blob service."""
        from proxymoe.server.blobs import BlobLimits  # noqa: PLC0415  see above

        return BlobLimits(**dict(self))


class CoordinatorSettings(Section):
    """What a coordinator federates, and how."""

    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the run; every message carries it."""
    base_model: Path
    """Checkpoint folder of the base model; a relative path is taken from the run directory."""
    calibration: Path
    """Folder of public <domain>.jsonl files; a relative path is taken from the run directory."""
    calibration_tokens: int = Field(default=4096, ge=64)
    """Tokens profiled per public domain."""
    seed: int = Field(default=0, ge=0)
    """Of everything that is drawn; equal seeds give equal runs."""
    threads: int = Field(default=1, ge=1)
    """Threads for profile and canary; with 1, the profile has the bits of a simulation's."""
    public_domains: tuple[str, ...] = Field(default=("math", "code"), min_length=1)
    """Domains on which every round's adapter must still read as before: the canary."""
    canary_rows: int = Field(default=3, ge=1)
    """Rows per domain that the canary reads."""
    canary_tokens: int = Field(default=40, ge=8)
    """Tokens per row that the canary reads."""
    replan_threshold: float = Field(default=0.2, ge=0, le=1)
    """A device gets a new plan when this much weight of its domain mixture has moved."""
    largest_budget_bytes: int | None = Field(default=None, gt=0)
    """Largest submodel that a device may ask for; without it, none beyond what [extract] says."""
    extract: ExtractSettings = ExtractSettings()
    adapter: AdapterSettings = AdapterSettings()
    train: TrainSettings = TrainSettings()
    federation: FederationSettings = FederationSettings()
    privacy: PrivacySettings = PrivacySettings()
    rules: RuleSettings = RuleSettings()
    network: NetworkSettings = NetworkSettings()
    blobs: BlobSettings = BlobSettings()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (every := self.federation.canary_every) != 1:
            raise ValueError(
                f"federation.canary_every is {every}; a coordinator commits every round, so every "
                "candidate is checked: set it to 1"
            )
        if told := unkept(self.privacy, Mode.CLIP_ONLY, Mode.CENTRAL):
            raise ValueError(told)
        asked, fewest = self.federation.cohort_size, self.rules.min_devices
        if asked is not None and asked < fewest:
            raise ValueError(f"federation.cohort_size {asked} is below rules.min_devices {fewest}")
        return self


def load_settings(path: Path) -> CoordinatorSettings:
    """The settings in a TOML file.

    Raises:
        ConfigError: no file, no TOML, unknown keys or values out of range; names which.
    """
    try:
        return CoordinatorSettings.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(_complaints(error))) from error


def settings_text(settings: CoordinatorSettings) -> str:
    """The settings as a commented TOML file; `load_settings` gives equal settings back."""
    return commented_toml(settings, "How this coordinator works; changes hold from its next start.")


class RunDirectory:
    """Where everything of one coordinator lies.

    Raises:
        ConfigError: from the properties that read a file, if it is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = path.absolute()
        self.settings_file = path / SETTINGS_FILE
        self.keys = path / "keys"
        self.ca_certificate, self.ca_key = self.keys / "ca.pem", self.keys / "ca.key"
        self.server_certificate = self.keys / "server.pem"
        self.server_key = self.keys / "server.key"
        self.signing_key_file = self.keys / "signing.key"
        self.superexec_secret = self.keys / "superexec.secret"
        self.devices_db = path / "devices.db"
        self.flower, self.cache, self.log = path / "flower", path / "cache", path / "log"

    @classmethod
    def create(cls, path: Path, settings: CoordinatorSettings, now: float) -> Self:
        """A new run directory with new keys; it appears whole or not at all.

        Args:
            path: where; an empty folder may be there already.
            settings: what becomes its settings file.
            now: unix seconds, for the certificates.

        Raises:
            ConfigError: the folder is not empty.
        """
        path = path.absolute()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(f"{path}: not an empty folder; make the run directory elsewhere")
        partial = cls(path.with_name(f".{path.name}.partial"))
        if partial.path.exists():  # of an `init` that was killed
            shutil.rmtree(partial.path)
        for folder in (partial.path, partial.keys, partial.flower, partial.cache, partial.log):
            folder.mkdir(mode=0o700, parents=True)
        authority = new_authority(now)
        server = new_server_certificate(authority, settings.network.names, now)
        for file, content in {
            partial.ca_certificate: authority.certificate,
            partial.ca_key: authority.key,
            partial.server_certificate: server.certificate,
            partial.server_key: server.key,
            partial.signing_key_file: new_signing_key(),
            partial.superexec_secret: secrets.token_hex(32).encode(),
            partial.settings_file: settings_text(settings).encode(),
        }.items():
            _write_private(file, content)
        partial.path.rename(path)
        return cls(path)

    @cached_property
    def settings(self) -> CoordinatorSettings:
        """What the settings file says, read once."""
        if not self.settings_file.exists():
            raise ConfigError(
                f"{self.path}: no {SETTINGS_FILE} in it; make a run directory with "
                "`proxymoe-coordinator init`"
            )
        return load_settings(self.settings_file)

    @property
    def authority(self) -> Identity:
        """The local CA."""
        return Identity(_read_key(self.ca_certificate), _read_key(self.ca_key))

    @property
    def signing_key(self) -> bytes:
        """What signs assignments and job tickets, PEM."""
        return _read_key(self.signing_key_file)

    @property
    def base_model(self) -> Path:
        """The checkpoint folder of the base model."""
        return self._existing("base_model", self.settings.base_model)

    @property
    def calibration(self) -> Path:
        """The folder of public text."""
        return self._existing("calibration", self.settings.calibration)

    def store(self, size: int) -> "RoundStore":
        """The state of the rounds, opened; `size` is P of the full layout."""
        from proxymoe.server.store import RoundStore  # noqa: PLC0415  see above

        return RoundStore(self.path, self.settings.run, size)

    def _existing(self, key: str, path: Path) -> Path:
        found = self.path / path.expanduser()
        if not found.is_dir():
            raise ConfigError(f"{key} {path}: no such folder ({found}); see {self.settings_file}")
        return found


def _complaints(error: ValidationError) -> Iterator[str]:
    for entry in error.errors():
        where = ".".join(map(str, entry["loc"]))
        unknown = entry["type"] == "extra_forbidden"
        reason = "unknown key" if unknown else entry["msg"].removeprefix("Value error, ")
        yield f"{where}: {reason}" if where else reason


def _read_key(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; restore it from a backup") from error


def _write_private(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
