import contextlib
import socket
import stat
import threading
import time

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from proxymoe.client.attempts import Patience
from proxymoe.client.enrol import EnrolmentRefused, enrol
from proxymoe.client.entries import Kind
from proxymoe.client.home import Home
from proxymoe.client.policy import Coordinator, Policy, Resources, load_policy, policy_text
from proxymoe.client.retry import Backoff, TransferError
from proxymoe.common.certificates import check_device_certificate, new_authority
from proxymoe.common.certificates import new_server_certificate as server_certificate
from proxymoe.common.errors import ConfigError, IntegrityError, ProtocolError
from proxymoe.common.identity import key_digest, public_key
from proxymoe.common.tickets import new_token
from proxymoe.server.enrolment import RateLimit, Standing
from proxymoe.server.gateway import gateway, listener
from tests.doors import AUTHORITY, COORDINATOR, NOW, SERVER, Registry, enrolment, free_port, serving

BURST = 20


class Waits(list[float]):
    """Waits that take no time."""

    @property
    def patience(self):
        return Patience(Backoff(retries=3, first_seconds=1.0), lambda: 0.0, self.append)


class Door:
    """A gateway that enrols devices, over TLS on loopback."""

    def __init__(self, folder):
        self.registry = Registry()
        self.failing = 0
        self.port = 0
        self._files = [folder / "server.pem", folder / "server.key"]

    @contextlib.contextmanager
    def open(self, identity=SERVER, app=None, burst=BURST):
        for path, content in zip(self._files, (identity.certificate, identity.key), strict=True):
            path.write_bytes(content)
        superlink = httpx.AsyncClient(
            base_url="http://127.0.0.1:1",
            trust_env=False,
            verify=False,  # as no CA is asked
        )
        limit = RateLimit(burst=burst, seconds=7.0)
        app = app or gateway(superlink, enrolment(self.registry, self._register), limit)
        with serving(listener(app, "127.0.0.1", 0, *self._files)) as self.port:
            yield self

    def _register(self, device, key):
        if self.failing:
            self.failing -= 1
            raise OSError("Flower is away")

    def token(self, device="phone", host="127.0.0.1", authority=AUTHORITY, expires=NOW + 600):
        token = new_token(f"{host}:{self.port}", authority.certificate, device, expires)
        self.registry.invite(token)
        return token.text


@pytest.fixture
def door(tmp_path):
    with Door(tmp_path).open() as door:
        yield door


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


def answering(*answers):
    """An app that gives these answers one after another, and the last one for ever."""
    left = list(answers)

    async def reply(request):
        return left.pop(0) if len(left) > 1 else left[0]

    return Starlette(routes=[Route("/enrol", reply, methods=["POST"])])


def refused(home, text, match, kind=EnrolmentRefused, waits=None):
    with pytest.raises(kind, match=match) as found:
        enrol(home, text, time.time(), patience=(Waits() if waits is None else waits).patience)
    assert home.enrolment() is None
    return str(found.value)


def test_a_token_makes_a_device_known(door, home):
    record = enrol(home, f"  {door.token()}\n", time.time())
    assert (record.device, record.blobs, record.public_key) == (
        "phone",
        "localhost:9095",
        COORDINATOR,
    )
    assert record.coordinator == f"127.0.0.1:{door.port}"
    assert home.enrolment() == record
    key = key_digest(public_key(home.key.read_bytes()))
    assert door.registry.standing(key) is Standing.ENROLLED
    found = check_device_certificate(
        home.certificate.read_bytes(), home.authority.read_bytes(), time.time()
    )
    assert (found.device, found.key) == ("phone", key)
    assert b"OPENSSH PRIVATE KEY" in home.ssh_key.read_bytes()
    files = (home.key, home.ssh_key, home.certificate, home.authority)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert home.policy() == Policy(coordinator=Coordinator(public_key=COORDINATOR))


def test_what_left_is_on_record_and_tells_no_secret(door, home):
    enrol(home, door.token(), time.time())
    (entry,) = home.ledger().newest()
    assert entry.is_confirmed
    assert (entry.entry.kind, entry.entry.receiver) == (
        Kind.ENROLMENT,
        f"127.0.0.1:{door.port}",
    )
    assert entry.entry.num_bytes > 500


def test_keys_are_durable_before_anything_leaves(door, home, monkeypatch):
    token = door.token()

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("proxymoe.client.enrol._posted", stopped)
        with pytest.raises(KeyboardInterrupt):
            enrol(home, token, time.time())
    key = home.key.read_bytes()
    assert home.enrolment() is None
    assert not home.ledger().newest()[0].is_confirmed
    enrol(home, token, time.time())
    assert home.key.read_bytes() == key


def test_an_answer_that_got_lost_costs_nothing(door, home, monkeypatch):
    token = door.token()

    def cut_short(*_):
        raise OSError("power")

    with monkeypatch.context() as patch:
        patch.setattr(Home, "keep_enrolment", cut_short)
        with pytest.raises(OSError, match="power"):
            enrol(home, token, time.time())
    assert home.enrolment() is None
    assert enrol(home, token, time.time()) == home.enrolment()
    assert len(door.registry.certificates) == 2


