"""The coordinator's settings: one strict TOML file in its run directory.

Defaults stand here and in `common/config.py`, and so do the comments of the file that `init`
writes: they are the docstrings below. Importing torch takes seconds, which reading settings must
not cost: what needs it is imported where it is made.
"""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, ValidationError, model_validator

from proxymoe.common.addresses import is_loopback, split_address
from proxymoe.common.config import (
    AdapterSettings,
    ExtractSettings,
    FederationSettings,
    TrainSettings,
)
from proxymoe.common.errors import ConfigError
from proxymoe.common.price import unkept
from proxymoe.common.privacy import Mode
from proxymoe.common.privacy_settings import PrivacySettings
from proxymoe.common.section import Section, commented_toml

if TYPE_CHECKING:
    from proxymoe.server.blobs import BlobLimits
    from proxymoe.server.engine import Rules

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


class SumSettings(Section):
    """How updates are summed."""

    masked: bool | None = None
    """Whether the coordinator sees no update but only their sum (experimental); without it, as soon
    as a round has `smallest_cohort` devices at least, by `cohort_size` or `min_devices`."""
    smallest_cohort: int = Field(default=8, ge=2, le=256)
    """Fewest devices of a masked sum."""
    smallest_class: int = Field(default=5, ge=2, le=256)
    """Fewest devices whose updates of a block are summed under masks; other blocks are skipped."""
    letter_seconds: float = Field(default=120.0, gt=0)
    """Longest wait for the answers to one of the five letters."""
    attempts: int = Field(default=3, ge=1)
    """How often a masked sum is tried in a round."""


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
    sums: SumSettings = SumSettings()
    network: NetworkSettings = NetworkSettings()
    blobs: BlobSettings = BlobSettings()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (every := self.federation.canary_every) != 1:
            raise ValueError(
                f"federation.canary_every is {every}; a coordinator commits every round, so every "
                "candidate is checked: set it to 1"
            )
        if share := self.extract.rotate:
            raise ValueError(
                f"extract.rotate is {share:g}; a coordinator's devices keep their plans: set it to "
                "0 (simulations can rotate)"
            )
        modes = tuple(Mode) if self.masked else (Mode.CLIP_ONLY, Mode.CENTRAL)
        if told := unkept(self.privacy, *modes):
            raise ValueError(told if self.masked else f"{told}; with sums.masked = true, all are")
        asked, fewest = self.federation.cohort_size, self.rules.min_devices
        if asked is not None and asked < fewest:
            raise ValueError(f"federation.cohort_size {asked} is below rules.min_devices {fewest}")
        for what in ("smallest_cohort", "smallest_class"):
            least = getattr(self.sums, what)
            if self.masked and asked is not None and asked < least:
                raise ValueError(
                    f"federation.cohort_size {asked} is below sums.{what} {least}; raise it, or "
                    "set sums.masked to false"
                )
        return self

    @property
    def masked(self) -> bool:
        """Whether updates are summed under masks."""
        if self.sums.masked is not None:
            return self.sums.masked
        expected = self.federation.cohort_size or self.rules.min_devices
        return expected >= self.sums.smallest_cohort

    @property
    def smallest_class(self) -> int:
        """Fewest holders in a cohort by which a block is summed."""
        return self.sums.smallest_class if self.masked else self.federation.fewest_holders

    @property
    def round_rules(self) -> "Rules":
        """When a round starts, and when it counts: a masked one with the devices that it takes."""
        from proxymoe.server.engine import Rules  # noqa: PLC0415  see above

        fewest = max(self.rules.min_devices, self.sums.smallest_cohort if self.masked else 1)
        least = {"min_devices": fewest, "smallest_class": self.smallest_class}
        return Rules(**{**dict(self.rules), **least})


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


def _complaints(error: ValidationError) -> Iterator[str]:
    for entry in error.errors():
        where = ".".join(map(str, entry["loc"]))
        unknown = entry["type"] == "extra_forbidden"
        reason = "unknown key" if unknown else entry["msg"].removeprefix("Value error, ")
        yield f"{where}: {reason}" if where else reason
