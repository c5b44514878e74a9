"""Devices whose updates wait to be summed under masks: real ones, called instead of written to."""

from proxymoe.client.masked import MaskedUpdates
from proxymoe.client.records import Records
from proxymoe.common.contribution import Limits
from proxymoe.common.errors import ProtocolError
from proxymoe.common.identity import new_device_key, public_key
from proxymoe.common.messages import decode
from proxymoe.common.secagg import Phase
from proxymoe.server.journal import initial_state
from proxymoe.server.masked_round import MaskRules
from proxymoe.server.round import tasks_of
from proxymoe.simulations.faults.cohort import InMemory, honest

LIMITS = Limits(smallest_cohort=2, smallest_class=2)
RULES = MaskRules(smallest_cohort=2, smallest_class=2)


class Fleet(InMemory):
    """A transport to such devices; what is in `lost` never arrives, each once.

    Args:
        folder: for their records.
        federation: whose members they are.
        limits: of all their owners.
    """

    def __init__(self, folder, federation, limits=LIMITS):
        super().__init__("".join(federation.members))
        self._folder, self._limits = folder, limits
        self._private = {name: new_device_key() for name in federation.members}
        self.keys = {name: public_key(key).decode() for name, key in self._private.items()}
        self.holders = {name: self._started(name) for name in federation.members}
        self.lost: list[tuple[int, str]] = []
        """(which of the five answers, device)."""
        self.asked: list[set[str]] = []

    def _started(self, name):
        records = Records(self._folder / f"{name}.db")
        return MaskedUpdates(name, self._private[name], records, lambda: self._limits)

    def restart(self, name):
        """Ends the process of a device; its records stay."""
        self.holders[name] = self._started(name)

    def train(self, federation):
        """All of them have an update of the first round."""
        state = initial_state(federation.layout.size)
        dict(self.exchange(tasks_of(federation, state, federation.members)))

    def exchange(self, tasks):
        """See `server.round.Transport`: what comes back is that there is an update."""
        for name, task in tasks.items():
            yield name, self.holders[name].withhold(decode(task)[0], honest(task))

    def exchange_letters(self, letters):
        """See `masked_round.Exchange`; who refuses does not answer."""
        self.asked.append(set(letters))
        for name, letter in letters.items():
            try:
                reply = self.holders[name].answer(letter)
            except ProtocolError:
                continue
            attempt = self.holders[name]._attempt
            answers = list(Phase).index(attempt.device.phase)
            if (answers, name) in self.lost:
                self.lost.remove((answers, name))
            else:
                yield name, reply
