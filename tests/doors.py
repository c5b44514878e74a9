"""Real certificates, a registry in memory, and apps served on loopback, for tests."""

import asyncio
import contextlib
import socket
import threading
import time

import uvicorn

from proxymoe.common import certificates, identity, tickets
from proxymoe.server.enrolment import Enrolment, Invitation, Standing

NOW = time.time()
AUTHORITY = certificates.new_authority(NOW)
SERVER = certificates.new_server_certificate(AUTHORITY, ["127.0.0.1"], NOW)
COORDINATOR = identity.verifying_key(identity.new_signing_key())


class Registry:
    """A `server.enrolment.Registry` that forgets when it ends."""

    def __init__(self):
        self.invitations = {}
        self.claimed = {}
        self.certificates = []
        self.standings = {}
        self._lock = threading.Lock()

    def invite(self, token):
        self.invitations[token.device] = Invitation(
            tickets.secret_digest(token.secret), token.expires
        )
        self.claimed.pop(token.device, None)

    def standing(self, key):
        return self.standings.get(key, Standing.UNKNOWN)

    def invitation(self, device):
        return self.invitations.get(device)

    def claim(self, device, key):
        with self._lock:
            return self.claimed.setdefault(device, key) == key

    def admit(self, certificate):
        self.certificates.append(certificate)
        self.standings[certificate.key] = Standing.ENROLLED


class Applicant:
    """A device that has a token and a key, and is not known yet."""

    def __init__(self, registry, name="phone", expires=NOW + 600):
        self.key = identity.new_device_key()
        self.token = tickets.new_token("127.0.0.1:1", AUTHORITY.certificate, name, expires)
        registry.invite(self.token)

    def request(self, key=None, **fields):
        request = certificates.signing_request(self.token.device, key or self.key)
        proper = {
            "device": self.token.device,
            "secret": self.token.secret,
            "request": request.decode(),
        }
        return tickets.EnrolRequest(**{**proper, **fields})


def enrolment(registry, register=lambda device, public_key: None):
    return Enrolment(registry, AUTHORITY, COORDINATOR, "localhost:9095", register)


class Server(uvicorn.Server):
    """A server that ends as soon as it is told; uvicorn looks every tenth of a second."""

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            await asyncio.sleep(0.005)


@contextlib.contextmanager
def serving(config):
    """The port of a uvicorn server on 127.0.0.1, in a thread; it ends with the block."""
    server = Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=[[listening]])
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.005)
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def free_port():
    """A port where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]
