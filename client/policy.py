"""The device's policy: what its owner allows, in one strict TOML file, and who may ask for what.

The server proposes, the device disposes. `judge` compares what a coordinator asks with the policy,
before anything is fetched, trained or sent; `client/gates.py` compares the policy with the state
of the machine. Defaults stand here and nowhere else, and so do the comments of the file that
enrolment writes: they are the docstrings below.
"""

import difflib
import math
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError

from proxymoe.common.errors import ConfigError
from proxymoe.common.section import Section, commented_toml

MB = 10**6
CLOCK = r"(?:[01]\d|2[0-3]):[0-5]\d"
WINDOW = re.compile(rf"({CLOCK})-({CLOCK}|24:00)")


def _as_window(value: Any) -> str:
    found = WINDOW.fullmatch(value) if isinstance(value, str) else None
    if found is None or found[1] == found[2]:
        raise ValueError('a window is written like "22:00-06:00"; the whole day is "00:00-24:00"')
    return found[0]


def _as_folder(value: Any) -> Path:
    if not isinstance(value, str | Path) or not Path(value).is_absolute():
        raise ValueError("a folder is written as an absolute path, without ~")
    str(value).encode()  # the name has to fit into a TOML file; UnicodeError is a ValueError
    return Path(value)


def _as_pattern(value: Any) -> str:
    path = PurePosixPath(value if isinstance(value, str) else "")
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError('a file pattern within the folder is written like "*.jsonl"')
    return str(value)


class _Rules(Section):
    model_config = ConfigDict(strict=True, use_attribute_docstrings=True)


