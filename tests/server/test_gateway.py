"""What passes is a node's ten operations, from enrolled devices; everything failing is a 503."""

import asyncio
import base64
import contextlib
import inspect
import ssl
from datetime import UTC, datetime

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from proxymoe.common import certificates, identity
from proxymoe.common.errors import ConfigError
from proxymoe.server.enrolment import RateLimit, Standing
from proxymoe.server.gateway import FLEET, OPERATIONS, gateway, listener, superlink_client
from tests.doors import AUTHORITY, NOW, SERVER, Applicant, Registry, enrolment, free_port, serving
from tests.waiting import until

MAX_BODY = 100_000
KEY = identity.new_device_key()
PUBLIC = identity.public_key(KEY)
DIGEST = identity.key_digest(PUBLIC)


def signed(key=KEY, public=None, timestamp=None, **headers):
    """Headers as a Flower node makes them, changed as told; None leaves one out."""
    timestamp = timestamp or datetime.now(UTC).isoformat()
    signature = identity.load_device_key(key).sign(timestamp.encode(), ec.ECDSA(hashes.SHA256()))
    proper = {
        "flwr-public-key": base64.b64encode(public or identity.public_key(key)).decode(),
        "flwr-timestamp": timestamp,
        "flwr-signature": base64.b64encode(signature).decode(),
        "content-type": "application/protobuf",
        "accept": "application/protobuf",
    }
    changed = {**proper, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return {name: value for name, value in changed.items() if value is not None}


def good_answer(body):
    return Response(b"\x00answer:" + body, headers={"flwr-note": "hi", "x-own": "1"})


class SuperLink:
    """A real server in the SuperLink's place, which records all that reaches it."""

    def __init__(self):
        self.port = 0
        self.requests = []
        self.cut_off = 0
        """Requests that ended before they were whole."""
        self.answer = good_answer

    async def receive(self, request):
        try:
            body = await request.body()
        except ClientDisconnect:
            self.cut_off += 1
            raise
        self.requests.append((request.url.path, dict(request.headers), body))
        answer = self.answer(body)
        return await answer if inspect.isawaitable(answer) else answer

    def app(self):
        everything = Route("/{path:path}", self.receive, methods=["GET", "POST", "PUT", "DELETE"])
        return Starlette(routes=[everything])


@pytest.fixture(scope="module")
def pems(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    (folder / "server.pem").write_bytes(SERVER.certificate)
    (folder / "server.key").write_bytes(SERVER.key)
    return folder / "server.pem", folder / "server.key"


@pytest.fixture(scope="module")
def superlink(pems):
    """The stand-in, over TLS as the real one; `.port` says where."""
    stand_in = SuperLink()
    certificate, key = pems

    config = uvicorn.Config(
        stand_in.app(), ssl_certfile=certificate, ssl_keyfile=key, log_config=None, ws="none"
    )
    with serving(config) as stand_in.port:
        yield stand_in


@pytest.fixture
def registry():
    found = Registry()
    found.standings[DIGEST] = Standing.ENROLLED
    return found


def trusting(authority=AUTHORITY):
    return ssl.create_default_context(cadata=authority.certificate.decode())


@pytest.fixture
def door(superlink, registry, pems):
    """A client of a gateway over TLS, in front of the stand-in."""
    superlink.requests.clear()
    superlink.answer = good_answer
    with gate(f"https://127.0.0.1:{superlink.port}", registry, pems) as client:
        yield client


@contextlib.contextmanager
def gate(upstream, registry, pems, limit=None):
    """A client of a gateway over TLS."""
    app = gateway(
        superlink_client(upstream, AUTHORITY.certificate),
        enrolment(registry),
        limit or RateLimit(),
        max_body_bytes=MAX_BODY,
    )
    with (
        serving(listener(app, "127.0.0.1", 0, *pems)) as port,
        httpx.Client(
            base_url=f"https://127.0.0.1:{port}", verify=trusting(), trust_env=False
        ) as client,
    ):
        yield client


def pull(door, content=b"body", headers=None, operation="pull-messages"):
    return door.post(FLEET + operation, content=content, headers=headers or signed())


def test_the_ten_operations_pass_both_ways_unchanged(door, superlink):
    body = bytes(range(256)) * 64
    for operation in OPERATIONS:
        answer = pull(door, body, signed(flwr_component_name="SuperNode"), operation)
        assert (answer.status_code, answer.content) == (200, b"\x00answer:" + body)
        assert answer.headers["flwr-note"] == "hi"
        path, headers, received = superlink.requests[-1]
        assert (path, received) == (FLEET + operation, body)
        assert headers["flwr-component-name"] == "SuperNode"
        assert headers["content-type"] == headers["accept"] == "application/protobuf"
        assert headers["content-length"] == str(len(body))
    assert len(OPERATIONS) == len(superlink.requests) == 10


def test_only_flower_s_own_headers_pass(door, superlink):
    answer = pull(door, headers=signed(authorization="Bearer x", x_forwarded_for="1.2.3.4"))
    assert "x-own" not in answer.headers
    headers = superlink.requests[-1][1]
    assert not {"authorization", "x-forwarded-for", "cookie"} & set(headers)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/control/start-run"),
        ("POST", "/v1/control/register-node"),
        ("POST", "/v1/runtime/acquire-task"),
        ("POST", "/v1/fleet/register-node"),
        ("POST", "/v1/fleet/unregister-node"),
        ("POST", "/v1/fleet/"),
        ("POST", "/v1/fleet/pull-messages/"),
        ("POST", "/v1/fleet/pull-messages%0a"),
        ("POST", "/v1/fleet/pull-messages/../../control/start-run"),
        ("POST", "/v1/fleet/..%2fcontrol%2fstart-run"),
        ("POST", "//v1/fleet/pull-messages"),
        ("GET", "/v1/fleet/pull-messages"),
        ("PUT", "/v1/fleet/pull-messages"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/"),
        ("GET", "/enrol"),
        ("POST", "/health"),
    ],
)
def test_everything_else_is_not_found_and_reaches_nothing(door, superlink, method, path):
    url = door.base_url.copy_with(raw_path=path.encode())
    answer = door.request(method, url, headers=signed())
    assert answer.status_code == 404
    assert answer.json()["error"] == "not found"
    assert superlink.requests == []


def test_health_says_that_the_gateway_is_there(door, superlink):
    answer = door.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    assert superlink.requests == []


@pytest.mark.parametrize("standing", [Standing.UNKNOWN, Standing.REVOKED])
def test_a_device_that_is_not_enrolled_is_turned_away(door, superlink, registry, standing):
    registry.standings[DIGEST] = standing
    answer = pull(door)
    assert (answer.status_code, answer.json()["error"]) == (403, standing.value)
    assert superlink.requests == []
    registry.standings[DIGEST] = Standing.ENROLLED
    assert pull(door).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        signed(flwr_public_key=None),
        signed(flwr_signature=None),
        signed(flwr_timestamp=None),
        signed(flwr_timestamp="2026-11-22T00:00:00+00:00"),
        signed(flwr_public_key="no base64!"),
        signed(flwr_public_key=base64.b64encode(b"no key").decode()),
        signed(flwr_signature=base64.b64encode(b"no signature").decode()),
        signed(key=identity.new_device_key(), public=PUBLIC),
    ],
    ids=[
        "no key",
        "no signature",
        "no time",
        "other time",
        "no base64",
        "bad key",
        "bad",
        "other key",
    ],
)
def test_who_did_not_sign_is_turned_away_before_a_byte_is_passed_on(door, superlink, headers):
    answer = pull(door, headers=headers)
    assert (answer.status_code, answer.json()["error"]) == (401, "unauthenticated")
    assert superlink.requests == []