def test_a_device_renews_its_certificate_with_its_old_key(door, home):
    enrol(home, door.token(), time.time())
    before = home.key.read_bytes(), home.certificate.read_bytes()
    enrol(home, door.token(), time.time())
    assert home.key.read_bytes() == before[0]
    assert home.certificate.read_bytes() != before[1]


def test_a_home_is_one_device_of_one_coordinator(door, home):
    enrol(home, door.token(), time.time())
    other = new_authority(time.time())
    for token in (door.token("tablet"), door.token(authority=other)):
        with pytest.raises(ConfigError, match=r"this is device phone of 127\.0\.0\.1"):
            enrol(home, token, time.time())
    assert len(home.ledger().newest()) == 1


@pytest.mark.parametrize("text", ["", "hello", "eyJ9", "a" * 40_000])
def test_a_damaged_token_leaves_no_trace(home, text):
    with pytest.raises(ProtocolError, match="enrolment token: damaged"):
        enrol(home, text, time.time())
    assert not home.path.exists()


def test_an_expired_token_leaves_no_trace(door, home):
    with pytest.raises(ProtocolError, match="expired"):
        enrol(home, door.token(expires=NOW - 5), time.time())
    assert not home.path.exists()


def test_the_coordinators_refusals_are_told_in_our_words(door, home):
    token = door.token()
    text = new_token(f"127.0.0.1:{door.port}", AUTHORITY.certificate, "phone", NOW + 600).text
    refused(home, text, "it does not know this token; ask for a new one")
    slow_clock = NOW - 3600
    with pytest.raises(EnrolmentRefused, match="the token has expired"):
        enrol(home, door.token(expires=slow_clock + 60), slow_clock)
    token = door.token()
    door.registry.claimed["phone"] = "0" * 64
    refused(home, token, "used by another device already")
    key = key_digest(public_key(home.key.read_bytes()))
    door.registry.standings[key] = Standing.REVOKED
    refused(home, door.token(), "was revoked; wipe this home")
    assert all(record.is_confirmed for record in home.ledger().newest())


def test_too_many_attempts_are_told_how_long_to_wait(tmp_path, home):
    with Door(tmp_path).open(burst=1) as door:
        stranger = new_token(f"127.0.0.1:{door.port}", AUTHORITY.certificate, "phone", NOW + 600)
        refused(home, stranger.text, "does not know this token")
        refused(home, door.token(), r"too many attempts from this network; wait \d s, then try")


def test_a_busy_coordinator_is_asked_again_with_growing_waits(door, home):
    door.failing, waits = 2, Waits()
    enrol(home, door.token(), time.time(), patience=waits.patience)
    assert waits == [2.0, 2.0]  # what it asks for is more than 0.5 and 1
    assert len(home.ledger().newest()) == 1


def test_a_coordinator_that_stays_busy_is_left_alone(door, home):
    door.failing, waits, token = 99, Waits(), door.token()
    refused(home, token, "cannot enrol devices now, at 4 attempts", TransferError, waits)
    assert len(waits) == 3
    door.failing = 0
    assert enrol(home, token, time.time()).device == "phone"


def test_an_unreachable_coordinator_is_waited_for(tmp_path, home):
    door, waits = Door(tmp_path), Waits()
    door.port = free_port()
    told = refused(home, door.token(), "cannot be reached", TransferError, waits)
    assert "is the coordinator running" in told
    assert waits == [0.5, 1.0, 2.0]


def test_a_foreign_ca_gets_no_secret(tmp_path, home):
    stranger = new_authority(NOW)
    seen = threading.Event()

    async def steal(request):
        seen.set()
        return Response()

    app = Starlette(routes=[Route("/enrol", steal, methods=["POST"])])
    identity = server_certificate(stranger, ["127.0.0.1"], NOW)
    with Door(tmp_path).open(identity, app) as door:
        waits = Waits()
        refused(home, door.token(), "foreign CA; somebody may be in between", waits=waits)
    assert not seen.is_set()
    assert not waits


def test_another_hosts_certificate_is_refused(door, home):
    refused(home, door.token(host="localhost"), "for another host name or address")


def test_an_expired_server_certificate_tells_of_clocks(tmp_path, home):
    then = NOW - 900 * 86_400
    authority = new_authority(then)
    identity = server_certificate(authority, ["127.0.0.1"], then)
    with Door(tmp_path).open(identity) as door:
        refused(home, door.token(authority=authority), "set this device's clock")


def test_a_port_without_tls_is_refused(home, tmp_path):
    door = Door(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        door.port = listening.getsockname()[1]

        def answer_in_plain_text():
            with listening.accept()[0] as device:
                device.recv(4096)
                device.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer_in_plain_text)
        thread.start()
        refused(home, door.token(), "no TLS as expected there")
        thread.join()


