"""A blob service on loopback and a device that may use it, with real certificates over TLS."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import numpy as np

from proxymoe.client.fetch import open_channel
from proxymoe.common.certificates import (
    Identity,
    new_authority,
    new_server_certificate,
    sign_device,
    signing_request,
)
from proxymoe.common.files import digest_of
from proxymoe.common.identity import new_device_key
from proxymoe.server.blobs import BlobLimits, BlobPlace, BlobService, serve_blobs

HOST = "127.0.0.1"
DEVICE = "device"


@dataclass(frozen=True, slots=True)
class Loopback:
    """Everything that the two ends need to trust each other; it can be sent to a process."""

    authority: bytes
    server: Identity
    device: Identity

    @classmethod
    def new(cls) -> "Loopback":
        """Fresh keys and certificates for one coordinator and one device."""
        now = time.time()
        authority, key = new_authority(now), new_device_key()
        server = new_server_certificate(authority, [HOST], now)
        signed = sign_device(authority, DEVICE, signing_request(DEVICE, key), now)
        return cls(authority.certificate, server, Identity(signed.certificate, key))

    @contextmanager
    def serving(self, places: Mapping[str, BlobPlace], port: int = 0) -> Iterator[int]:
        """Serves the blobs to the device while the block runs; yields the port."""
        service = BlobService(places, lambda device, _: device == DEVICE, BlobLimits())
        server, bound = serve_blobs(
            service,
            f"{HOST}:{port}",
            self.server.certificate,
            self.server.key,
            self.authority,
        )
        try:
            yield bound
        finally:
            server.stop(None).wait()

    def connector(self, port: int) -> Callable[[], grpc.Channel]:
        """Opens connections as the device."""
        return partial(
            open_channel,
            f"{HOST}:{port}",
            self.authority,
            self.device.certificate,
            self.device.key,
        )


def write_blobs(
    folder: Path, sizes: Sequence[int], rng: np.random.Generator
) -> dict[str, BlobPlace]:
    """Random blobs of these sizes, each in a file of its own; where they lie, by digest."""
    places = {}
    for number, size in enumerate(sizes):
        content = rng.bytes(size)
        path = folder / f"{number:04d}.blob"
        path.write_bytes(content)
        places[digest_of(content)] = BlobPlace(path, 0, size)
    return places