def test_an_oversized_body_is_refused(door, superlink):
    answer = pull(door, b"x" * (MAX_BODY + 1))
    assert (answer.status_code, answer.json()["error"]) == (413, "too large")
    assert superlink.requests == []
    assert pull(door, b"x" * MAX_BODY).status_code == 200


def test_an_oversized_body_of_unknown_length_is_cut_off(door, superlink):
    answer = pull(door, (b"x" * 10_000 for _ in range(MAX_BODY // 10_000 + 1)))
    assert answer.status_code == 413
    assert superlink.requests == []
    answer = pull(door, (b"x" * 10_000 for _ in range(MAX_BODY // 10_000)))
    assert answer.status_code == 200


def test_a_failure_of_the_superlink_is_a_503_that_says_when_to_try_again(door, superlink):
    superlink.answer = lambda body: JSONResponse({"detail": "database is locked"}, 500)
    answer = pull(door)
    assert (answer.status_code, answer.json()["error"]) == (503, "busy")
    assert int(answer.headers["retry-after"]) >= 1
    assert "database" not in answer.text


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 412, 501, 502, 503, 504])
def test_other_answers_pass_as_they_are(door, superlink, status):
    superlink.answer = lambda body: JSONResponse({"code": 2004, "detail": "no"}, status)
    answer = pull(door)
    assert (answer.status_code, answer.json()) == (status, {"code": 2004, "detail": "no"})


def test_an_answer_that_breaks_off_is_not_taken_for_whole(door, superlink):
    async def half():
        yield b"x" * 1000
        raise ConnectionResetError

    superlink.answer = lambda body: StreamingResponse(half(), headers={"content-length": "2000"})
    with pytest.raises(httpx.RemoteProtocolError):
        pull(door)
    superlink.answer = good_answer
    assert pull(door).status_code == 200


@pytest.fixture
def endless(superlink):
    """Makes the stand-in answer without end, after so many seconds; tells when that was ended."""
    ended = []

    async def parts():
        try:
            while True:
                yield b"x" * 10_000
                await asyncio.sleep(0.001)
        finally:
            ended.append(True)

    async def answer(seconds):
        await asyncio.sleep(seconds)
        return StreamingResponse(parts())

    def begin(seconds=0.0):
        superlink.answer = lambda body: answer(seconds)
        return ended

    return begin


def test_a_device_that_leaves_in_the_middle_of_an_answer_holds_nothing_open(door, endless):
    ended = endless()
    with door.stream("POST", FLEET + "pull-object", headers=signed()) as answer:
        next(answer.iter_raw())
    until(lambda: ended)


def test_a_device_that_leaves_before_its_answer_begins_holds_nothing_open(door, endless):
    ended = endless(seconds=0.3)
    with pytest.raises(httpx.ReadTimeout):
        door.post(FLEET + "pull-object", headers=signed(), timeout=0.1)
    until(lambda: ended)


def test_a_device_that_leaves_in_the_middle_of_a_body_holds_nothing_open(door, superlink, caplog):
    def broken():
        yield b"x" * 1000
        raise RuntimeError("lost the network")

    with pytest.raises(RuntimeError, match="lost the network"):
        pull(door, broken())
    until(lambda: superlink.cut_off)
    assert superlink.requests == []
    assert pull(door).status_code == 200


def test_an_outage_is_logged_once_and_so_is_its_end(door, superlink, caplog):
    superlink.answer = lambda body: Response(status_code=500)
    for _ in range(3):
        pull(door)
    superlink.answer = good_answer
    for _ in range(3):
        pull(door)
    said = [r.getMessage() for r in caplog.records if r.name == "proxymoe.server.gateway"]
    assert said == ["SuperLink failed to pull-messages", "SuperLink answers again"]


def test_without_a_superlink_every_operation_is_a_503(registry, pems):
    with gate(f"https://127.0.0.1:{free_port()}", registry, pems) as door:
        for operation in OPERATIONS[:3]:
            answer = pull(door, operation=operation)
            assert (answer.status_code, answer.json()["error"]) == (503, "busy")
            assert "retry-after" in answer.headers
        assert door.get("/health").status_code == 200


def test_a_superlink_of_a_foreign_ca_is_none(superlink, registry):
    foreign = certificates.new_authority(NOW)
    client = superlink_client(f"https://127.0.0.1:{superlink.port}", foreign.certificate)
    app = gateway(client, enrolment(registry), RateLimit())
    superlink.requests.clear()
    with serving(listener(app, "127.0.0.1", 0, None, None)) as port:
        answer = httpx.post(f"http://127.0.0.1:{port}{FLEET}get-run", headers=signed())
    assert answer.status_code == 503
    assert superlink.requests == []


def test_a_registry_that_fails_is_a_503_too(door, superlink, registry, monkeypatch):
    def locked(key):
        raise RuntimeError("database is locked")

    monkeypatch.setattr(registry, "standing", locked)
    answer = pull(door)
    assert (answer.status_code, answer.json()["error"]) == (503, "busy")
    assert superlink.requests == []


def test_a_device_enrols_and_its_node_may_pass(door, superlink, registry):
    phone = Applicant(registry)
    headers = signed(phone.key)
    assert pull(door, headers=headers).status_code == 403
    answer = door.post("/enrol", content=phone.request().model_dump_json())
    assert answer.status_code == 200
    assert set(answer.json()) == {"certificate", "authority", "coordinator", "blobs"}
    assert pull(door, headers=headers).status_code == 200
    again = phone.request(key=identity.new_device_key())
    answer = door.post("/enrol", content=again.model_dump_json())
    assert (answer.status_code, answer.json()["error"]) == (409, "used")
    assert "ask for a new one" in answer.json()["detail"]


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"device": "phone"}', b"[" * 60_000])
def test_what_is_no_enrolment_request_is_said_so(door, content):
    answer = door.post("/enrol", content=content)
    assert (answer.status_code, answer.json()["error"]) == (400, "malformed")


def test_an_oversized_enrolment_request_is_refused(door):
    answer = door.post("/enrol", content=b"x" * 70_000)
    assert (answer.status_code, answer.json()["error"]) == (413, "too large")


def test_attempts_to_enrol_are_limited_whatever_address_a_header_claims(superlink, registry, pems):
    upstream = f"https://127.0.0.1:{superlink.port}"
    with gate(upstream, registry, pems, limit=RateLimit(burst=2, seconds=30.0)) as door:
        answers = [
            door.post("/enrol", content=b"{}", headers={"x-forwarded-for": f"10.0.0.{number}"})
            for number in range(3)
        ]
        assert [answer.status_code for answer in answers] == [400, 400, 429]
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 30
        assert pull(door).status_code == 200


def test_a_device_does_not_talk_to_a_gateway_of_a_foreign_ca(door):
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(door.base_url.join("/health"), verify=ssl.create_default_context())


def test_plain_text_is_for_loopback_only():
    for host in ("127.0.0.1", "::1", "localhost"):
        listener(Starlette(), host, 8443, None, None)
    for host in ("0.0.0.0", "::", "192.0.2.1", "coordinator.example"):
        with pytest.raises(ConfigError, match="plain text"):
            listener(Starlette(), host, 8443, None, None)