@pytest.mark.parametrize(
    ("answer", "kind", "match"),
    [
        (JSONResponse({"new": "format"}), ProtocolError, "update the older side"),
        (Response(b"\xff" * 9), ProtocolError, "update the older side"),
        (Response(b"x" * 70_000), ProtocolError, "more than 65536 bytes"),
        (Response("<html>", 404), EnrolmentRefused, "HTTP 404; is this the coordinator's"),
        (JSONResponse(["unknown"], 403), EnrolmentRefused, "HTTP 403"),
        (JSONResponse({"error": "\x1b[31mroot"}, 403), EnrolmentRefused, "HTTP 403"),
        (Response(status_code=302, headers={"location": "/x"}), EnrolmentRefused, "HTTP 302"),
    ],
)
def test_answers_that_are_none_are_refused(tmp_path, home, answer, kind, match):
    with Door(tmp_path).open(app=answering(answer)) as door:
        assert "\x1b" not in refused(home, door.token(), match, kind)


def test_a_huge_wait_is_cut(tmp_path, home):
    answer = Response(status_code=429, headers={"retry-after": "999999999"})
    with Door(tmp_path).open(app=answering(answer)) as door:
        assert "wait 3600 s" in refused(home, door.token(), "too many")


@pytest.mark.parametrize("field", ["certificate", "authority", "device"])
def test_a_certificate_that_is_not_ours_is_refused(tmp_path, home, field):
    registry, foreign = Registry(), new_authority(NOW)
    from proxymoe.server.enrolment import enrol as answer
    from tests.doors import Applicant

    name = "tablet" if field == "device" else "phone"
    other = Applicant(registry, name)
    reply = answer(other.request(), enrolment(registry), NOW)
    if field == "authority":
        reply = reply.model_copy(update={"authority": foreign.certificate.decode()})
    with Door(tmp_path).open(app=answering(JSONResponse(reply.model_dump()))) as door:
        refused(home, door.token(), "another key|another CA", ProtocolError)
    assert not home.certificate.exists()
    assert not home.policy_file.exists()


def test_a_policy_that_is_there_is_kept_but_for_the_key(door, home):
    home.path.mkdir()
    text = policy_text(Policy(resources=Resources(disk_mb=77)))
    home.policy_file.write_text(text + "# my own words\n")
    enrol(home, door.token(), time.time())
    kept = home.policy_file.read_text()
    assert home.policy().resources.disk_mb == 77
    assert home.policy().coordinator.public_key == COORDINATOR
    assert kept.endswith("# my own words\n")
    assert len(kept.splitlines()) == len(text.splitlines()) + 1


@pytest.mark.parametrize(
    "text",
    ["", "# nothing\n", "[coordinator]", "[ coordinator ] # whom\n[data]\n", "[data]\n# end"],
)
def test_a_key_is_put_into_any_policy(door, home, text):
    home.path.mkdir()
    home.policy_file.write_text(text)
    enrol(home, door.token(), time.time())
    assert load_policy(home.policy_file).coordinator.public_key == COORDINATOR


def test_a_policy_that_cannot_take_the_key_is_left_as_it_is(door, home):
    home.path.mkdir()
    home.policy_file.write_text("coordinator = {}\n")
    refused(home, door.token(), r"write public_key = '[0-9a-f]{64}' below", ConfigError)
    assert home.policy_file.read_text() == "coordinator = {}\n"


def test_a_policy_that_trusts_another_coordinator_wins(door, home):
    home.path.mkdir()
    text = policy_text(Policy(coordinator=Coordinator(public_key="0" * 64)))
    home.policy_file.write_text(text)
    refused(
        home, door.token(), f"pins 0{{64}}, and this coordinator has {COORDINATOR}", ConfigError
    )
    assert home.policy_file.read_text() == text
    assert not home.certificate.exists()


def test_a_wrong_policy_is_named_before_anything_leaves(door, home):
    home.path.mkdir()
    home.policy_file.write_text("[privacy]\nsmalest_cohort = 3\n")
    refused(home, door.token(), "nearest is privacy.smallest_cohort", ConfigError)
    assert home.ledger().newest() == []


def test_without_a_ledger_nothing_leaves(door, home):
    enrol(home, door.token(), time.time())
    home.ledger_file.write_bytes(b"not a ledger" * 100)
    with pytest.raises(IntegrityError):
        enrol(home, door.token(), time.time())
    assert len(door.registry.certificates) == 1


def test_a_client_at_work_is_not_disturbed(door, home):
    Home.create(home.path)
    with Home(home.path).alone():
        refused(home, door.token(), "a second client", ConfigError)


def test_a_token_with_no_certificate_in_it_is_refused(door, home):
    text = new_token("127.0.0.1:1", b"no certificate", "phone", NOW + 600).text
    refused(home, text, "its certificate authority is unreadable", ProtocolError)
