"""The run directory: where everything of one coordinator lies, made whole or not at all.

The two keys that make it the coordinator, of the local CA and for signing, may be sealed with a
passphrase. Services start without anybody to ask, so it comes from a file that the environment
names, such as a credential of systemd. The TLS key of the gateway has to lie open. Importing torch
takes seconds, which opening the folder must not cost: what needs it is imported where it is made.
"""

import os
import secrets
import shutil
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from proxymoe.common.certificates import Identity, new_authority, new_server_certificate
from proxymoe.common.errors import ConfigError
from proxymoe.common.identity import new_signing_key
from proxymoe.common.keys_at_rest import passphrase, read_key, write_key
from proxymoe.server.settings import CoordinatorSettings, load_settings, settings_text

if TYPE_CHECKING:
    from proxymoe.server.store import RoundStore

SETTINGS_FILE = "coordinator.toml"


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
        for file, key in {
            partial.ca_key: authority.key,
            partial.signing_key_file: new_signing_key(),
        }.items():
            write_key(file, key, passphrase())
        for file, content in {
            partial.ca_certificate: authority.certificate,
            partial.server_certificate: server.certificate,
            partial.server_key: server.key,
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

    @cached_property
    def authority(self) -> Identity:
        """The local CA."""
        return Identity(self.authority_certificate, read_key(self.ca_key, passphrase()))

    @property
    def authority_certificate(self) -> bytes:
        """Of the local CA, PEM; not sealed."""
        try:
            return self.ca_certificate.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{self.ca_certificate}: {error.strerror}; restore it from a backup"
            ) from error

    @cached_property
    def signing_key(self) -> bytes:
        """What signs assignments and job tickets, PEM."""
        return read_key(self.signing_key_file, passphrase())

    def reseal(self, old: str | None, new: str | None) -> None:
        """Gives both keys another passphrase, a first one, or none; cut short, do it again.

        Raises:
            ConfigError: the old passphrase is wrong, or the new one empty.
            IntegrityError: a key is damaged.
        """
        for path in (self.ca_key, self.signing_key_file):
            try:
                key = read_key(path, old)
            except ConfigError as error:
                try:
                    key = read_key(path, new)  # it was done before, and broken off after this one
                except ConfigError:
                    raise error from None
            write_key(path, key, new)

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


def _write_private(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
