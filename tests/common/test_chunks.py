"""What was encrypted in chunks decrypts whole and in order, or not at all."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.chunks import TAG_BYTES, decrypt_chunks, encrypt_chunks, num_encrypted_bytes
from proxymoe.common.errors import ProtocolError

KEY = bytes(range(32))
SIZE = 4
WHOLE = SIZE + TAG_BYTES


def refuse(body, content_bytes, reason="chunks", key=KEY, chunk_bytes=SIZE, bound=b""):
    with pytest.raises(ProtocolError, match=reason):
        decrypt_chunks(key, body, content_bytes, chunk_bytes, bound)


def pieces(body):
    return [body[i : i + WHOLE] for i in range(0, len(body), WHOLE)]


@given(st.binary(max_size=40), st.integers(1, 50), st.binary(max_size=8))
def test_what_goes_in_comes_out(content, chunk_bytes, bound):
    body = encrypt_chunks(KEY, content, chunk_bytes, bound)
    assert len(body) == num_encrypted_bytes(len(content), chunk_bytes)
    assert decrypt_chunks(KEY, memoryview(body), len(content), chunk_bytes, bound) == content


@given(st.permutations(range(4)))
def test_chunks_in_another_order_are_refused(order):
    body = encrypt_chunks(KEY, bytes(4 * SIZE), SIZE, b"")
    moved = b"".join(pieces(body)[i] for i in order)
    if list(order) == sorted(order):
        assert decrypt_chunks(KEY, moved, 4 * SIZE, SIZE, b"") == bytes(4 * SIZE)
    else:
        refuse(moved, 4 * SIZE, "number")


@given(st.integers(0, 3), st.integers(0, 3))
def test_a_repeated_chunk_is_refused_in_and_beyond_its_place(what, where):
    parts = pieces(encrypt_chunks(KEY, bytes(range(4 * SIZE)), SIZE, b""))
    longer = [*parts[:where], parts[what], *parts[where:]]
    refuse(b"".join(longer), 5 * SIZE, "number")
    if what != where:
        parts[where] = parts[what]
        refuse(b"".join(parts), 4 * SIZE, "number")


@pytest.mark.parametrize("kept", range(4))
def test_truncation_is_noticed_even_where_chunks_end(kept):
    parts = pieces(encrypt_chunks(KEY, bytes(4 * SIZE), SIZE, b""))
    refuse(b"".join(parts[:kept]), max(kept, 0) * SIZE, "number|cannot be")


def test_a_longer_content_cannot_be_made_of_a_shorter_one():
    short = encrypt_chunks(KEY, bytes(SIZE), SIZE, b"")
    refuse(short + short, 2 * SIZE, "number 0")


@given(st.integers(0, 3 * WHOLE * 8 - 1))
def test_any_flipped_bit_is_refused(position):
    body = bytearray(encrypt_chunks(KEY, bytes(3 * SIZE), SIZE, b""))
    body[position // 8] ^= 1 << position % 8
    refuse(bytes(body), 3 * SIZE, "number")


def test_another_key_chunk_size_or_bound_is_refused():
    body = encrypt_chunks(KEY, bytes(8), SIZE, b"bound")
    refuse(body, 8, key=os.urandom(32), bound=b"bound")
    refuse(body, 8, bound=b"other")
    refuse(body, 8, chunk_bytes=5, bound=b"bound")
    refuse(body, 8, "cannot be", chunk_bytes=8, bound=b"bound")


def test_lengths_are_checked_before_anything_is_allocated():
    refuse(b"", 1 << 60, "cannot be")
    refuse(b"", 0, "cannot be")
