"""Round keys: what devices seal their messages to, signed by the coordinator, gone after the round.

For every attempt at a round the coordinator makes fresh HPKE key pairs (RFC 9180), one per suite,
and signs the public halves with its root, which devices have pinned. The private halves live in
memory only and are forgotten when the attempt is over: whoever steals the coordinator's lasting
keys later cannot open what was sealed before. Python cannot promise that memory is overwritten, so
forgetting is as good as the process and its swap space.

A device seals with the first suite that both sides have: the hybrid holds if either ML-KEM-768 or
X25519 does. Signing all offered keys at once keeps anybody in between from taking the better away.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Annotated, Any, Literal, Self

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from proxymoe.common.chunks import KEY_BYTES, TAG_BYTES
from proxymoe.common.errors import ConfigError, ProtocolError
from proxymoe.common.files import canonical_json, digest_of
from proxymoe.common.identity import UNREADABLE, sign_statement, signed_statement
from proxymoe.common.tickets import SKEW_SECONDS, UnixSeconds

MAX_OFFER_BYTES = 8 << 10
_PURPOSE = b"proxymoe round keys 1\n"


@dataclass(frozen=True, slots=True)
class Suite:
    """One row of the table of suites: KEM, KDF and AEAD, and how the KEM's keys are written."""

    number: int
    name: str
    kem: hpke.KEM
    public_bytes: int
    generate: Callable[[], tuple[Any, bytes]]
    """A new private key, and its public half as bytes."""
    load: Callable[[bytes], Any]
    """The public key that these bytes are; raises one of `UNREADABLE`."""

    @property
    def hpke(self) -> hpke.Suite:
        """The suite as the library knows it."""
        return hpke.Suite(self.kem, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)

    @property
    def wrapped_bytes(self) -> int:
        """Length of a wrapped content key."""
        return self.kem.enc_length() + KEY_BYTES + TAG_BYTES


def _new_x25519() -> tuple[X25519PrivateKey, bytes]:
    key = X25519PrivateKey.generate()
    return key, key.public_key().public_bytes_raw()


def _new_hybrid() -> tuple[hpke.MLKEM768X25519PrivateKey, bytes]:
    lattice, curve = MLKEM768PrivateKey.generate(), X25519PrivateKey.generate()
    public = lattice.public_key().public_bytes_raw() + curve.public_key().public_bytes_raw()
    return hpke.MLKEM768X25519PrivateKey(lattice, curve), public


def _load_hybrid(content: bytes) -> hpke.MLKEM768X25519PublicKey:
    lattice, curve = content[:-32], content[-32:]
    return hpke.MLKEM768X25519PublicKey(
        MLKEM768PublicKey.from_public_bytes(lattice), X25519PublicKey.from_public_bytes(curve)
    )


_ROWS = (
    Suite(
        2,
        "MLKEM768-X25519, HKDF-SHA256, ChaCha20-Poly1305",
        hpke.KEM.MLKEM768_X25519,
        1184 + 32,
        _new_hybrid,
        _load_hybrid,
    ),
    Suite(
        1,
        "X25519, HKDF-SHA256, ChaCha20-Poly1305",
        hpke.KEM.X25519,
        32,
        _new_x25519,
        X25519PublicKey.from_public_bytes,
    ),
)
SUITES = {suite.number: suite for suite in _ROWS}
"""All suites by the number that goes over the wire, the best first; a number never changes."""
HYBRID = 2
"""The suite that whoever breaks X25519 alone, with a quantum computer, has not broken."""


@cache
def offered() -> tuple[int, ...]:
    """Numbers of the suites that the installed library can do, the best first."""
    return tuple(number for number, suite in SUITES.items() if _works(suite))


def _works(suite: Suite) -> bool:
    try:
        suite.generate()
    except UnsupportedAlgorithm:  # an OpenSSL without ML-KEM
        return False
    return True


