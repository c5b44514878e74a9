"""Network edge of the device: one token, carried here by a trusted hand, makes it known.

The keys are made and durable before anything leaves, and the same keys may ask again until the
token expires: an answer that got lost costs nothing. Nothing is believed but the token: the
coordinator must prove itself to the token's CA, and its answer must fit our own key. What says
who this device is gets written last, so a home is enrolled wholly or not at all.
"""

import json
import math
import re
import ssl
from collections.abc import Iterator

import httpx
from pydantic import ValidationError

from proxymoe.client.attempts import Busy, Patience
from proxymoe.client.entries import Entry, Kind
from proxymoe.client.home import EnrolmentRecord, Home
from proxymoe.client.policy import Coordinator, Policy, load_policy, parse_policy, policy_text
from proxymoe.client.retry import Backoff
from proxymoe.common.certificates import check_device_certificate, signing_request
from proxymoe.common.errors import ConfigError, ProtocolError, ProxyMoEError
from proxymoe.common.files import digest_of
from proxymoe.common.identity import key_digest, new_device_key, public_key, ssh_private_key
from proxymoe.common.tickets import EnrolmentToken, EnrolReply, EnrolRequest, parse_token

PATIENCE = Patience(Backoff(retries=5, first_seconds=1.0))
ANSWER_SECONDS = 20.0
"""How long the coordinator may be silent."""
MAX_REPLY_BYTES = 64 << 10
MAX_WAIT_SECONDS = 3600.0
"""No coordinator makes us wait, or tell people to wait, longer than that."""
REFUSALS = {
    (403, "unknown"): "it does not know this token; ask for a new one",
    (403, "expired"): "the token has expired; ask for a new one",
    (403, "revoked"): "this device's key was revoked; wipe this home, and enrol with a new token",
    (409, "used"): "the token was used by another device already; ask for a new one",
}
"""What an answer means, by HTTP status and the coordinator's word for it."""
NAMES, TIMES = {62, 64}, {9, 10}
"""OpenSSL's codes for certificates that name another host or address, or are not valid now."""
HEADING = re.compile(r"^[ \t]*\[[ \t]*coordinator[ \t]*\][^\n]*$", re.MULTILINE)
BLANK = '# public_key = "…"\n'
"""Stands in a policy file where a key may be pinned."""


class EnrolmentRefused(ProxyMoEError):
    """The coordinator does not want this device, or is not the one of the token; not for now."""


def enrol(
    home: Home,
    token_text: str,
    now: float,
    *,
    patience: Patience = PATIENCE,
) -> EnrolmentRecord:
    """Makes this device known to the coordinator that the token names, and pins its key.

    Args:
        home: made if it is none yet; it may have a policy file already, which is kept.
        token_text: as the coordinator printed it.
        now: unix seconds.
        patience: while the coordinator is away or busy.

    Raises:
        ProtocolError: the token is damaged or has expired, or the answer is not what it must be.
        EnrolmentRefused: the coordinator refuses, or is a stranger.
        TransferError: it was away or busy at every attempt; the same token may be tried again.
        ConfigError: the home or the policy is another coordinator's, or a client is at work here.
        DataError, IntegrityError: the ledger cannot be written.
    """
    token = parse_token(token_text, now)
    home = Home.create(home.path)
    with home.alone():
        _require_same(home, token)
        policy = load_policy(home.policy_file) if home.policy_file.exists() else None
        key = _own_key(home)
        request = EnrolRequest(
            device=token.device,
            secret=token.secret,
            request=signing_request(token.device, key).decode(),
        )
        content = request.model_dump_json().encode()
        reply = _asked(home, token, content, patience)
        _check(reply, token, key, now)
        _pin(home, policy, reply.coordinator)
        home.write_private(home.certificate, reply.certificate.encode())
        home.write_private(home.authority, token.authority.encode())
        record = EnrolmentRecord(
            device=token.device,
            coordinator=token.coordinator,
            blobs=reply.blobs,
            public_key=reply.coordinator,
        )
        home.keep_enrolment(record)
    return record


def _require_same(home: Home, token: EnrolmentToken) -> None:
    """A home that is enrolled may renew its certificate, and not become another device."""
    known = home.enrolment()
    if known is None:
        return
    authority = home.authority.read_text() if home.authority.exists() else token.authority
    if (known.device, authority) != (token.device, token.authority):
        raise ConfigError(
            f"{home.path}: this is device {known.device} of {known.coordinator}, and the token "
            f"is for device {token.device} of {token.coordinator}; wipe this home, or name another"
        )


def _own_key(home: Home) -> bytes:
    """This device's private key, durable: the one of an earlier attempt, or a new one."""
    if not home.key.exists():
        home.write_private(home.key, new_device_key())
    key = home.key.read_bytes()
    home.write_private(home.ssh_key, ssh_private_key(key))
    return key


def _asked(home: Home, token: EnrolmentToken, content: bytes, patience: Patience) -> EnrolReply:
    """The coordinator's answer, after as many attempts as are sensible."""
    trust = _trust(token)
    entry = Entry(
        kind=Kind.ENROLMENT,
        receiver=token.coordinator,
        num_bytes=len(content),
        digest=digest_of(content),
    )
    with home.ledger().sending(entry):
        answer = patience.until_answered(
            token.coordinator, lambda: _posted(token.coordinator, content, trust)
        )
    return _understood(token.coordinator, *answer)


