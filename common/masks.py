"""The cryptography under secure aggregation: agreed keys, masks made of keystream, sealed shares.

Nothing here is our own invention: X25519 (RFC 7748) agrees on a secret, HKDF-SHA256 (RFC 5869)
makes one key per purpose out of it, ChaCha20 (RFC 8439) stretches a key to a mask, and
ChaCha20-Poly1305 seals what only one peer may read. Every key is bound to the transcript of its
attempt, to its purpose and to its owners, and is used for one stream or one sealing only; that
is why nonces may be zero.
"""

import hashlib
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from proxymoe.common.errors import ProtocolError
from proxymoe.common.fixed_point import Words

KEY_BYTES = 32
TAG_BYTES = 16
"""What sealing adds to a plaintext."""
CHUNK_WORDS = 1 << 17
"""Words per step: half a megabyte, which stays in a cache. A multiple of `_BLOCK_WORDS`."""
_BLOCK_WORDS = 16
"""ChaCha20 makes 64 bytes per count."""
_NONCE = bytes(12)
_ZEROS = bytes(4 * CHUNK_WORDS)


def public_half(private: bytes) -> str:
    """The X25519 public key of a private key, in hex."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw().hex()


def agree(private: bytes, public: str) -> bytes:
    """The 32-byte secret that two owners of X25519 keys share.

    Raises:
        ProtocolError: a public key that would give everybody the same secret.
    """
    peer = X25519PublicKey.from_public_bytes(bytes.fromhex(public))
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(peer)
    except ValueError:
        raise ProtocolError(f"public key {public[:16]}: of small order; nobody makes one") from None


def derive(secret: bytes, transcript: str, purpose: str, *owners: int) -> bytes:
    """The key for one purpose of these owners (numbers, in an order that matters)."""
    info = struct.pack(f"<{len(owners)}I", *owners) + purpose.encode()
    return HKDF(SHA256(), KEY_BYTES, salt=bytes.fromhex(transcript), info=info).derive(secret)


def pair_key(secret: bytes, transcript: str, one: int, other: int, mask_class: int) -> bytes:
    """The key of the mask that two devices share in a class; they agreed on the secret."""
    return derive(secret, transcript, "pair", min(one, other), max(one, other), mask_class)


def self_key(seed: bytes, transcript: str, device: int, mask_class: int) -> bytes:
    """The key of the mask that a device makes of its own seed for a class."""
    return derive(seed, transcript, "self", device, mask_class)


def commitment(seed: bytes, transcript: str, device: int, mask_class: int) -> str:
    """A digest that fixes a seed and tells nothing about it; seeds have 256 bits of entropy."""
    return hashlib.sha256(derive(seed, transcript, "commitment", device, mask_class)).hexdigest()


def seal(key: bytes, plaintext: bytes) -> bytes:
    """The plaintext under a key that seals nothing else."""
    return ChaCha20Poly1305(key).encrypt(_NONCE, plaintext, None)


def unseal(key: bytes, ciphertext: bytes | memoryview) -> bytes:
    """The plaintext.

    Raises:
        ProtocolError: it was not sealed under this key, or has been changed.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, bytes(ciphertext), None)
    except InvalidTag:
        raise ProtocolError("sealed shares were changed, or meant for somebody else") from None


def add_masks(
    words: Words, plus: Sequence[bytes], minus: Sequence[bytes] = (), threads: int = 1
) -> None:
    """Adds the keystream of each key in `plus` to the words and takes off those in `minus`.

    In place, modulo 2^32, hence also modulo every smaller power of two. The stream can be entered
    at any count, so threads share the work by stretches of the words.
    """

    def stretch(start: int) -> None:
        part = words[start : start + CHUNK_WORDS]
        buffer = bytearray(4 * part.size)
        stream = np.frombuffer(buffer, dtype="<u4")
        count = struct.pack("<I", start // _BLOCK_WORDS) + _NONCE
        for keys, operation in ((plus, np.add), (minus, np.subtract)):
            for key in keys:
                cipher = Cipher(ChaCha20(key, count), mode=None).encryptor()
                cipher.update_into(memoryview(_ZEROS)[: len(buffer)], buffer)
                operation(part, stream, out=part)

    starts = range(0, words.size, CHUNK_WORDS)
    if threads == 1 or len(starts) == 1:
        for start in starts:
            stretch(start)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(stretch, starts))