class _Statement(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PublicKey(_Statement):
    """The public half of a round key, for one suite."""

    suite: int
    key: Annotated[str, Field(pattern=r"^([0-9a-f]{2}){32,2048}$")]
    """As hex."""


class Offer(_Statement):
    """What the coordinator signs: keys to seal to, for one attempt at one round, for some time."""

    version: Literal[1] = 1
    run: str = Field(max_length=128)
    round: int = Field(ge=0, lt=1 << 53)
    attempt: int = Field(ge=0, lt=1 << 53)
    keys: tuple[PublicKey, ...] = Field(min_length=1, max_length=8)
    issued: UnixSeconds
    expires: UnixSeconds

    @property
    def digest(self) -> str:
        """Names these keys in every envelope that is sealed to one of them."""
        return digest_of(canonical_json(self.model_dump()))


class RoundKeys:
    """The private halves of the keys of one attempt; also a context that forgets them at its end.

    Args:
        offer: the public halves, as devices get them.
        private: {suite: private key}.
    """

    def __init__(self, offer: Offer, private: dict[int, Any]) -> None:
        self.offer = offer
        self._private = private

    @classmethod
    def new(
        cls,
        run: str,
        number: int,
        attempt: int,
        now: float,
        expires: float,
        suites: Iterable[int] | None = None,
    ) -> Self:
        """Fresh keys for an attempt at round `number`, of these suites or all there are.

        Raises:
            ConfigError: a suite that the installed library cannot do, or no time to use it in.
        """
        chosen = offered() if suites is None else tuple(suites)
        if unknown := sorted(set(chosen) - set(offered())):
            raise ConfigError(f"suites {unknown}: this cryptography library has {offered()}")
        if not chosen or not now < expires:
            raise ConfigError(f"round keys need a suite and a future expiry, got {expires:.0f}")
        made = {suite: SUITES[suite].generate() for suite in chosen}
        offer = Offer(
            run=run,
            round=number,
            attempt=attempt,
            keys=tuple(PublicKey(suite=n, key=public.hex()) for n, (_, public) in made.items()),
            issued=int(now),
            expires=int(expires),
        )
        return cls(offer, {suite: private for suite, (private, _) in made.items()})

    def signed(self, signing_key: bytes) -> bytes:
        """The offer as bytes that `verify_offer` accepts: signature, then canonical JSON.

        Raises:
            ProtocolError: not the coordinator's signing key.
        """
        statement = canonical_json(self.offer.model_dump())
        return sign_statement(signing_key, _PURPOSE, statement)

    def unwrap(self, suite: int, wrapped: bytes, bound: bytes) -> bytes:
        """The content key that `wrap` wrapped with the same bound bytes.

        Raises:
            ProtocolError: it was not wrapped for these keys and bytes, or they are forgotten.
        """
        if not self._private:
            raise ProtocolError("round keys: forgotten, for the round is over; nothing was opened")
        if suite not in self._private:
            raise ProtocolError(f"suite {suite}: offered were {sorted(self._private)}")
        try:
            return SUITES[suite].hpke.decrypt(wrapped, self._private[suite], bound)
        except (*UNREADABLE, InvalidTag):
            raise ProtocolError("envelope: damaged, or sealed for other keys") from None

    def forget(self) -> None:
        """Drops the private halves for good; nothing can be opened with these keys any more."""
        self._private = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.forget()


def verify_offer(
    content: bytes,
    coordinator: str,
    now: float,
    *,
    run: str,
    number: int,
    skew: float = SKEW_SECONDS,
) -> Offer:
    """The offer, if the pinned `coordinator` signed it for round `number` of this run.

    Args:
        content: from `RoundKeys.signed`.
        coordinator: the public key that was pinned at enrolment.
        now: unix seconds.
        run, number: of the task that it came with.
        skew: seconds by which the two clocks may differ.

    Raises:
        ProtocolError: anything else; the message tells what does not fit.
    """
    is_short = len(content) <= MAX_OFFER_BYTES
    statement = signed_statement(coordinator, _PURPOSE, content) if is_short else None
    if statement is None:
        raise ProtocolError("round keys: not signed by the pinned coordinator; nothing was sealed")
    try:
        offer = Offer.model_validate_json(statement)
    except ValidationError:
        raise ProtocolError("round keys: of another version of ProxyMoE; update one side") from None
    if (offer.run, offer.round) != (run, number):
        raise ProtocolError(f"round keys: for round {offer.round} of another task, not {number}")
    if not offer.issued - skew <= now < offer.expires + skew:
        raise ProtocolError(
            f"round keys: valid from {offer.issued} to {offer.expires}, and here it is {now:.0f}; "
            "the round is over, or the clock is wrong"
        )
    return offer


def wrap(offer: Offer, suite: int, secret: bytes, bound: bytes) -> bytes:
    """The content key, to be unwrapped only by the offer's owner and with the same bound bytes.

    Raises:
        ProtocolError: the offer's key for this suite cannot be used.
    """
    for public in offer.keys:
        if public.suite == suite:
            try:
                key = SUITES[suite].load(bytes.fromhex(public.key))
                return SUITES[suite].hpke.encrypt(secret, key, bound)
            except UNREADABLE:
                break
    raise ProtocolError(f"round keys: no usable key for suite {suite}")


def best_suite(offer: Offer) -> int:
    """The best suite that both the offer and the installed library have.

    Raises:
        ProtocolError: there is none.
    """
    theirs = {public.suite for public in offer.keys}
    for suite in offered():
        if suite in theirs:
            return suite
    raise ProtocolError(f"round keys: suites {sorted(theirs)}, and here are {offered()}")
