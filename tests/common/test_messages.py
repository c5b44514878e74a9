"""Any bytes are a message or a ProtocolError; every message survives the wire."""

import contextlib
import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from proxymoe.common.config import TrainSettings
from proxymoe.common.errors import ProtocolError
from proxymoe.common.messages import (
    MAGIC,
    MAX_HEADER_BYTES,
    Refusal,
    TrainReply,
    TrainTask,
    decode,
    encode,
)
from tests.laws import tried

ADDRESS = {
    "run": "run",
    "round": 3,
    "device": "kitchen",
    "base": "ab" * 32,
    "plan": "cd" * 32,
    "layout": "ef" * 32,
}
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
names = st.text(max_size=128)
addresses = st.fixed_dictionaries(
    {
        "run": names,
        "round": st.integers(0, 2**40),
        "device": names,
        "base": digests,
        "plan": digests,
        "layout": digests,
    }
)
finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
tasks = st.builds(
    lambda address, **fields: TrainTask(**address, **fields),
    addresses,
    train=st.builds(
        TrainSettings,
        steps=st.integers(1, 10**9),
        learning_rate=st.floats(0, 1e6, exclude_min=True),
    ),
    clip_norm=positive,
    seed=st.integers(0, 2**63),
)
replies = st.builds(
    lambda address, **fields: TrainReply(**address, **fields),
    addresses,
    num_examples=st.integers(1, 10**9),
    first_loss=finite,
    last_loss=finite,
    norm=st.floats(0, allow_infinity=False),
    seconds=st.floats(0, allow_infinity=False),
    peak_rss_mb=st.floats(0, allow_infinity=False),
)
refusals = st.builds(
    lambda address, reason: Refusal(**address, reason=reason),
    addresses,
    st.sampled_from(["diverged", "mismatch", "policy", "data", "failed"]),
)
messages = tasks | replies | refusals
vectors = hnp.arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32, allow_nan=False))


def refusal(**fields):
    return Refusal(**{**ADDRESS, "reason": "policy", **fields})


def framed(header, body=b"", length=None, magic=MAGIC):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return magic + struct.pack("<I", len(encoded) if length is None else length) + encoded + body


def refuse(content, reason, **limits):
    with pytest.raises(ProtocolError, match=reason):
        decode(content, **limits)


@given(messages, vectors)
def test_a_message_survives_the_wire(message, vector):
    again, numbers = decode(encode(message, vector))
    assert again == message
    assert numbers.dtype == np.float32
    assert numbers.tobytes() == vector.tobytes()


@given(messages)
def test_no_vector_is_an_empty_vector(message):
    assert decode(encode(message))[1].size == 0


@tried(200)
@given(st.binary(max_size=400) | st.binary(max_size=400).map(lambda tail: MAGIC + tail))
def test_any_bytes_are_a_message_or_a_protocol_error(content):
    with pytest.raises(ProtocolError):
        decode(content)


@tried(200)
@given(st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_a_damaged_message_is_a_message_or_a_protocol_error(position, byte, cut):
    task = TrainTask(**ADDRESS, train=TrainSettings(), clip_norm=1.0, seed=0)
    content = bytearray(encode(task, np.ones(5, np.float32)))
    position %= len(content)
    content[position:] = b"" if cut else bytes([byte]) + content[position + 1 :]
    with contextlib.suppress(ProtocolError):
        decode(bytes(content))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([*ADDRESS, "kind", "reason", "x"]), inner)
        ),
        max_leaves=12,
    )
)
def test_any_json_header_is_a_message_or_a_protocol_error(header):
    with contextlib.suppress(ProtocolError):
        decode(framed(header))


@pytest.mark.parametrize("size", range(8))
def test_a_message_shorter_than_its_frame_is_refused(size):
    refuse(encode(refusal())[:size], "not a ProxyMoE message of version 1")


def test_another_version_is_refused():
    header = refusal().model_dump()
    refuse(framed(header, magic=b"PXM2"), "not a ProxyMoE message of version 1")


@pytest.mark.parametrize("length", [10**6, MAX_HEADER_BYTES + 1, 2**32 - 1])
def test_a_header_longer_than_message_or_limit_is_refused(length):
    refuse(framed({}, length=length), f"header of {length} bytes does not fit")
    padding = b" " * (MAX_HEADER_BYTES + 1)
    refuse(framed(padding), f"header of {len(padding)} bytes does not fit")


def test_a_vector_over_its_limit_or_of_no_whole_numbers_is_refused():
    content = encode(refusal(), np.zeros(3, np.float32))
    assert decode(content, max_vector_bytes=12)[1].size == 3
    refuse(content, "vector of 12 bytes, the limit is 11", max_vector_bytes=11)
    refuse(content, "the limit is 0", max_vector_bytes=0)
    refuse(content + b"\0", "vector of 13 bytes")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"round": -1}, "round"),
        ({"base": "AB" * 32}, "base"),
        ({"plan": "cd" * 31}, "plan"),
        ({"layout": "ef" * 32 + "\n"}, "layout"),
        ({"device": "x" * 129}, "device"),
        ({"reason": "no reason"}, "reason"),
        ({"extra": 1}, "extra"),
        ({"kind": "order"}, r"\['"),
        ({"run": None}, "run"),
    ],
)
def test_a_header_with_a_bad_field_is_refused_by_its_name(fields, named):
    refuse(framed({**ADDRESS, "kind": "refusal", "reason": "policy", **fields}), named)


@pytest.mark.parametrize(
    "settings_",
    [
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"steps": 0},
        {"batch_size": -1},
        {"optimizer": "exec"},
        {"code": "import os"},
    ],
)
def test_a_task_with_impossible_settings_is_refused(settings_):
    task = {**ADDRESS, "kind": "train", "clip_norm": 1.0, "seed": 0}
    decode(framed({**task, "train": {}}))
    refuse(framed({**task, "train": settings_}), "train")


@pytest.mark.parametrize("clip_norm", [0, -1, "Infinity", None])
def test_a_task_without_a_clip_norm_is_refused(clip_norm):
    refuse(
        framed({**ADDRESS, "kind": "train", "train": {}, "seed": 0, "clip_norm": clip_norm}),
        "clip_norm",
    )


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 5000])
def test_a_header_that_is_no_json_object_is_refused(content):
    refuse(framed(content), "header refused")


def test_a_refusal_says_no_value_of_the_refused_header():
    secret = "what the user typed"
    with pytest.raises(ProtocolError) as refused:
        decode(framed({**ADDRESS, "kind": "refusal", "reason": secret}))
    assert secret not in str(refused.value)


def test_a_header_over_the_limit_is_not_sent():
    message = refusal().model_copy(update={"run": "x" * MAX_HEADER_BYTES})
    with pytest.raises(ProtocolError, match=f"the limit is {MAX_HEADER_BYTES}"):
        encode(message)
