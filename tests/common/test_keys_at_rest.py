"""A private key on disk is its owner's alone, and with a passphrase not even the disk's."""

import os

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common import keys_at_rest
from proxymoe.common.errors import ConfigError, IntegrityError
from proxymoe.common.files import digest_of
from proxymoe.common.identity import new_device_key
from proxymoe.common.keys_at_rest import (
    Argon2,
    ScryptCost,
    open_key,
    read_key,
    reseal,
    seal_key,
    write_key,
)
from tests.laws import tried

KEY = new_device_key()


def quick(salt=None):
    """As slow a hash as a test wants, which is not at all."""
    return Argon2(salt=salt or os.urandom(16).hex(), memory_kib=64, passes=1, lanes=1)


SEALED = seal_key(KEY, "correct horse", quick())


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(keys_at_rest, "slow_hash", quick)


@tried(20)
@given(st.binary(max_size=200), st.text(min_size=1, max_size=20).filter(str.isascii))
def test_a_sealed_key_opens_with_its_passphrase(key, passphrase):
    sealed = seal_key(key, passphrase, quick())
    assert open_key(sealed, passphrase) == key
    with pytest.raises(ConfigError, match="wrong passphrase"):
        open_key(sealed, passphrase + "!")


def test_both_hashes_work_at_their_real_cost():
    for slow in (Argon2(salt="00" * 16), ScryptCost(salt="00" * 16)):
        assert open_key(seal_key(KEY, "secret", slow), "secret") == KEY


def test_the_same_passphrase_never_makes_the_same_file():
    assert KEY not in SEALED
    assert seal_key(KEY, "correct horse") != seal_key(KEY, "correct horse")


def test_accents_may_be_typed_in_either_way():
    assert open_key(seal_key(KEY, "caf\u00e9"), "cafe\u0301") == KEY


@given(position=st.integers(len(keys_at_rest.MAGIC) * 8, len(SEALED) * 8 - 1))
def test_damage_is_not_taken_for_a_wrong_passphrase(position):
    damaged = bytearray(SEALED)
    damaged[position // 8] ^= 1 << position % 8
    with pytest.raises(IntegrityError, match="damaged"):
        open_key(bytes(damaged), "correct horse")


@given(st.binary(max_size=100))
def test_any_sealed_bytes_are_a_key_or_a_refusal(content):
    with pytest.raises((ConfigError, IntegrityError)):
        open_key(keys_at_rest.MAGIC + content, "secret")
    digest = bytes.fromhex(digest_of(keys_at_rest.MAGIC + content))
    with pytest.raises(IntegrityError, match="another version"):
        open_key(keys_at_rest.MAGIC + content + digest, "secret")


def test_a_hash_that_would_take_all_memory_is_refused():
    header = b'{"slow":{"kdf":"scrypt","log_n":60,"salt":"' + b"00" * 16 + b'","version":1}}'
    content = keys_at_rest.MAGIC + len(header).to_bytes(2, "big") + header
    with pytest.raises(IntegrityError, match="another version"):
        open_key(content + bytes.fromhex(digest_of(content)), "secret")


def test_passphrases_that_cannot_be_are_refused():
    for passphrase in ("", "\udc80"):
        with pytest.raises(ConfigError, match="passphrase"):
            seal_key(KEY, passphrase)
    with pytest.raises(ConfigError, match="give its passphrase"):
        open_key(SEALED, None)


@pytest.mark.parametrize("passphrase", [None, "secret"])
def test_a_key_file_is_private_from_its_first_moment(tmp_path, passphrase):
    before = os.umask(0)
    try:
        write_key(tmp_path / "key", KEY, passphrase)
    finally:
        os.umask(before)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert read_key(tmp_path / "key", passphrase) == KEY
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_key_that_others_can_read_is_refused(tmp_path):
    write_key(tmp_path / "key", KEY)
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(ConfigError, match=r"mode 640.*chmod 600"):
        read_key(tmp_path / "key")


def test_resealing_changes_the_passphrase_and_nothing_else(tmp_path):
    path = tmp_path / "key"
    write_key(path, KEY)
    for old, new in ((None, "first"), ("first", "second"), ("second", None)):
        reseal(path, old, new)
        assert read_key(path, new) == KEY
        assert path.read_bytes().startswith(keys_at_rest.MAGIC) == (new is not None)


def test_a_wrong_passphrase_changes_nothing(tmp_path):
    path = tmp_path / "key"
    write_key(path, KEY, "right")
    content = path.read_bytes()
    with pytest.raises(ConfigError, match=f"{path}: wrong passphrase"):
        reseal(path, "wrong", "new")
    with pytest.raises(ConfigError, match="empty"):
        reseal(path, "right", "")
    assert path.read_bytes() == content
    assert [found.name for found in tmp_path.iterdir()] == ["key"]


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"key: cannot be read"):
        read_key(tmp_path / "key")
    write_key(tmp_path / "key", SEALED[:-1])
    with pytest.raises(IntegrityError, match=r"key: the sealed key is damaged"):
        read_key(tmp_path / "key", "correct horse")


def test_an_old_library_takes_scrypt_and_says_what_it_cannot_open(monkeypatch):
    monkeypatch.undo()

    def missing(**_):
        raise UnsupportedAlgorithm("no Argon2 in this OpenSSL")

    assert isinstance(keys_at_rest.slow_hash(), Argon2)
    monkeypatch.setattr(keys_at_rest, "Argon2id", missing)
    assert isinstance(keys_at_rest.slow_hash(), ScryptCost)
    with pytest.raises(ConfigError, match="argon2id, which this"):
        open_key(SEALED, "correct horse")
