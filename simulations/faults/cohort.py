"""A small federation without a model: real messages over an in-memory transport.

Its replies are functions of their tasks, so whoever knows a task knows the honest reply to it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from proxymoe.client.personalize import clip
from proxymoe.common.adapter import AdapterLayout, Block
from proxymoe.common.config import FederationSettings, TrainSettings
from proxymoe.common.messages import TrainReply, TrainTask, Vector, decode, encode
from proxymoe.common.plan import LayerPlan, Plan
from proxymoe.server.aggregate import PlainSum
from proxymoe.server.round import Answer, Federation, Member
from proxymoe.server.store import Round, RoundStore

BASE = "ab" * 32
NUM_EXPERTS = 4
Reaction = Callable[[bytes], bytes]


def small_layout(rank: int = 2, seed: int = 0) -> AdapterLayout:
    """One attention projection and four experts in each of two layers."""
    blocks = []
    for at in (0, 1):
        path = f"model.layers.{at}"
        blocks.append(Block(f"{path}.self_attn.q_proj", None, 6, 4, "B"))
        ids = range(NUM_EXPERTS)
        blocks += [Block(f"{path}.mlp.experts.gate_up_proj", e, 6, 4, "B") for e in ids]
        blocks += [Block(f"{path}.mlp.experts.down_proj", e, 2, 6, "A") for e in ids]
    return AdapterLayout(tuple(blocks), rank, seed)


def small_plan(*kept: int) -> Plan:
    """The plan that keeps these experts in both layers."""
    layers = {at: LayerPlan(num_experts=NUM_EXPERTS, kept=kept) for at in (0, 1)}
    return Plan(base=BASE, layers=layers)


def small_federation(
    plans: Mapping[str, Plan] | None = None,
    canary: Callable[[Any], float] = lambda _: 1.0,
    *,
    masked: bool = False,
    **settings: Any,
) -> Federation:
    """Three devices with different experts, unless told otherwise; the canary is content."""
    full = small_layout()
    plans = plans or {"a": small_plan(0, 1), "b": small_plan(1, 2), "c": small_plan(0, 1, 2)}
    return Federation(
        run="run",
        base=BASE,
        seed=5,
        layout=full,
        members={name: Member(plan, full.held_under(plan)) for name, plan in plans.items()},
        train=TrainSettings(),
        settings=FederationSettings(**{"rounds": 4, "clip_norm": 1.0, **settings}),
        canary=canary,
        canary_limit=2.0,
        masked=masked,
    )


def plain(federation: Federation) -> Callable[[int], PlainSum]:
    """A plain sum for every round."""
    return lambda _: PlainSum(federation.layout)


def honest(
    content: bytes, change: Callable[[Vector], Vector] = lambda update: update, **header: Any
) -> bytes:
    """A reply whose update depends on the task's adapter and seed, and on nothing else.

    Args:
        content: the task.
        change: applied to the clipped update before it is sent.
        header: fields of the reply that differ from what an honest device says.
    """
    task, vector = decode(content)
    assert isinstance(task, TrainTask)
    noise = np.random.default_rng(task.seed).standard_normal(vector.size)
    update, norm = clip_array((0.2 * noise - 0.3 * vector).astype(np.float32), task.clip_norm)
    address = task.model_dump(include={"run", "round", "device", "base", "plan", "layout"})
    own = {"num_examples": 3, "first_loss": 2.0, "last_loss": 1.0, "norm": norm}
    reply = TrainReply.model_validate(
        {**address, **own, "seconds": 0.0, "peak_rss_mb": 1.0, **header}
    )
    return encode(reply, change(update))


def clip_array(update: Vector, limit: float) -> tuple[Vector, float]:
    """`clip` on an array."""
    clipped, norm = clip(torch.from_numpy(update), limit)
    return clipped.numpy(), norm


class InMemory:
    """A transport to devices that answer honestly, except those told to do otherwise.

    Args:
        names: the devices, in the order in which they answer.
        answers: {device: how it answers}; None never answers.
        extra: (device, reply) pairs that nobody asked for, after all others.
    """

    def __init__(
        self,
        names: str = "abc",
        answers: Mapping[str, Reaction | None] | None = None,
        extra: Callable[[Mapping[str, bytes]], list[tuple[str, bytes]]] = lambda _: [],
    ) -> None:
        self._names = list(names)
        self._answers = answers or {}
        self._extra = extra

    def devices(self) -> list[str]:
        """See `server.round.Transport`."""
        return self._names

    def exchange(self, tasks: Mapping[str, bytes]) -> Iterator[Answer]:
        """See `server.round.Transport`."""
        for name in self._names:
            answer = self._answers.get(name, honest)
            if name in tasks and answer is not None:
                yield name, self.sent(tasks[name], answer(tasks[name]))
        yield from self._extra(tasks)

    def sent(self, task: bytes, content: bytes) -> bytes:  # noqa: ARG002  others look at the task
        """An answer to a task, as its device sends it: here as it is."""
        return content

    def opened(self, number: int, name: str, content: bytes) -> bytes:  # noqa: ARG002
        """What a device says in a reply to a round; `RoundEngine` is to be told of it."""
        return content

    def passed(self, now: Round) -> None:
        """Told of every phase, by `RoundEngine`."""


def in_memory(federation: Federation, store: RoundStore) -> InMemory:  # noqa: ARG001  see `Devices`
    """All devices of a federation, honest and without envelopes."""
    return InMemory("".join(federation.members))


DevicesOf = Callable[[Federation, RoundStore], InMemory]
"""Makes the devices of a federation whose rounds are in this store."""
