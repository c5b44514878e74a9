"""Applications over real mutual TLS: who may ask, what is answered, what is refused."""

import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from proxymoe.common import identity
from proxymoe.common.assignment import (
    APPLY,
    MAX_APPLICATION_BYTES,
    Application,
    Assignment,
    Blob,
    application_bytes,
    verify_assignment,
)
from proxymoe.common.certificates import sign_device, signing_request
from proxymoe.common.config import AdapterSettings, TrainSettings
from proxymoe.common.errors import BudgetError, ConfigError
from proxymoe.server.enrolment import Standing
from proxymoe.server.plans import enrolled_caller, plans_handler
from tests.doors import AUTHORITY, NOW, SERVER, Registry

SIGNING_KEY = identity.new_signing_key()
DIGEST = "ab" * 32
KEY = identity.new_device_key()
CERTIFICATE = sign_device(AUTHORITY, "phone", signing_request("phone", KEY), NOW)


def assignment(device, application):
    """Says in the number of rounds what it was asked for."""
    return Assignment(
        run="run",
        device=device,
        base=DIGEST,
        plan=DIGEST,
        layout=DIGEST,
        adapter=AdapterSettings(),
        adapter_seed=0,
        manifest=Blob(digest=DIGEST, num_bytes=1),
        model_bytes=1,
        memory_bytes=1,
        train=TrainSettings(),
        clip_norm=1.0,
        cohort_size=1,
        rounds=application.budget_bytes or 1,
    )


class Site:
    """A server with the method alone, and a device that may call it."""

    def __init__(self, assign=assignment, clock=time.time):
        self.registry = Registry()
        self.registry.admit(CERTIFICATE)
        options = [("grpc.max_receive_message_length", 2 * MAX_APPLICATION_BYTES)]
        self.server = grpc.server(ThreadPoolExecutor(2), options=options)
        caller = enrolled_caller(self.registry, AUTHORITY.certificate, clock)
        handler = plans_handler(assign, caller, SIGNING_KEY)
        self.server.add_generic_rpc_handlers([handler])
        credentials = grpc.ssl_server_credentials(
            [(SERVER.key, SERVER.certificate)], AUTHORITY.certificate, require_client_auth=True
        )
        port = self.server.add_secure_port("127.0.0.1:0", credentials)
        self.server.start()
        own = grpc.ssl_channel_credentials(AUTHORITY.certificate, KEY, CERTIFICATE.certificate)
        self.channel = grpc.secure_channel(f"127.0.0.1:{port}", own)

    def apply(self, content):
        return self.channel.unary_unary(APPLY)(content, timeout=20)

    def refusal(self, content):
        with pytest.raises(grpc.RpcError) as caught:
            self.apply(content)
        return caught.value.code(), caught.value.details()


@pytest.fixture
def site():
    sites = []

    def open_site(*arguments, **named):
        sites.append(Site(*arguments, **named))
        return sites[-1]

    yield open_site
    for each in sites:
        each.channel.close()
        each.server.stop(None).wait()


def test_an_enrolled_device_gets_an_assignment_that_is_signed_and_its_own(site):
    content = site().apply(application_bytes(Application(domain="math", budget_bytes=7)))
    found = verify_assignment(content, identity.verifying_key(SIGNING_KEY), "phone")
    assert (found.device, found.rounds) == ("phone", 7)


@pytest.mark.parametrize("standing", [Standing.REVOKED, Standing.UNKNOWN])
def test_a_device_that_is_not_enrolled_is_refused_although_its_certificate_is_ours(site, standing):
    here = site()
    here.registry.standings[CERTIFICATE.key] = standing
    code, told = here.refusal(application_bytes(Application()))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert standing in told


def test_an_expired_certificate_is_refused(site):
    here = site(clock=lambda: NOW + 10 * 365 * 86400)
    code, told = here.refusal(application_bytes(Application()))
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert "enrol again" in told


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"domain": "math", "mixture": {"math": 1.0}}',
        b"x" * (MAX_APPLICATION_BYTES + 1),
    ],
)
def test_what_is_no_application_is_refused_as_such(site, content):
    code, told = site().refusal(content)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert told.startswith("application: ")


@pytest.mark.parametrize("error", [BudgetError("3 bytes"), ConfigError("domain 'x'")])
def test_what_cannot_be_planned_is_refused_with_the_reason(site, error):
    def assign(device, application):
        raise error

    code, told = site(assign).refusal(application_bytes(Application()))
    assert (code, told) == (grpc.StatusCode.INVALID_ARGUMENT, str(error))
