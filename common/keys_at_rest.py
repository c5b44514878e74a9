"""Disk edge: private keys in files that only their owner may read, sealed with a passphrase if any.

A sealed key is encrypted under a key that Argon2id (RFC 9106) makes of the passphrase, or scrypt
(RFC 7914) where the library's OpenSSL is too old for it. Both are slow and want memory on purpose.
A digest over the file tells damage from a wrong passphrase; whoever can write the file can change
it too, and gains nothing by that. To rotate a passphrase, reseal; to rotate a key, enrol again.
"""

import os
import stat
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from proxymoe.common.errors import ConfigError, IntegrityError
from proxymoe.common.files import canonical_json, digest_of
from proxymoe.common.identity import MAX_PEM_BYTES

MAGIC = b"PXK1\n"
MAX_FILE_BYTES = 2 * MAX_PEM_BYTES
PRIVATE = 0o600
PASSPHRASE_FILE = "PROXYMOE_PASSPHRASE_FILE"  # noqa: S105  a name, and no passphrase
"""Environment variable that names a file with the passphrase of a service's keys."""
_KEY_BYTES = 32
Salt = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class _Slow(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    salt: Salt
    """16 random bytes, as hex; new for every sealing, so the derived key is too."""


class Argon2(_Slow):
    """How Argon2id is run; the defaults are RFC 9106's second choice."""

    kdf: Literal["argon2id"] = "argon2id"
    memory_kib: int = Field(default=64 << 10, ge=8 << 3, le=1 << 20)
    passes: int = Field(default=3, ge=1, le=64)
    lanes: int = Field(default=4, ge=1, le=8)

    def derive(self, passphrase: bytes) -> bytes:
        """The key for this passphrase."""
        salt = bytes.fromhex(self.salt)
        kdf = Argon2id(
            salt=salt,
            length=_KEY_BYTES,
            iterations=self.passes,
            lanes=self.lanes,
            memory_cost=self.memory_kib,
        )
        return kdf.derive(passphrase)


class ScryptCost(_Slow):
    """How scrypt is run: 2^log_n steps of 1 KiB."""

    kdf: Literal["scrypt"] = "scrypt"
    log_n: int = Field(default=16, ge=4, le=20)

    def derive(self, passphrase: bytes) -> bytes:
        """The key for this passphrase."""
        salt = bytes.fromhex(self.salt)
        return Scrypt(salt=salt, length=_KEY_BYTES, n=1 << self.log_n, r=8, p=1).derive(passphrase)


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    slow: Annotated[Argon2 | ScryptCost, Field(discriminator="kdf")]


def passphrase(environment: Mapping[str, str] = os.environ) -> str | None:
    """What the file says that PASSPHRASE_FILE names, without the end of its line; None without.

    Raises:
        ConfigError: the file cannot be read.
    """
    if not (named := environment.get(PASSPHRASE_FILE)):
        return None
    try:
        return Path(named).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{PASSPHRASE_FILE}={named}: cannot be read ({error})") from error


def slow_hash() -> Argon2 | ScryptCost:
    """The best that the installed library has, with a new salt."""
    salt = os.urandom(16).hex()
    try:
        Argon2(salt=salt, memory_kib=64, passes=1, lanes=1).derive(b"")
    except UnsupportedAlgorithm:
        return ScryptCost(salt=salt)
    return Argon2(salt=salt)


def seal_key(key: bytes, passphrase: str, slow: Argon2 | ScryptCost | None = None) -> bytes:
    """The key, sealed with a passphrase; `open_key` opens it.

    Args:
        key: PEM.
        passphrase: any text; accents may be typed in either of Unicode's ways.
        slow: how hard guessing is made; None takes `slow_hash`. Never the same twice.

    Raises:
        ConfigError: an empty passphrase.
    """
    header = canonical_json(_Header(slow=slow or slow_hash()).model_dump())
    derived = _Header.model_validate_json(header).slow.derive(_text(passphrase))
    # The salt makes this key new, so it encrypts once, and any nonce will do.
    body = ChaCha20Poly1305(derived).encrypt(bytes(12), key, MAGIC + header)
    content = MAGIC + len(header).to_bytes(2, "big") + header + body
    return content + bytes.fromhex(digest_of(content))


def open_key(content: bytes, passphrase: str | None) -> bytes:
    """The key in a file's content, whether or not it is sealed.

    Raises:
        ConfigError: it is sealed, and this is not its passphrase.
        IntegrityError: it is damaged.
    """
    if not content.startswith(MAGIC):
        return content
    if passphrase is None:
        raise ConfigError(
            f"the key is sealed; give its passphrase, in a file that {PASSPHRASE_FILE} names"
        )
    sealed, digest = content[:-32], content[-32:]
    start = len(MAGIC) + 2
    if len(content) > MAX_FILE_BYTES or bytes.fromhex(digest_of(sealed)) != digest:
        raise IntegrityError("the sealed key is damaged; restore it from a backup")
    end = start + int.from_bytes(sealed[len(MAGIC) : start], "big")
    try:
        header = _Header.model_validate_json(sealed[start:end])
    except ValidationError:
        raise IntegrityError("the key was sealed by another version of ProxyMoE") from None
    try:
        derived = header.slow.derive(_text(passphrase))
    except UnsupportedAlgorithm:
        raise ConfigError(
            f"the key was sealed with {header.slow.kdf}, which this cryptography library has not; "
            "reseal it where it was sealed, without a passphrase, and again here"
        ) from None
    try:
        return ChaCha20Poly1305(derived).decrypt(bytes(12), sealed[end:], MAGIC + sealed[start:end])
    except InvalidTag:
        raise ConfigError("wrong passphrase for the sealed key; nothing was changed") from None


def write_key(path: Path, key: bytes, passphrase: str | None = None) -> None:
    """Writes a private key, atomically, to a file that only its owner may ever read.

    Raises:
        ConfigError: an empty passphrase.
    """
    content = key if passphrase is None else seal_key(key, passphrase)
    partial = path.with_name(f".{path.name}.{os.urandom(8).hex()}.partial")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE), "wb") as to:
            os.fchmod(to.fileno(), PRIVATE)  # a file system may know better than to ask the umask
            to.write(content)
            to.flush()
            os.fsync(to.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_key(path: Path, passphrase: str | None = None) -> bytes:
    """The private key in a file.

    Raises:
        ConfigError: no such file, others may read it, or see `open_key`; names the file.
        IntegrityError: it is damaged.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); restore it from a backup"
        ) from error
    if mode & ~0o700:
        raise ConfigError(
            f"{path}: others may read this private key (mode {mode:o}); they may have, so make a "
            f"new one, or: chmod 600 {path}"
        )
    try:
        return open_key(content, passphrase)
    except (ConfigError, IntegrityError) as error:
        raise type(error)(f"{path}: {error}") from None


def reseal(path: Path, old: str | None, new: str | None) -> None:
    """Gives a key file another passphrase, or takes it away, or adds the first; atomically.

    Copies from before keep the old one: destroy them.

    Raises:
        ConfigError: the old passphrase is wrong, or see `read_key`; nothing is changed.
        IntegrityError: the file is damaged.
    """
    write_key(path, read_key(path, old), new)


def _text(passphrase: str) -> bytes:
    if not passphrase:
        raise ConfigError("an empty passphrase seals nothing; leave it out, or choose one")
    try:
        return unicodedata.normalize("NFC", passphrase).encode()
    except UnicodeEncodeError:
        raise ConfigError("the passphrase is no text; type it again") from None