class Coordinator(_Rules):
    """Whom this device obeys."""

    public_key: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Ed25519 public key of the trusted coordinator, in hex; without it, nobody is trusted."""


class Data(_Rules):
    """What may be read. It is read on this device only, and never sent."""

    folder: Annotated[Path, BeforeValidator(_as_folder)] | None = None
    """Absolute path of the folder that may be read; without it, nothing is."""
    pattern: Annotated[str, BeforeValidator(_as_pattern)] = "*.jsonl"
    """Which files in it; "**/*.jsonl" looks into its subfolders too."""


class Resources(_Rules):
    """How much of this machine may be used. 1 MB is 1,000,000 bytes."""

    memory_mb: int = Field(default=2000, ge=0)
    """Most memory that a training job may need."""
    spare_memory_mb: int = Field(default=500, ge=0)
    """Memory that must stay free for everything else while it runs."""
    disk_mb: int = Field(default=5000, ge=0)
    """Most disk space for models and adapters."""
    spare_disk_mb: int = Field(default=1000, ge=0)
    """Disk space that must stay free for everything else."""
    network_mb_per_month: int = Field(default=2000, ge=0)
    """Most bytes to fetch and send in a calendar month (UTC)."""
    seconds_per_day: int = Field(default=7200, ge=0)
    """Longest time to train in a day."""


class When(_Rules):
    """When this machine may be used."""

    window: Annotated[str, BeforeValidator(_as_window)] = "00:00-24:00"
    """Local time of the day, up to its second end; "22:00-06:00" is a night."""
    largest_load: float = Field(default=0.7, gt=0)
    """Only while other programs keep the load average (one minute, per core) at or below this."""
    only_charging: bool = True
    """Only while charging or on mains power."""
    battery_floor_percent: int = Field(default=30, ge=0, le=100)
    """Never with a battery below this, charging or not."""
    only_unmetered: bool = True
    """Never while a connected network is paid for by volume."""
    unknown_is_open: bool = False
    """Whether to go on where this machine cannot tell if it is charging or its network metered."""


class Privacy(_Rules):
    """What may become known about the data."""

    smallest_cohort: int = Field(default=8, ge=1)
    """Fewest devices of a round, this one included, among which an update may hide."""
    smallest_class: int = Field(default=5, ge=2)
    """Fewest devices among which a part of a masked update may hide, if only some hold it."""
    masks_required: bool = False
    """Whether updates are sent under masks only, so that the coordinator sees none but their sum;
    without, it may also ask for them in the clear."""
    hybrid_required: bool = False
    """Whether an update in the clear is sealed with ML-KEM-768 beside X25519 or stays here; an
    OpenSSL below 3.5, on either side, cannot. Under masks there is no envelope."""
    noise_required: bool = False
    """Whether updates are sent only under a stated epsilon; without, they are only clipped."""
    largest_epsilon: float = Field(default=8.0, ge=0)
    """Most epsilon to spend, summed over everything that this device ever sends."""
    largest_delta: float = Field(default=1e-5, ge=0, lt=1)
    """Largest delta beside it, for each thing that is sent."""
    smallest_clip_norm: float = Field(default=0.01, ge=0)
    """Smallest norm to which an update may be clipped; below, training is in vain."""
    largest_clip_norm: float = Field(default=30.0, gt=0)
    """Largest norm that an update may keep."""
    mixture_may_leave: bool = False
    """Whether a few noised weights over public domains may tell what kind of data is here."""


class Training(_Rules):
    """How much work a round may ask for."""

    largest_rank: int = Field(default=64, ge=1)
    """Largest rank of the LoRA adapter."""
    largest_steps: int = Field(default=200, ge=1)
    """Most training steps per round."""


class Policy(_Rules):
    """What the owner of a device allows."""

    coordinator: Coordinator = Coordinator()
    data: Data = Data()
    resources: Resources = Resources()
    when: When = When()
    privacy: Privacy = Privacy()
    training: Training = Training()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a coordinator asks; the defaults stand for what it does not ask, or does not promise."""

    coordinator: str
    """Public key that signed the request, in hex."""
    network_bytes: int = 0
    """To fetch and to send."""
    memory_bytes: int = 0
    """Peak of the training job."""
    disk_bytes: int = 0
    """All that this device would store afterwards."""
    seconds: float = 0.0
    rank: int = 0
    steps: int = 0
    """Training steps; a request with any of them wants an update."""
    cohort_size: int = 1
    """Devices of the round, this one included."""
    clip_norm: float = math.inf
    epsilon: float = math.inf
    """What answering adds to the epsilon spent; infinite is without noise."""
    delta: float = 1.0
    masked: bool = False
    """Whether the update is summed under masks."""
    hybrid: bool = False
    """Whether the envelope of an update in the clear holds out against a quantum computer."""
    mixture: bool = False
    """Whether the device shall describe its data as a domain mixture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What has been used up before a request."""

    network_bytes: int = 0
    """Fetched and sent this month."""
    seconds: float = 0.0
    """Trained today."""
    epsilon: float = 0.0
    """Spent ever."""
    exposure: float = 0.0
    """Σ z⁻² over all updates that went into noised sums, with z the noise multiplier."""


@dataclass(frozen=True, slots=True)
class Objection:
    """One reason to refuse a request, in words for the owner; never for the wire."""

    key: str
    """What to change in the policy in order to allow it."""
    asked: str
    limit: str

    def __str__(self) -> str:
        return f"asked: {self.asked}, allowed: {self.limit}; to allow it, change {self.key}"


def judge(policy: Policy, request: Request, used: Usage | None = None) -> list[Objection]:
    """Every reason why the policy refuses the request; none if it is allowed.

    Numbers may be anything: what is negative or not a number is refused too.
    """
    found = list(_broken_promises(policy, request))
    for key, asked, before, wording in _amounts(request, used or Usage()):
        section, _, name = key.partition(".")
        limit = getattr(getattr(policy, section), name) * (MB if "MB" in wording else 1)
        least = name.startswith("smallest")
        if asked < limit if least else not (asked >= 0 and before + asked <= limit):
            after = f" after {_amount(before, wording)}" if before else ""
            allowed = ("at least " if least else "up to ") + _amount(limit, wording)
            found.append(Objection(key, _amount(asked, wording) + after, allowed))
    return found


