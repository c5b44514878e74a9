"""Encryption in chunks, by the STREAM construction (Hoang, Reyhanitabar, Rogaway, Vizár 2015).

Every chunk is encrypted on its own, with a nonce of its number and a mark on the last one. What was
cut off, moved, repeated or taken from elsewhere does not decrypt, and neither side needs more
memory than the content and its encryption.
"""

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from proxymoe.common.errors import ProtocolError

KEY_BYTES = 32
TAG_BYTES = 16


def num_encrypted_bytes(content_bytes: int, chunk_bytes: int) -> int:
    """Length of the encryption of that many bytes; no bytes at all are one empty chunk."""
    return content_bytes + _count(content_bytes, chunk_bytes) * TAG_BYTES


def encrypt_chunks(key: bytes, content: bytes, chunk_bytes: int, bound: bytes) -> bytes:
    """The content in encrypted chunks.

    Args:
        key: `KEY_BYTES` random bytes, which must never encrypt anything else.
        content: may be empty.
        chunk_bytes: of every chunk but the last; a tag is added to each.
        bound: associated data, the same for all chunks.
    """
    cipher, count = ChaCha20Poly1305(key), _count(len(content), chunk_bytes)
    body = bytearray(num_encrypted_bytes(len(content), chunk_bytes))
    plain, encrypted = memoryview(content), memoryview(body)
    for i in range(count):
        chunk, place = _places(i, chunk_bytes)
        cipher.encrypt_into(_nonce(i, count), plain[chunk], bound, encrypted[place])
    return bytes(body)


def decrypt_chunks(
    key: bytes, body: bytes | memoryview, content_bytes: int, chunk_bytes: int, bound: bytes
) -> bytes:
    """The content that was encrypted, given its length, which is checked before it is allocated.

    Raises:
        ProtocolError: a chunk is missing, damaged, moved, repeated or foreign.
    """
    if len(body) != num_encrypted_bytes(content_bytes, chunk_bytes):
        raise ProtocolError(f"chunks: {len(body)} bytes cannot be {content_bytes} encrypted ones")
    cipher, count = ChaCha20Poly1305(key), _count(content_bytes, chunk_bytes)
    content = bytearray(content_bytes)
    plain, encrypted = memoryview(content), memoryview(body)
    for i in range(count):
        chunk, place = _places(i, chunk_bytes)
        try:
            cipher.decrypt_into(_nonce(i, count), encrypted[place], bound, plain[chunk])
        except InvalidTag:
            raise ProtocolError(f"chunks: number {i} of {count} is not the one sealed") from None
    return bytes(content)


def _count(content_bytes: int, chunk_bytes: int) -> int:
    return max(1, -(-content_bytes // chunk_bytes))


def _places(number: int, chunk_bytes: int) -> tuple[slice, slice]:
    """Where a chunk lies in the content, and where in the body; the last one may be shorter."""
    start, whole = number * chunk_bytes, chunk_bytes + TAG_BYTES
    return slice(start, start + chunk_bytes), slice(number * whole, (number + 1) * whole)


def _nonce(number: int, count: int) -> bytes:
    return number.to_bytes(11, "big") + bytes([number == count - 1])
