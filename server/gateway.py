"""The only public HTTP port: what a device's Flower node needs of the SuperLink, and enrolment.

Flower serves devices, operators and its own workers on one port, and does not ask operators who
they are. So the SuperLink listens on loopback only, and this gateway passes on the ten operations
of a node, for enrolled devices whose signature it has checked. A node gives up for good at a 500,
so whatever fails behind the gateway becomes a 503, which a node tries again.
"""

import asyncio
import base64
import contextlib
import logging
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import httpx
import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from proxymoe.common.addresses import is_loopback
from proxymoe.common.errors import ConfigError, ProtocolError
from proxymoe.common.identity import check_device_signature, key_digest
from proxymoe.common.tickets import EnrolRequest
from proxymoe.server.enrolment import Enrolment, RateLimit, Refused, Standing, busy, enrol

log = logging.getLogger(__name__)

FLEET = "/v1/fleet/"
OPERATIONS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
PUBLIC_KEY, TIMESTAMP, SIGNATURE = "flwr-public-key", "flwr-timestamp", "flwr-signature"
"""Headers of a node: its PEM key and its signature of the timestamp are in base64."""
PASSED = ("accept", "content-length", "content-type")
"""Headers that go through besides `flwr-*`, either way."""
MAX_BODY_BYTES = 64 << 20
MAX_ENROL_BYTES = 64 << 10
ENROL_SECONDS = 10
"""How long an enrolment request may take to arrive."""
MAX_CONNECTIONS = 1024


def node_key(headers: Mapping[str, str]) -> str:
    """Digest of the device key that signed a node's headers; how old they are Flower checks.

    Raises:
        ProtocolError: they are missing, malformed, or not signed by the key that they name.
    """
    try:
        public_key = base64.b64decode(headers[PUBLIC_KEY], validate=True)
        signature = base64.b64decode(headers[SIGNATURE], validate=True)
        timestamp = headers[TIMESTAMP].encode("ascii")
    except (KeyError, ValueError):
        raise ProtocolError("headers of a Flower node are missing or malformed") from None
    check_device_signature(public_key, timestamp, signature)
    return key_digest(public_key)