def _trust(token: EnrolmentToken) -> ssl.SSLContext:
    """TLS that believes the token's CA, and nobody else."""
    try:
        return ssl.create_default_context(cadata=token.authority)
    except (ssl.SSLError, ValueError):
        raise ProtocolError(
            "enrolment token: its certificate authority is unreadable; ask for a new token"
        ) from None


def _posted(address: str, content: bytes, trust: ssl.SSLContext) -> tuple[int, bytes, float]:
    """Status, body and Retry-After, in seconds, of the coordinator's answer."""
    headers = {"content-type": "application/json"}
    client = httpx.Client(verify=trust, trust_env=False, timeout=ANSWER_SECONDS)
    try:
        with (
            client,
            client.stream(
                "POST", f"https://{address}/enrol", content=content, headers=headers
            ) as answer,
        ):
            body = b""
            for chunk in answer.iter_bytes():
                body += chunk
                if len(body) > MAX_REPLY_BYTES:
                    raise ProtocolError(f"{address}: more than {MAX_REPLY_BYTES} bytes of answer")
            wait = _seconds(answer.headers.get("retry-after", ""))
            if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
                raise Busy("cannot enrol devices now", wait)
            return answer.status_code, body, wait
    except httpx.HTTPError as error:
        for cause in _causes(error):
            if isinstance(cause, ssl.SSLError):
                raise EnrolmentRefused(f"{address}: {_distrust(cause)}") from error
        told = str(error) or type(error).__name__
        raise Busy(f"cannot be reached ({told})") from error


def _understood(address: str, status: int, content: bytes, wait: float) -> EnrolReply:
    """What the answer says, or why there is no enrolment in it."""
    if status == httpx.codes.TOO_MANY_REQUESTS:
        raise EnrolmentRefused(
            f"{address}: too many attempts from this network; wait {wait or 60.0:.0f} s, then try "
            "again with the same token"
        )
    try:
        if status == httpx.codes.OK:
            return EnrolReply.model_validate_json(content)
    except ValidationError:
        raise ProtocolError(
            f"{address}: no answer of this version of ProxyMoE; update the older side"
        ) from None
    remedy = f"it answers HTTP {status}; is this the coordinator's address, and its version ours?"
    raise EnrolmentRefused(f"{address}: {REFUSALS.get((status, _word(content)), remedy)}")


def _check(reply: EnrolReply, token: EnrolmentToken, key: bytes, now: float) -> None:
    """ProtocolError unless the answer gives our own key a certificate by the token's CA."""
    if reply.authority.strip() != token.authority.strip():
        raise ProtocolError(
            "enrolment: the coordinator names another CA than the token; ask for a new token"
        )
    found = check_device_certificate(reply.certificate.encode(), token.authority.encode(), now)
    if (found.device, found.key) != (token.device, key_digest(public_key(key))):
        raise ProtocolError(
            f"enrolment: a certificate for device {found.device} with another key; nothing was "
            "kept, tell who runs the coordinator"
        )


def _pin(home: Home, policy: Policy | None, key: str) -> None:
    """Makes the policy file trust the coordinator with this key; ConfigError if it has another."""
    if policy is None:
        text = policy_text(Policy(coordinator=Coordinator(public_key=key)))
        home.write_private(home.policy_file, text.encode())
        return
    pinned = policy.coordinator.public_key
    if pinned not in (None, key):
        raise ConfigError(
            f"{home.policy_file}: coordinator.public_key pins {pinned}, and this coordinator has "
            f"{key}; if that is the one to trust, write it there, and enrol again"
        )
    if pinned is None:
        text = _with_key(home.policy_file.read_text(encoding="utf-8"), key)
        if _parsed(text) != policy.model_copy(update={"coordinator": Coordinator(public_key=key)}):
            raise ConfigError(
                f"{home.policy_file}: the key cannot be put in; write public_key = {key!r} below "
                "[coordinator] yourself, and enrol again"
            )
        home.write_private(home.policy_file, text.encode())


def _with_key(text: str, key: str) -> str:
    """The owner's text, comments and all, with the key in its [coordinator] section."""
    line = f'public_key = "{key}"\n'
    if BLANK in text:
        return text.replace(BLANK, line, 1)
    if found := HEADING.search(text):
        return f"{text[: found.end()]}\n{line}{text[found.end() + 1 :]}"
    return f"{text.rstrip()}\n\n[coordinator]\n{line}"


def _parsed(text: str) -> Policy | None:
    try:
        return parse_policy(text)
    except ConfigError:
        return None


def _distrust(error: ssl.SSLError) -> str:
    """What a failed handshake means, and what to do."""
    code = error.verify_code if isinstance(error, ssl.SSLCertVerificationError) else None
    if code is None:
        return f"no TLS as expected there ({error.reason}); is this the coordinator's address?"
    if code in NAMES:
        return (
            "its certificate is for another host name or address; ask for a token with a name "
            "that the certificate has"
        )
    if code in TIMES:
        return "its certificate is not valid now; set this device's clock, or renew it there"
    return "its certificate is by a foreign CA; somebody may be in between, nothing was sent"


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _word(content: bytes) -> str:
    """The coordinator's word for a refusal; text from outside that is only ever compared."""
    try:
        found = json.loads(content)
    except ValueError:
        return ""
    return str(found.get("error", "")) if isinstance(found, dict) else ""


def _seconds(text: str) -> float:
    value = float(text) if re.fullmatch(r"\d{1,9}", text) else 0.0
    return math.ceil(min(value, MAX_WAIT_SECONDS))
