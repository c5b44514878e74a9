"""Process edge: the coordinator's own processes, as `serve` starts them.

`python -m proxymoe.server.parts PART DIRECTORY`, with one of these parts: `gateway` (enrolment,
messages, and the status API on loopback), `blobs` (models and assignments), `conductor` (sees to
it that the rounds are run). Flower's own processes are in `server/flower.py`.
"""

import asyncio
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from proxymoe.common.errors import ProxyMoEError
from proxymoe.common.identity import key_digest, verifying_key
from proxymoe.common.offline import LOOPBACK
from proxymoe.server.conductor import Conductor, Scene
from proxymoe.server.devices import Devices
from proxymoe.server.enrolment import Enrolment, RateLimit
from proxymoe.server.flower import SuperLink, superlink_address
from proxymoe.server.gateway import gateway, listener, superlink_client
from proxymoe.server.run_directory import RunDirectory
from proxymoe.server.status import engine, rounds, status

log = logging.getLogger(__name__)

MISCONFIGURED = 78
"""Exit code, as in sysexits.h: it cannot start like this; the last line of the log says why."""
GRACE_SECONDS = 5.0
"""How long streams may go on when the blob service is told to stop."""


def serve_gateway(run: RunDirectory) -> None:
    """Serves gateway and status API until SIGTERM."""
    settings, network = run.settings, run.settings.network
    devices = Devices(run.devices_db)
    enrolment = Enrolment(
        registry=devices,
        authority=run.authority,
        coordinator=verifying_key(run.signing_key),
        blobs=network.blob_address,
        register=registration(devices, SuperLink(run).register),
    )
    client = superlink_client(f"https://{superlink_address(run)}", run.authority_certificate)
    tls = (None, None) if network.plain_text else (run.server_certificate, run.server_key)
    public = listener(
        gateway(client, enrolment, RateLimit()), network.host, network.gateway_port, *tls
    )
    log.info("run %s: gateway at %s", settings.run, network.gateway_address)
    asyncio.run(_both(uvicorn.Server(public), uvicorn.Server(status_listener(run))))


def registration(
    devices: Devices, tell: Callable[[str, bytes], int | None]
) -> Callable[[str, bytes], None]:
    """Tells Flower a device's key and remembers the node: `Enrolment.register`.

    Asking Flower takes seconds, in which a device may lose patience; when it asks again, it is
    known. If Flower knows the key, and we not its node (we were killed in between), the ServerApp
    finds it out.
    """

    def register(device: str, public_key: bytes) -> None:
        key = key_digest(public_key)
        if any(entry.key == key and entry.node is not None for entry in devices.entries()):
            return
        node = tell(device, public_key)
        if node is not None:
            devices.note_node(key, node)

    return register


def status_listener(run: RunDirectory) -> uvicorn.Config:
    """How to serve the status API, in plain text on loopback.

    It answers GET /status with `server.status.Status` as JSON, and /rounds with all rounds.
    """

    def answering(read: Callable[[], Any]) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def answer(_request: Request) -> Response:
            try:
                return JSONResponse(await run_in_threadpool(read))
            except ProxyMoEError as error:
                return JSONResponse({"error": str(error)}, 500)

        return answer

    routes = {
        "/status": lambda: status(run).as_json(),
        "/rounds": lambda: rounds(run).as_json(),
    }
    return uvicorn.Config(
        Starlette(routes=[Route(path, answering(read)) for path, read in routes.items()]),
        host=LOOPBACK,
        port=run.settings.network.status_port,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
    )


def serve_plans_and_blobs(run: RunDirectory) -> None:
    """Serves blobs and assignments until SIGTERM; prepares what they follow from, if need be."""
    # torch takes seconds to import, and hundreds of megabytes; the other parts do without.
    from proxymoe.server.blobs import BlobService, serve_blobs  # noqa: PLC0415
    from proxymoe.server.planner import Planner  # noqa: PLC0415
    from proxymoe.server.plans import enrolled_caller, plans_handler  # noqa: PLC0415

    network, authority = run.settings.network, run.authority_certificate
    planner = Planner(run, lambda *stage: log.info("%s: %d of %d", *stage))
    caller = enrolled_caller(planner.devices, authority)
    limits = run.settings.blobs.limits()
    service = BlobService(planner.places, planner.allowed, limits, caller=caller)
    plans = plans_handler(planner.assign, caller, run.signing_key)
    told = _told_to_stop()
    server, port = serve_blobs(
        service,
        f"{network.host}:{network.blob_port}",
        run.server_certificate.read_bytes(),
        run.server_key.read_bytes(),
        authority,
        [plans],
    )
    log.info("run %s: blobs on %s:%d", run.settings.run, network.host, port)
    told.wait()
    server.stop(GRACE_SECONDS).wait()


def conduct(run: RunDirectory) -> None:
    """Sees to it that the rounds are run, until SIGTERM."""
    wanted = run.settings.federation.rounds

    def look() -> Scene:
        found = engine(run)
        return Scene(
            finished=rounds(run).finished(wanted),
            alive=found is not None and found.alive,
            run=found.run if found else None,
        )

    told = _told_to_stop()
    Conductor(SuperLink(run), look, time.monotonic).run(told.wait)


PARTS: dict[str, Callable[[RunDirectory], None]] = {
    "gateway": serve_gateway,
    "blobs": serve_plans_and_blobs,
    "conductor": conduct,
}


def command(part: str, run: RunDirectory) -> tuple[str, ...]:
    """The command line of a part."""
    assert part in PARTS, part
    return (sys.executable, "-P", "-m", "proxymoe.server.parts", part, str(run.path))


def main(arguments: Sequence[str]) -> int:
    """Runs a part until it ends; returns the exit code."""
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stdout,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    part, folder = arguments
    try:
        PARTS[part](RunDirectory(Path(folder)))
    except (ProxyMoEError, OSError) as error:
        log.error("%s: %s", part, error)
        return MISCONFIGURED
    return 0


def _told_to_stop() -> threading.Event:
    """Is set by SIGTERM and SIGINT."""
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    return told


async def _both(*servers: uvicorn.Server) -> None:
    """Serves until one of them ends; then all end."""
    tasks = [asyncio.create_task(server.serve()) for server in servers]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for server in servers:
        server.should_exit = True
    await asyncio.gather(*tasks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
