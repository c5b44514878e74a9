"""The device's side of secure aggregation: five answers, each given once. See `secagg`.

The order of a `Device`'s life is `secagg.TURNS`; its handlers compute an answer from an immutable
state and the letter, and only when nothing was refused does the new state take the old one's place.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np

from proxymoe.common.contribution import Contribution, Limits, Record, check_records
from proxymoe.common.directory import Directory
from proxymoe.common.errors import ProtocolError
from proxymoe.common.fixed_point import pack
from proxymoe.common.letters import (
    Announcement,
    Consent,
    Delivery,
    Introduction,
    Proof,
    Received,
    Release,
    Roster,
    Shares,
    Survivors,
    Upload,
    decode,
    encode,
    header_of,
    statement,
)
from proxymoe.common.masks import (
    KEY_BYTES,
    TAG_BYTES,
    add_masks,
    agree,
    commitment,
    derive,
    pair_key,
    public_half,
    seal,
    self_key,
    unseal,
)
from proxymoe.common.secagg import TURNS, Phase, Terms, continued, introduced
from proxymoe.common.shamir import SHARE_BYTES, split


@dataclass(frozen=True, slots=True)
class Step:
    """A device's answer. If there is a record, it is made durable first."""

    reply: bytes
    record: Record | None = None
    saturated: int = 0
    """Numbers of the update that did not fit the value range; for the owner's eyes."""


@dataclass(frozen=True, slots=True)
class _State:
    phase: Phase
    transcript: str
    roster: Mapping[int, Introduction] = field(default_factory=dict)
    live: tuple[int, ...] = ()
    seeds: Mapping[int, bytes] = field(default_factory=dict)
    """{class: seed} of this device."""
    shares: Mapping[tuple[int, int | None], bytes] = field(default_factory=dict)
    """{(peer, class or None for its key): share}; its own ones among them."""
    senders: tuple[int, ...] = ()
    survivors: frozenset[int] = frozenset()


