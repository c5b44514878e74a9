"""A TCP proxy on 127.0.0.1 that cuts, corrupts or swallows what a server sends."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

PIECE = 64 << 10
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of a socket that is closed at once, with what it still had to send."""


class FaultyProxy:
    """Forwards connections to a port; faults count the bytes of all connections together.

    Args:
        target: the server's port on 127.0.0.1.
        cut_every: after so many bytes from the server, resets the connection they came over.
        corrupt_every: after so many bytes from the server, flips a bit of the next.
        swallow_after: after so many bytes from the server, begins to swallow, once.
    """

    def __init__(
        self,
        target: int,
        cut_every: int | None = None,
        corrupt_every: int | None = None,
        swallow_after: int | None = None,
    ) -> None:
        self._target, self._swallow_after = target, swallow_after
        self._cut_every, self._corrupt_every = cut_every, corrupt_every
        self.num_bytes = 0
        """Bytes that the server has sent."""
        self.num_cuts = self.num_corrupted = self.num_connections = 0
        self.swallows = threading.Event()
        """While set, nothing is forwarded, and nobody is told."""
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> "FaultyProxy":
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            sockets = list(self._sockets)
        for each in sockets:
            _reset(each)
        for thread in self._threads:
            thread.join()

    def _start(self, run: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=run, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                device, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                device.close()
                continue
            with self._lock:
                self.num_connections += 1
                self._sockets |= {device, server}
            self._start(self._forward, device, server, False)
            self._start(self._forward, server, device, True)

    def _forward(self, source: socket.socket, sink: socket.socket, harmful: bool) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(PIECE):
                if self.swallows.is_set():
                    continue
                if harmful:
                    content = self._harmed(content)
                sink.sendall(content)
                if not content:
                    break
        _reset(source)
        _reset(sink)
        with self._lock:
            self._sockets -= {source, sink}

    def _harmed(self, content: bytes) -> bytes:
        """What is forwarded in place of the content; nothing if the connection is to be cut."""
        with self._lock:
            before, self.num_bytes = self.num_bytes, self.num_bytes + len(content)
            if _due(self._corrupt_every, before, self.num_bytes):
                self.num_corrupted += 1
                content = bytes([content[0] ^ 1]) + content[1:]
            if _due(self._cut_every, before, self.num_bytes):
                self.num_cuts += 1
                content = b""
            if self._swallow_after is not None and before < self._swallow_after <= self.num_bytes:
                self.swallows.set()
        return content


def _due(every: int | None, before: int, after: int) -> bool:
    return every is not None and before // every < after // every


def _reset(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        each.shutdown(socket.SHUT_RDWR)
    each.close()