def superlink_client(url: str, authority: bytes | None) -> httpx.AsyncClient:
    """A client of the SuperLink at `url`, on loopback; it trusts this PEM authority only.

    An idle connection is dropped before the SuperLink would, after 5 s: requests never race that.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs a line per request
    trust = ssl.create_default_context(cadata=authority.decode()) if authority else True
    return httpx.AsyncClient(
        base_url=url,
        verify=trust,
        trust_env=False,
        timeout=httpx.Timeout(30.0, connect=2.0, pool=5.0),
        limits=httpx.Limits(max_connections=256, keepalive_expiry=2.0),
    )


def gateway(
    superlink: httpx.AsyncClient,
    enrolment: Enrolment,
    limit: RateLimit,
    clock: Callable[[], float] = time.time,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> Starlette:
    """The ASGI application; it closes `superlink` when it ends. Whatever it does not know is 404.

    Args:
        limit: attempts to enrol.
        clock: unix seconds.
        max_body_bytes: of one operation, which is 413 beyond that.
    """
    doors = _Gateway(superlink, enrolment, limit, clock, max_body_bytes)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with superlink:
            yield

    app = Starlette(
        routes=[
            Route(FLEET + "{operation}", doors.forward, methods=["POST"]),
            Route("/enrol", doors.enrol, methods=["POST"]),
            Route("/health", doors.health, methods=["GET"]),
        ],
        exception_handlers={
            Refused: _refused,
            HTTPException: _not_found,
            ClientDisconnect: _gone,
            Exception: _failed,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


def listener(
    app: Starlette, host: str, port: int, certificate: Path | None, key: Path | None
) -> uvicorn.Config:
    """How to serve the gateway: over TLS with these PEM files, or in plain text on loopback.

    Raises:
        ConfigError: plain text beyond loopback.
    """
    if certificate is None and not is_loopback(host):
        raise ConfigError(f"plain text on {host}: only loopback may do without TLS; see `init`")
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        # Addresses are what connects; a header could name any, and evade the rate limit.
        proxy_headers=False,
        server_header=False,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,  # every node asks every few seconds
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=5,
    )


class _Gateway:
    def __init__(
        self,
        superlink: httpx.AsyncClient,
        enrolment: Enrolment,
        limit: RateLimit,
        clock: Callable[[], float],
        max_body_bytes: int,
    ) -> None:
        self._superlink = superlink
        self._enrolment = enrolment
        self._limit = limit
        self._clock = clock
        self._max_body_bytes = max_body_bytes
        self._trouble = ""

    async def forward(self, request: Request) -> Response:
        """Passes one operation of an enrolled node on; bodies go through as they come."""
        operation = request.path_params["operation"]
        if operation not in OPERATIONS:
            raise HTTPException(404)
        # Who asks comes first: nobody else makes the SuperLink hold a body in memory.
        try:
            key = node_key(request.headers)
        except ProtocolError as error:
            raise Refused(401, "unauthenticated", str(error)) from None
        standing = await run_in_threadpool(self._enrolment.registry.standing, key)
        if standing is not Standing.ENROLLED:
            raise Refused(403, standing, f"this device key is {standing}; enrol the device again")
        passed = self._superlink.build_request(
            "POST",
            FLEET + operation,
            headers=_passed(request.headers) | {"accept-encoding": "identity"},
            content=_body(request, self._max_body_bytes),
        )
        try:
            answer = await self._superlink.send(passed, stream=True)
        except httpx.RequestError as error:
            self._note(f"does not answer ({type(error).__name__})")
            raise busy() from None
        if answer.status_code == httpx.codes.INTERNAL_SERVER_ERROR:
            await answer.aclose()
            self._note(f"failed to {operation}")
            raise busy()
        self._note("")
        # Starlette ends this stream when the device leaves, and httpx then lets the SuperLink go.
        return StreamingResponse(answer.aiter_raw(), answer.status_code, _passed(answer.headers))

    async def enrol(self, request: Request) -> Response:
        """Answers a new device."""
        if wait := self._limit.wait(request.client.host if request.client else ""):
            raise Refused(429, "too many", "too many attempts from this address; wait", wait)
        try:
            async with asyncio.timeout(ENROL_SECONDS):
                chunks = [chunk async for chunk in _body(request, MAX_ENROL_BYTES)]
            asked = EnrolRequest.model_validate_json(b"".join(chunks))
        except TimeoutError:
            raise Refused(408, "slow", f"no request within {ENROL_SECONDS} s") from None
        except ValidationError:
            raise Refused(400, "malformed", "no enrolment request of this version") from None
        reply = await run_in_threadpool(enrol, asked, self._enrolment, self._clock())
        return JSONResponse(reply.model_dump())

    async def health(self, _request: Request) -> Response:
        """Says that the gateway itself is there."""
        return JSONResponse({"status": "ok"})

    def _note(self, trouble: str) -> None:
        """Logs how the SuperLink is when that changes, and not for every node that asks."""
        if trouble != self._trouble:
            self._trouble = trouble
            log.warning("SuperLink %s", trouble or "answers again")


def _body(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The request's body in chunks; Refused before or while it exceeds `limit` bytes."""
    too_large = Refused(413, "too large", f"the limit is {limit} bytes")

    async def chunks() -> AsyncIterator[bytes]:
        total = 0
        async for chunk in request.stream():
            total += len(chunk)
            if total > limit:
                raise too_large
            yield chunk

    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > limit:
        raise too_large
    return chunks()


def _passed(headers: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in headers.items()
        if name.lower() in PASSED or name.lower().startswith("flwr-")
    }


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    after = {"retry-after": f"{max(1.0, error.retry_after):.0f}"} if error.retry_after else None
    return JSONResponse({"error": error.error, "detail": error.detail}, error.status, after)


async def _not_found(_request: Request, _error: Exception) -> Response:
    return JSONResponse({"error": "not found", "detail": "no such operation"}, 404)


async def _gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it


async def _failed(request: Request, _error: Exception) -> Response:
    return await _refused(request, busy())  # Starlette raises the error again, into the log