class Device:
    """One device in one attempt.

    Args:
        name: as in the terms.
        sign: signs with the device's identity key.
        directory: of the peers' identity keys.
        terms: from `parse_terms`.
        limits: what the owner insists on.
        contribution: the update, which no record may name.
        records: everything this device has ever recorded.
        rng: for stochastic rounding.
        entropy: for keys, seeds and shares.

    Raises:
        ProtocolError: the terms are against the limits or do not fit the update, or the update or
            the attempt is on record.
    """

    def __init__(
        self,
        name: str,
        sign: Callable[[bytes], bytes],
        directory: Directory,
        terms: Terms,
        limits: Limits,
        contribution: Contribution,
        records: Iterable[Record],
        rng: np.random.Generator,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        limits.check(terms)
        contribution.check(terms)
        if name not in terms.devices:
            raise ProtocolError(f"terms without device {name!r}")
        self._me = terms.devices.index(name)
        contribution.check_blocks(terms, self._me)
        check_records(terms, contribution.digest, records)
        self._sign, self._directory, self._terms = sign, directory, terms
        self._contribution, self._rng, self._entropy = contribution, rng, entropy
        self._share_key, self._mask_key = entropy(KEY_BYTES), entropy(KEY_BYTES)
        self._announcement = Announcement(
            transcript=terms.transcript,
            device=self._me,
            share_key=public_half(self._share_key),
            mask_key=public_half(self._mask_key),
        )
        self._state = _State(Phase.ANNOUNCE, terms.transcript)

    @property
    def phase(self) -> Phase:
        """What this device has answered last."""
        return self._state.phase

    @property
    def skipped(self) -> list[int]:
        """Blocks of this device that the terms leave out, for too few devices hold them."""
        asked = {block for found in self._terms.classes for block in found.blocks}
        return [block for block in self._contribution.sizes if block not in asked]

    def announce(self) -> Step:
        """The first answer, to the terms; the same one however often it is asked for."""
        return Step(encode(self._announcement, sign=self._sign))

    def answer(self, question: bytes) -> Step:
        """The answer to the coordinator's next question.

        Raises:
            ProtocolError: it is not the next question, or not an acceptable one. The device is as
                before, and answers an acceptable one still.
        """
        state = self._state
        then = TURNS[state.phase].then
        if then is Phase.OVER:
            raise ProtocolError("this device has given all its answers in this attempt")
        received = decode(question)
        if type(received.letter) is not TURNS[then].question:
            wanted = cast("type", TURNS[then].question).__name__
            raise ProtocolError(f"{type(received.letter).__name__} where {wanted} comes next")
        if received.letter.transcript != state.transcript:
            raise ProtocolError("a letter of another attempt, or told differently to others")
        self._state, step = _HANDLERS[then](self, state, received)
        return step

    def _share(self, state: _State, received: Received) -> tuple[_State, Step]:
        """Checks who takes part; seals shares of key and seeds for each of them."""
        letter = cast("Roster", received.letter)
        terms, me = self._terms, self._me
        if len(received.body):
            raise ProtocolError("a roster has no body")
        roster = introduced(terms, letter, self._directory)
        if me not in roster or roster[me].announcement(terms.transcript) != self._announcement:
            raise ProtocolError("this device's own keys are missing from the roster, or changed")
        transcript = continued(state.transcript, header_of(letter))
        live = terms.live(roster, roster)
        mine = terms.held(live, me)
        seeds = {number: self._entropy(KEY_BYTES) for number in mine}
        key_shares = split(self._mask_key, terms.threshold.of(len(roster)), roster, self._entropy)
        seed_shares = {}
        for number in mine:
            holders = terms.classes[number].members & roster.keys()
            least = terms.class_threshold(number, roster)
            seed_shares[number] = split(seeds[number], least, holders, self._entropy)
        sealed = []
        for peer, member in roster.items():
            if peer != me:
                parts = [seed_shares[number][peer] for number in terms.held(live, me, peer)]
                key = derive(agree(self._share_key, member.share_key), transcript, "seal", me, peer)
                sealed.append(seal(key, b"".join([key_shares[peer], *parts])))
        commitments = tuple(commitment(seeds[n], transcript, me, n) for n in mine)
        reply = Shares(transcript=transcript, device=me, commitments=commitments)
        own: dict[tuple[int, int | None], bytes] = {(me, n): seed_shares[n][me] for n in mine}
        then = replace(
            state,
            phase=Phase.SHARE,
            transcript=transcript,
            roster=roster,
            live=live,
            seeds=seeds,
            shares=own,
        )
        return then, Step(encode(reply, b"".join(sealed), self._sign))

    def _upload(self, state: _State, received: Received) -> tuple[_State, Step]:
        """Opens the peers' shares, and masks the update for those who shared."""
        letter = cast("Delivery", received.letter)
        self._check_left(letter.senders, state.roster, state.roster)
        shares = {**state.shares, **self._opened(state, letter.senders, received.body)}
        transcript = continued(state.transcript, header_of(letter))
        live = self._terms.live(state.roster, letter.senders)
        peers = [peer for peer in letter.senders if peer != self._me]
        secrets = {peer: agree(self._mask_key, state.roster[peer].mask_key) for peer in peers}
        packed, saturated = [], 0
        for number in self._terms.held(live, self._me):
            holders = len(self._terms.classes[number].members.intersection(letter.senders))
            words, lost = self._contribution.words_of(self._terms, number, holders, self._rng)
            plus, minus = self._mask_keys(transcript, number, state.seeds[number], secrets)
            add_masks(words, plus, minus)
            packed.append(pack(words, self._terms.word_bits))
            saturated += lost
        then = replace(
            state,
            phase=Phase.UPLOAD,
            transcript=transcript,
            live=live,
            shares=shares,
            senders=letter.senders,
        )
        reply = Upload(transcript=transcript, device=self._me)
        return then, Step(encode(reply, b"".join(packed), self._sign), saturated=saturated)

    def _consent(self, state: _State, received: Received) -> tuple[_State, Step]:
        """Signs the one set of survivors that this device will ever know of."""
        letter = cast("Survivors", received.letter)
        if len(received.body):
            raise ProtocolError("a list of survivors has no body")
        self._check_left(letter.survivors, state.senders, state.roster)
        transcript = continued(state.transcript, header_of(letter))
        then = replace(
            state,
            phase=Phase.CONSENT,
            transcript=transcript,
            live=self._terms.live(state.roster, letter.survivors),
            survivors=frozenset(letter.survivors),
        )
        reply = Consent(transcript=transcript, device=self._me)
        return then, Step(encode(reply, sign=self._sign), self._record(then))

    def _release(self, state: _State, received: Received) -> tuple[_State, Step]:
        """Gives away shares, once enough peers have consented to the same survivors."""
        letter = cast("Proof", received.letter)
        voters = [vote.device for vote in letter.votes]
        if len(received.body) or len(set(voters)) != len(voters):
            raise ProtocolError("a proof has one vote per device, and no body")
        least = self._terms.threshold.of(len(state.roster))
        if not state.survivors.issuperset(voters) or len(voters) < least:
            raise ProtocolError(f"{len(voters)} votes; at least {least} survivors must consent")
        for vote in letter.votes:
            consent = Consent(transcript=state.transcript, device=vote.device)
            name = self._terms.devices[vote.device]
            self._directory.check(name, statement(consent), bytes.fromhex(vote.signature))
        due = self._terms.due(state.live, state.senders, state.survivors, self._me)
        body = b"".join(state.shares[wanted] for wanted in due)
        # What was not due goes with the state: nothing is left to answer a second question with.
        then = replace(state, phase=Phase.RELEASE, shares={}, seeds={})
        reply = Release(transcript=state.transcript, device=self._me)
        return then, Step(encode(reply, body, self._sign), self._record(then))

    def _check_left(
        self, left: tuple[int, ...], of: Iterable[int], roster: Mapping[int, Introduction]
    ) -> None:
        needed = self._terms.needed(roster)
        if not set(left) <= set(of) or self._me not in left or len(left) < needed:
            raise ProtocolError(
                f"{len(left)} devices are left; this one and at least {needed} of those before "
                "must be, and no others"
            )

    def _opened(
        self, state: _State, senders: tuple[int, ...], body: memoryview
    ) -> dict[tuple[int, int | None], bytes]:
        """The shares that the senders sealed for this device."""
        found: dict[tuple[int, int | None], bytes] = {}
        start = 0
        for peer in senders:
            if peer == self._me:
                continue
            end = start + self._terms.sealed_bytes(state.live, self._me, peer) + TAG_BYTES
            secret = agree(self._share_key, state.roster[peer].share_key)
            key = derive(secret, state.transcript, "seal", peer, self._me)
            opened = unseal(key, body[start:end])
            what: Iterator[int | None] = iter((None, *self._terms.held(state.live, peer, self._me)))
            for at, number in zip(range(0, len(opened), SHARE_BYTES), what, strict=True):
                found[peer, number] = opened[at : at + SHARE_BYTES]
            start = end
        if start != len(body):
            raise ProtocolError(f"delivery of {len(body)} bytes, expected {start}")
        return found

    def _mask_keys(
        self, transcript: str, number: int, seed: bytes, secrets: Mapping[int, bytes]
    ) -> tuple[list[bytes], list[bytes]]:
        """Keys of the masks to add (own seed, pairs with later devices) and to take off."""
        plus, minus = [self_key(seed, transcript, self._me, number)], list[bytes]()
        for peer in self._terms.classes[number].members & secrets.keys():
            key = pair_key(secrets[peer], transcript, self._me, peer, number)
            (plus if self._me < peer else minus).append(key)
        return plus, minus

    def _record(self, state: _State) -> Record:
        terms, update = self._terms, self._contribution.digest
        where = (terms.run, terms.round, terms.attempt, state.phase, state.transcript)
        return Record(*where, update)


_Handler = Callable[[Device, _State, Received], tuple[_State, Step]]
_HANDLERS: Mapping[Phase, _Handler] = {
    Phase.SHARE: Device._share,
    Phase.UPLOAD: Device._upload,
    Phase.CONSENT: Device._consent,
    Phase.RELEASE: Device._release,
}
