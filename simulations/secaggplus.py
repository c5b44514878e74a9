"""Flower's SecAgg+, from its own primitives, as something to measure ours against.

Its workflow runs with Flower's legacy interfaces only; its primitives can still be imported, and
are used here in the order in which its mod and its workflow use them.
"""

import os
import time
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read once, when flwr is imported

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_mod
from flwr.common.secure_aggregation.quantization import dequantize, quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

from proxymoe.common.fixed_point import Floats

DROPPED = 0.1
CLIPPING_RANGE, TARGET_RANGE, MODULUS, MAX_WEIGHT = 8.0, 1 << 22, 1 << 32, 1000.0
"""Defaults of SecAggPlusWorkflow."""
SOME_EXAMPLES = 50
"""A small device's examples; Flower scales its update by these over MAX_WEIGHT."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One way to sum, measured."""

    total: np.ndarray[tuple[int], np.dtype[np.float64]]
    device_seconds: float
    """Mean over devices, all phases."""
    server_seconds: float
    device_bytes: float
    """Mean over surviving devices, everything sent."""


class Clock:
    """Adds up the processor seconds spent inside it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.process_time() - self._started


def drops_out(device: int, count: int) -> bool:
    """Whether this one of `count` devices never uploads; every tenth does not."""
    stride = round(1 / DROPPED)
    return device % stride == stride - 1 and device < stride * int(count * DROPPED)


def relative_error(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """L2 norm of the difference over that of what is expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def secaggplus(vectors: list[Floats]) -> Measured:
    """Flower's primitives in the order in which its mod and workflow use them, complete graph.

    At weight 1, where its precision is best. Sealing shares and signing, which it lacks, are left
    out, so its seconds are a lower bound.
    """
    count, shape = len(vectors), vectors[0].shape
    least = 2 * count // 3 + 1
    device, server = Clock(), Clock()
    with device:
        keys = [ec.generate_private_key(ec.SECP384R1()) for _ in vectors]
        seeds = [os.urandom(32) for _ in vectors]
        shares = [create_shares(seed, least, count) for seed in seeds]
    masked_sum, sent = np.zeros(shape, dtype=np.int64), 0
    present = [i for i in range(count) if not drops_out(i, count)]
    for i in present:
        with device:
            words = quantize([vectors[i].astype(np.float64)], CLIPPING_RANGE, TARGET_RANGE)[
                0
            ].astype(np.int64)
            words += pseudo_rand_gen(seeds[i], MODULUS, [shape])[0]
            for j in range(count):
                if j != i:
                    mask = _pair_mask(keys[i], keys[j], shape)
                    words = words + mask if i > j else words - mask
            words = parameters_mod([words], MODULUS)[0]
            content = words.tobytes()
        with server:
            masked_sum += np.frombuffer(content, dtype=np.int64)
        sent = len(content)
    with server:
        for i in present:
            seed = combine_shares(shares[i][:least])
            masked_sum -= pseudo_rand_gen(seed, MODULUS, [shape])[0]
        for i in sorted(set(range(count)) - set(present)):
            for j in present:
                mask = _pair_mask(keys[i], keys[j], shape)
                masked_sum += mask if i > j else -mask
        total = parameters_mod([masked_sum], MODULUS)[0]
        # As the workflow does, which knows the number of devices by their summed weight.
        decoded = dequantize([total], CLIPPING_RANGE, TARGET_RANGE)[0]
        decoded -= (len(present) - 1) * CLIPPING_RANGE
    return Measured(decoded, device.seconds / len(present), server.seconds, sent)


def _pair_mask(
    own: ec.EllipticCurvePrivateKey, other: ec.EllipticCurvePrivateKey, shape: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    return pseudo_rand_gen(generate_shared_key(own, other.public_key()), MODULUS, [shape])[0]


def small_weight_error(vectors: list[Floats]) -> float:
    """Relative error of Flower's quantisation for devices with `SOME_EXAMPLES`; masks add none."""
    weight = SOME_EXAMPLES / MAX_WEIGHT
    found, expected = np.zeros(vectors[0].size), np.zeros(vectors[0].size)
    for vector in vectors:
        scaled = weight * vector.astype(np.float64)
        words = quantize([scaled], CLIPPING_RANGE, TARGET_RANGE)
        found += dequantize(words, CLIPPING_RANGE, TARGET_RANGE)[0]
        expected += scaled
    return relative_error(found, expected)
