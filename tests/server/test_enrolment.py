"""One token, for one key; whatever gets lost or dies on the way costs no token."""

import logging
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common import identity
from proxymoe.common.certificates import check_device_certificate
from proxymoe.server.enrolment import RateLimit, Refused, Standing, enrol
from tests.doors import AUTHORITY, COORDINATOR, NOW, Applicant, Registry, enrolment


@pytest.fixture
def registry():
    return Registry()


@pytest.fixture
def phone(registry):
    return Applicant(registry)


def refusal(asked, registry, now=NOW, **kwargs):
    with pytest.raises(Refused) as caught:
        enrol(asked, enrolment(registry, **kwargs), now)
    return caught.value.status, caught.value.error


def test_a_token_becomes_a_certificate_that_is_recorded(registry, phone):
    registered = []
    reply = enrol(phone.request(), enrolment(registry, lambda *told: registered.append(told)), NOW)
    found = check_device_certificate(reply.certificate.encode(), AUTHORITY.certificate, NOW)
    assert found.device == "phone"
    assert found.public_key == identity.public_key(phone.key)
    assert reply.authority.encode() == AUTHORITY.certificate
    assert reply.coordinator == COORDINATOR
    assert registered == [("phone", found.public_key)]
    assert registry.certificates == [found]
    assert registry.standing(found.key) is Standing.ENROLLED


def test_the_same_key_may_ask_again_when_its_answer_was_lost(registry, phone):
    replies = [enrol(phone.request(), enrolment(registry), NOW) for _ in range(2)]
    keys = {certificate.key for certificate in registry.certificates}
    assert len(keys) == 1
    assert replies[0].certificate != replies[1].certificate


@pytest.mark.parametrize("step", ["claim", "admit"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_crash_at_any_step_costs_no_token(registry, phone, step, moment):
    class Crash(BaseException):
        pass

    proper = getattr(registry, step)

    def crash(*arguments):
        if moment == "after":
            proper(*arguments)
        raise Crash

    setattr(registry, step, crash)
    with pytest.raises(Crash):
        enrol(phone.request(), enrolment(registry), NOW)
    setattr(registry, step, proper)
    assert enrol(phone.request(), enrolment(registry), NOW).coordinator == COORDINATOR


def test_when_flower_cannot_be_told_nobody_is_enrolled_and_the_token_still_holds(
    registry, phone, caplog
):
    def unreachable(device, public_key):
        raise ConnectionRefusedError("no SuperLink")

    assert refusal(phone.request(), registry, register=unreachable) == (503, "busy")
    assert registry.certificates == []
    assert "phone" in caplog.text
    enrol(phone.request(), enrolment(registry), NOW)
    assert len(registry.certificates) == 1


def test_a_token_is_for_one_key(registry, phone):
    enrol(phone.request(), enrolment(registry), NOW)
    other = phone.request(key=identity.new_device_key())
    assert refusal(other, registry) == (409, "used")
    assert len(registry.certificates) == 1


def test_of_many_keys_at_once_one_is_enrolled(registry, phone):
    outcomes = []

    def attempt(asked):
        try:
            outcomes.append(enrol(asked, enrolment(registry), NOW).coordinator)
        except Refused as refused:
            outcomes.append(refused.error)

    asked = [phone.request(key=identity.new_device_key()) for _ in range(6)]
    threads = [threading.Thread(target=attempt, args=[each]) for each in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == sorted([COORDINATOR] + ["used"] * 5)


def test_a_wrong_secret_and_a_name_nobody_knows_are_answered_alike(registry, phone):
    assert refusal(phone.request(secret="00" * 32), registry) == (403, "unknown")
    assert refusal(phone.request(device="tablet"), registry) == (403, "unknown")
    assert registry.claimed == {}


def test_an_expired_token_is_refused(registry):
    late = Applicant(registry, expires=NOW + 10)
    assert refusal(late.request(), registry, now=NOW + 10) == (403, "expired")
    enrol(late.request(), enrolment(registry), NOW + 9)


def test_a_revoked_key_does_not_come_back(registry, phone):
    enrol(phone.request(), enrolment(registry), NOW)
    registry.standings[registry.certificates[0].key] = Standing.REVOKED
    assert refusal(phone.request(), registry) == (403, "revoked")
    registry.invite(phone.token)
    assert refusal(phone.request(), registry) == (403, "revoked")


def test_a_request_for_another_name_or_none_is_refused_and_costs_no_token(registry, phone):
    other = Applicant(registry, name="tablet")
    stolen = phone.request(request=other.request().request)
    assert refusal(stolen, registry) == (400, "malformed")
    assert refusal(phone.request(request="no request"), registry) == (400, "malformed")
    enrol(phone.request(), enrolment(registry), NOW)


def test_no_secret_is_logged(registry, phone, caplog):
    with caplog.at_level(logging.DEBUG):
        enrol(phone.request(), enrolment(registry), NOW)
    assert registry.certificates[0].serial in caplog.text
    assert phone.token.secret not in caplog.text


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@given(
    steps=st.lists(st.floats(0, 20), min_size=1, max_size=60),
    burst=st.integers(1, 5),
    seconds=st.floats(0.5, 10),
)
def test_no_window_holds_more_than_the_burst_and_its_share_of_time(steps, burst, seconds):
    clock = Clock()
    limit = RateLimit(burst, seconds, clock)
    welcome = []
    for step in steps:
        clock.now += step
        wait = limit.wait("10.0.0.1")
        if wait == 0:
            welcome.append(clock.now)
        else:
            clock.now += wait + 1e-6
            assert limit.wait("10.0.0.1") == 0, "one who waits as told is welcome"
            welcome.append(clock.now)
    for first in range(len(welcome)):
        for last in range(first, len(welcome)):
            span = welcome[last] - welcome[first]
            assert last - first + 1 <= burst + span / seconds + 1e-3


def test_addresses_do_not_wait_for_each_other_but_a_v6_network_is_one():
    limit = RateLimit(1, 10.0, Clock())
    assert limit.wait("10.0.0.1") == 0
    assert limit.wait("10.0.0.1") == 10
    assert limit.wait("10.0.0.2") == 0
    assert limit.wait("2001:db8::1") == 0
    assert limit.wait("2001:db8::ffff:1") == 10
    assert limit.wait("2001:db8:0:1::1") == 0
    assert limit.wait("::ffff:10.0.0.1") == 10


def test_few_addresses_are_remembered_the_newest():
    limit = RateLimit(1, 10.0, Clock(), max_addresses=2)
    for address in ("10.0.0.1", "10.0.0.2", "10.0.0.3"):
        assert limit.wait(address) == 0
    assert limit.wait("10.0.0.3") == 10
    assert limit.wait("10.0.0.2") == 10
    assert limit.wait("10.0.0.1") == 0
