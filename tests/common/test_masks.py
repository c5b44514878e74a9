"""The primitives against their RFCs, and masks that cancel, word by word."""

import hashlib
import hmac
import os
import struct

import numpy as np
import pytest

from proxymoe.common.errors import ProtocolError
from proxymoe.common.masks import (
    CHUNK_WORDS,
    TAG_BYTES,
    add_masks,
    agree,
    commitment,
    derive,
    pair_key,
    public_half,
    seal,
    self_key,
    unseal,
)

HERE, THERE = "ab" * 32, "cd" * 32
ALICE = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
BOB = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")


def stream(key, size):
    words = np.zeros(size, dtype=np.uint32)
    add_masks(words, [key])
    return words


def test_agreement_is_rfc_7748s():
    assert public_half(ALICE) == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert public_half(BOB) == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    secret = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert agree(ALICE, public_half(BOB)).hex() == secret
    assert agree(BOB, public_half(ALICE)).hex() == secret


def test_derivation_is_rfc_5869s():
    """Extract and expand written out; one block of output is all there is."""
    secret, owners = os.urandom(32), (3, 7)
    extracted = hmac.digest(bytes.fromhex(HERE), secret, hashlib.sha256)
    info = struct.pack("<2I", *owners) + b"pair"
    expected = hmac.digest(extracted, info + b"\x01", hashlib.sha256)
    assert derive(secret, HERE, "pair", *owners) == expected


def test_the_stream_is_rfc_8439s():
    """Appendix A.1, vectors 1 and 2: key and nonce zero, blocks 0 and 1."""
    blocks = (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    assert stream(bytes(32), 32).astype("<u4").tobytes().hex() == blocks


@pytest.mark.parametrize("size", [1, 17, CHUNK_WORDS, 2 * CHUNK_WORDS + 5])
def test_masks_cancel_and_threads_change_nothing(size):
    keys = [os.urandom(32) for _ in range(3)]
    one = np.arange(size, dtype=np.uint32)
    other = one.copy()
    add_masks(one, keys[:2], keys[2:])
    add_masks(other, keys[:2], keys[2:], threads=3)
    assert np.array_equal(one, other)
    assert (one == np.arange(size)).mean() < 0.1 or size == 1
    add_masks(one, keys[2:], keys[:2])
    assert np.array_equal(one, np.arange(size))


def test_a_long_stream_is_one_stream():
    """Entering at a count gives the same words as going there."""
    key = os.urandom(32)
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    size = CHUNK_WORDS + 40
    plain = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(4 * size))
    assert np.array_equal(stream(key, size), np.frombuffer(plain, dtype="<u4"))


def test_every_bit_of_a_key_counts():
    """Flower's SecAgg+ folds keys to 32 bits (flwrlabs/flower #7522): such pairs collide there."""
    key = bytes(range(32))
    same_fold = bytearray(key)
    same_fold[0] ^= 1
    same_fold[4] ^= 1
    swapped = key[4:8] + key[:4] + key[8:]
    for other in (bytes(same_fold), swapped):
        assert not np.array_equal(stream(key, 64), stream(other, 64))
    for bit in range(256):
        flipped = (int.from_bytes(key, "big") ^ (1 << bit)).to_bytes(32, "big")
        assert not np.array_equal(stream(key, 4), stream(flipped, 4))


def test_keys_are_bound_to_everything_they_are_for():
    secret = os.urandom(32)
    keys = [
        pair_key(secret, HERE, 1, 2, 3),
        pair_key(secret, THERE, 1, 2, 3),
        pair_key(secret, HERE, 1, 3, 3),
        pair_key(secret, HERE, 1, 2, 4),
        pair_key(os.urandom(32), HERE, 1, 2, 3),
        self_key(secret, HERE, 1, 3),
        self_key(secret, HERE, 1, 2),
        derive(secret, HERE, "seal", 1, 2),
        derive(secret, HERE, "seal", 2, 1),
        derive(secret, HERE, "seal", 1, 2, 3),
    ]
    assert len(set(keys)) == len(keys)
    assert pair_key(secret, HERE, 2, 1, 3) == keys[0]


def test_a_commitment_fixes_a_seed_and_is_not_its_mask_key():
    seed = os.urandom(32)
    found = commitment(seed, HERE, 1, 2)
    assert found == commitment(seed, HERE, 1, 2)
    others = [commitment(bytes(32), HERE, 1, 2), commitment(seed, THERE, 1, 2)]
    assert found not in [*others, self_key(seed, HERE, 1, 2).hex(), seed.hex()]


def test_what_is_sealed_is_opened_by_its_key_only():
    key = os.urandom(32)
    sealed = seal(key, b"shares")
    assert len(sealed) == 6 + TAG_BYTES
    assert unseal(key, memoryview(sealed)) == b"shares"
    for wrong, content in (
        (os.urandom(32), sealed),
        (key, sealed[:-1]),
        (key, sealed[:-1] + bytes([sealed[-1] ^ 1])),
        (key, b""),
    ):
        with pytest.raises(ProtocolError, match="were changed, or meant for somebody else"):
            unseal(wrong, content)


@pytest.mark.parametrize("public", ["00" * 32, "01" + "00" * 31])
def test_public_keys_of_small_order_are_refused(public):
    with pytest.raises(ProtocolError, match="of small order"):
        agree(ALICE, public)
