"""The settings that a new coordinator starts with: from a file, from options, from defaults."""

import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from proxymoe.common.errors import ConfigError
from proxymoe.common.experiment import Experiment, load_experiment
from proxymoe.server.settings import CoordinatorSettings

SHARED = (
    "calibration_tokens",
    "seed",
    "extract",
    "adapter",
    "train",
    "federation",
    "privacy",
)
"""What an experiment and a coordinator both have."""
HERE = ("localhost", "127.0.0.1")
"""The server certificate is for this machine, too: Flower's processes check it on loopback."""


def settings_of(
    config: Path | None,
    base_model: Path | None,
    calibration: Path | None,
    run: str | None,
    host_names: tuple[str, ...],
) -> CoordinatorSettings:
    """Settings from a coordinator's or an experiment's file, where options win over both.

    Of an experiment, what concerns its virtual devices and its report is left out, and its canary
    reads every round, because a coordinator commits every round.

    Raises:
        ConfigError: a file or folder cannot be used, or a value is out of range.
    """
    table = _table(config) if config else {}
    for key, path in {"base_model": base_model, "calibration": calibration}.items():
        if path is not None:
            table[key] = str(path.expanduser().absolute())
        elif config is not None and key in table:
            table[key] = str((config.parent / Path(table[key]).expanduser()).absolute())
        else:
            raise ConfigError(f"which {key}? Give --{key.replace('_', '-')} FOLDER")
    if run is not None:
        table["run"] = run
    table.setdefault("run", Path(table["base_model"]).name)
    if host_names:
        table["network"] = table.get("network", {}) | {"names": host_names}
    try:
        settings = CoordinatorSettings.model_validate(table)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors()
        ]
        raise ConfigError("; ".join(lines)) from error
    _require_folders(settings)
    names = tuple(dict.fromkeys((*settings.network.names, *HERE)))
    network = settings.network.model_copy(update={"names": names})
    return settings.model_copy(update={"network": network})


def _table(config: Path) -> dict[str, Any]:
    """A coordinator's settings as they stand, or what an experiment has of them."""
    try:
        table = tomllib.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{config}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{config}: not TOML: {error}") from error
    return shared_with(load_experiment(config)) if "devices" in table else table


def shared_with(experiment: Experiment) -> dict[str, Any]:
    """What a coordinator takes from an experiment, as it stands in its settings file."""
    whole = experiment.model_dump(mode="json", exclude_none=True)
    taken: dict[str, Any] = {key: whole[key] for key in SHARED}
    taken["federation"]["canary_every"] = 1
    return taken | {
        "run": experiment.name,
        "public_domains": experiment.evaluate.public_domains,
    }


def _require_folders(settings: CoordinatorSettings) -> None:
    if not (settings.base_model / "config.json").is_file():
        raise ConfigError(f"base_model {settings.base_model}: no config.json; is it a checkpoint?")
    found = sorted(path.stem for path in settings.calibration.glob("*.jsonl"))
    if missing := sorted(set(settings.public_domains) - set(found)):
        raise ConfigError(
            f"public_domains {missing}: no such .jsonl in {settings.calibration}, which has "
            f"{found}; name other domains in a --config file"
        )