def _amounts(request: Request, used: Usage) -> Iterator[tuple[str, float, float, str]]:
    """(key of the limit, amount asked, amount used before, wording) of what has a limit."""
    yield "resources.memory_mb", request.memory_bytes, 0, "{} MB"
    yield "resources.disk_mb", request.disk_bytes, 0, "{} MB"
    yield "resources.network_mb_per_month", request.network_bytes, used.network_bytes, "{} MB"
    yield "resources.seconds_per_day", request.seconds, used.seconds, "{} s"
    yield "training.largest_rank", request.rank, 0, "rank {}"
    yield "training.largest_steps", request.steps, 0, "{} steps"
    if request.steps:
        yield "privacy.smallest_cohort", request.cohort_size, 0, "a cohort of {}"
        yield "privacy.smallest_clip_norm", request.clip_norm, 0, "clip norm {}"
        yield "privacy.largest_clip_norm", request.clip_norm, 0, "clip norm {}"
    if request.mixture or request.epsilon != math.inf:
        yield "privacy.largest_epsilon", request.epsilon, used.epsilon, "epsilon {}"
        yield "privacy.largest_delta", request.delta, 0, "delta {}"


def _broken_promises(policy: Policy, request: Request) -> Iterator[Objection]:
    """Objections to who asks, and to the kind of thing that is asked."""
    privacy, trusted = policy.privacy, policy.coordinator.public_key
    if request.coordinator != trusted:
        allowed = f"{trusted[:16]}…" if trusted else "nobody"
        yield Objection("coordinator.public_key", f"by {request.coordinator[:16]}…", allowed)
    if (request.steps or request.mixture) and policy.data.folder is None:
        yield Objection("data.folder", "to read private data", "no folder")
    if request.mixture and not privacy.mixture_may_leave:
        yield Objection("privacy.mixture_may_leave", "a domain mixture", "none")
    if request.steps and privacy.masks_required and not request.masked:
        yield Objection("privacy.masks_required", "an update in the clear", "under masks only")
    if request.steps and privacy.hybrid_required and not (request.masked or request.hybrid):
        asked = "an update in the clear, sealed with X25519 only"
        yield Objection("privacy.hybrid_required", asked, "with ML-KEM-768, too")
    if request.steps and privacy.noise_required and request.epsilon == math.inf:
        yield Objection("privacy.noise_required", "an update without noise", "with noise only")


def _amount(value: float, wording: str) -> str:
    number = f"{value:,}" if isinstance(value, int) else f"{value:,.12g}"
    if "MB" in wording:  # exact, so that one byte too many can be seen
        whole, rest = divmod(abs(int(value)), MB)
        number = "-" * (value < 0) + f"{whole:,}.{rest:06d}".rstrip("0").rstrip(".")
    return wording.format(number)


def load_policy(path: Path) -> Policy:
    """The policy in a TOML file.

    Raises:
        ConfigError: the file cannot be read, or see `parse_policy`; names the file.
    """
    try:
        return parse_policy(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        reason = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: {reason}") from error


def parse_policy(text: str) -> Policy:
    """The policy that a TOML text stands for; what it leaves out has its default.

    Raises:
        ConfigError: no TOML, values out of range, or unknown keys, each with the nearest known.
    """
    try:
        return Policy.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not TOML: {error}") from error
    except ValidationError as error:
        lines = []
        for entry in error.errors():
            name = ".".join(map(str, entry["loc"]))
            unknown = f"unknown key; the nearest is {nearest_key(name)}"
            reason = entry["msg"].removeprefix("Value error, ")
            lines.append(f"{name}: {unknown if entry['type'] == 'extra_forbidden' else reason}")
        raise ConfigError("; ".join(lines)) from error


def nearest_key(name: str) -> str:
    """The key of a policy, as section.key, that is spelt most like `name`."""

    def unlike(key: str) -> float:
        last = name.rpartition(".")[2], key.rpartition(".")[2]
        return -sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in ((name, key), last))

    return min((f"{name}.{key}" for name, section in Policy() for key, _ in section), key=unlike)


def policy_text(policy: Policy) -> str:
    """The policy as a commented TOML file; `parse_policy` gives the same policy back."""
    title = "What this device allows. The coordinator proposes, this file disposes."
    return commented_toml(policy, title, unset='"…"')
