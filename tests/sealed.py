"""Devices that seal what they answer: real keys and envelopes, called instead of written to."""

from proxymoe.client.envelopes import Envelopes, offered
from proxymoe.common.identity import new_device_key, new_signing_key, public_key, verifying_key
from proxymoe.common.messages import decode
from proxymoe.common.round_keys import verify_offer
from proxymoe.common.sealing import seal
from proxymoe.server.envelopes import Envelopes as Opener
from proxymoe.simulations.faults.cohort import InMemory, honest

SIGNING = new_signing_key()
COORDINATOR = verifying_key(SIGNING)
SECONDS = 600.0
_PRIVATE = {name: new_device_key() for name in "abcd"}
PUBLIC = {name: public_key(key).decode() for name, key in _PRIVATE.items()}


class Clock:
    """Unix seconds that stand still until they are set."""

    def __init__(self, now=1_000_000.0):
        self.now = now

    def __call__(self):
        return self.now


def opener(federation, store, clock, keys=PUBLIC, signing_key=SIGNING):
    """The coordinator's side."""
    return Opener(federation, store, signing_key, SECONDS, lambda: keys, clock)


class Sealed(InMemory):
    """A transport to such devices, whose tasks come with the opener's keys."""

    def __init__(self, opener, clock, names="abc", answers=None):
        super().__init__(names, answers)
        self.opener, self._clock = opener, clock
        self.holders = {name: Envelopes(lambda name=name: _PRIVATE[name]) for name in names}
        self.asked: list[list[str]] = []

    def exchange(self, tasks):
        """See `server.round.Transport`."""
        self.asked.append(sorted(tasks))
        headers = {name: decode(task)[0] for name, task in tasks.items()}
        for name, content in super().exchange(tasks):
            offer = offered(self.opener.offer(), COORDINATOR, self._clock(), headers[name])
            yield name, self.holders[name].sealed(headers[name], offer, content)


def envelope(task, signed, clock, content=None, **changes):
    """What the device of a task would seal, if it said these things in the header."""
    header, _ = decode(task)
    offer = verify_offer(signed, COORDINATOR, clock(), run=header.run, number=header.round)
    said = {"device": header.device, "base": header.base, "plan": header.plan, "mode": "plain"}
    key = _PRIVATE[changes.pop("signed_by", header.device)]
    return seal(honest(task) if content is None else content, offer, key, **{**said, **changes})
