"""Any bytes are a letter or a ProtocolError; a letter has one spelling, and all of it is signed."""

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common import letters
from proxymoe.common.errors import ProtocolError
from proxymoe.common.letters import (
    MAX_HEADER_BYTES,
    Announcement,
    Consent,
    Delivery,
    Introduction,
    Proof,
    Release,
    Roster,
    Shares,
    Survivors,
    Upload,
    Vote,
    decode,
    encode,
    statement,
)

HERE, KEY, OTHER = "ab" * 32, "11" * 32, "22" * 32
SOME: list[Any] = [
    Announcement(transcript=HERE, device=3, share_key=KEY, mask_key=OTHER),
    Roster(
        transcript=HERE,
        members=(Introduction(device=3, share_key=KEY, mask_key=OTHER, signature="0a"),),
    ),
    Shares(transcript=HERE, device=0, commitments=(KEY, OTHER)),
    Delivery(transcript=HERE, senders=(0, 2, 255)),
    Upload(transcript=HERE, device=255),
    Survivors(transcript=HERE, survivors=(1, 2)),
    Consent(transcript=HERE, device=1),
    Proof(transcript=HERE, votes=(Vote(device=1, signature="0a"),)),
    Release(transcript=HERE, device=1),
]
some = st.sampled_from(SOME)
kinds = pytest.mark.parametrize("letter", SOME, ids=lambda letter: letter.kind)


@given(some, st.binary(max_size=50), st.none() | st.binary(max_size=150))
def test_letters_survive_the_wire(letter, body, signature):
    content = encode(letter, body, None if signature is None else lambda _: signature)
    found = decode(content)
    assert (found.letter, bytes(found.body), found.signature) == (letter, body, signature or b"")


@kinds
def test_what_is_signed_is_all_of_the_letter(letter):
    signed = {statement(letter), statement(letter, b"x")}
    signed |= {statement(other) for other in SOME}
    signed.add(statement(letter.model_copy(update={"transcript": "00" * 32})))
    assert len(signed) == len(SOME) + 2
    assert all(text.startswith(b"proxymoe secure aggregation 1\n") for text in signed)


def test_an_introduction_is_the_announcement_it_passes_on():
    (member,) = SOME[1].members
    assert member.announcement(HERE) == SOME[0]


def header(content):
    frame = letters._FRAME
    _, signature, size = frame.unpack_from(content)
    start = frame.size + signature
    return json.loads(content[start : start + size])


def with_header(text, body=b""):
    return letters._FRAME.pack(letters.MAGIC, 0, len(text)) + text + body


@kinds
def test_every_field_is_needed_and_no_other_is_allowed(letter):
    fields = header(encode(letter))
    for name in fields:
        less = {key: value for key, value in fields.items() if key != name}
        with pytest.raises(ProtocolError, match="letter refused at"):
            decode(with_header(json.dumps(less).encode()))
    with pytest.raises(ProtocolError, match="letter refused at"):
        decode(with_header(json.dumps({**fields, "more": 1}).encode()))


@kinds
def test_a_letter_has_one_spelling(letter):
    fields = header(encode(letter))
    with pytest.raises(ProtocolError, match="not in canonical form"):
        decode(with_header(json.dumps(fields).encode()))


@pytest.mark.parametrize(
    "change",
    [
        {"transcript": "AB" * 32},
        {"transcript": "ab" * 31},
        {"transcript": 1},
        {"device": -1},
        {"device": 256},
        {"device": "1"},
        {"device": 1.0},
        {"device": True},
        {"share_key": "zz" * 32},
        {"share_key": KEY + "00"},
        {"mask_key": None},
        {"kind": "nothing"},
    ],
    ids=str,
)
def test_fields_out_of_range_are_refused(change):
    fields = header(encode(SOME[0])) | change
    with pytest.raises(ProtocolError, match="letter refused at"):
        decode(with_header(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()))


@pytest.mark.parametrize("senders", [[2, 1], [1, 1], [-1], [256], [1.5]], ids=str)
def test_lists_of_devices_must_increase(senders):
    fields = header(encode(SOME[3])) | {"senders": senders}
    with pytest.raises(ProtocolError, match="letter refused at"):
        decode(with_header(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()))


@pytest.mark.parametrize("signature", ["", "0", "0g", "0A", "00" * 257])
def test_signatures_that_cannot_be_are_refused(signature):
    fields = header(encode(SOME[7])) | {"votes": [{"device": 1, "signature": signature}]}
    with pytest.raises(ProtocolError, match="letter refused at"):
        decode(with_header(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not a letter of secure aggregation"),
        (b"PXA1", "not a letter of secure aggregation"),
        (encode(SOME[0])[:-1], "does not fit the letter"),
        (b"PXM1" + encode(SOME[0])[4:], "not a letter of secure aggregation"),
        (struct.pack("<4sHI", b"PXA1", 0, MAX_HEADER_BYTES + 1) + bytes(9), "does not fit"),
        (struct.pack("<4sHI", b"PXA1", 65535, 2), "does not fit the letter"),
        (bytes(MAX_HEADER_BYTES), "not a letter"),
        (with_header(b"[" * 100_000), "letter refused at"),
        (with_header(b"\xff"), "letter refused at"),
    ],
    ids=range(9),
)
def test_damaged_letters_are_refused(content, match):
    with pytest.raises(ProtocolError, match=match):
        decode(content)


def test_a_letter_that_is_too_large_is_refused():
    with pytest.raises(ProtocolError, match="letter of 9 bytes, the limit is 8"):
        decode(encode(SOME[4], bytes(9)), max_body_bytes=8)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_letter_or_refused(content):
    fuzzed(content)
    fuzzed(letters.MAGIC + content)


@pytest.mark.parametrize("count", [2_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_letters_that_were_changed_anywhere_are_letters_or_refused(count):
    rng = np.random.default_rng(0)
    contents = [encode(letter, b"body", lambda _: b"signed") for letter in SOME]
    for _ in range(count):
        content = bytearray(contents[rng.integers(len(contents))])
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(content)))
            match rng.integers(4):
                case 0:
                    content[at] ^= 1 << int(rng.integers(8))
                case 1:
                    content[at] = int(rng.integers(256))
                case 2:
                    del content[at : at + int(rng.integers(1, 9))]
                case _:
                    content[at:at] = content[: int(rng.integers(1, 9))]
            if not content:
                break
        fuzzed(bytes(content))


def fuzzed(content):
    try:
        found = decode(content)
    except ProtocolError:
        return
    assert encode(found.letter, bytes(found.body), lambda _: found.signature) == content
