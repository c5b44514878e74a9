"""A Flower grid whose nodes are functions of this process, with failures on demand."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

SERVER = 1
Node = Callable[[Message], Message | None]
"""How a node answers; None: it never does."""


def identify(run_id: int = 7) -> None:
    """Lets this process make Flower messages, which else only a Flower run may."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run_id, 1, SERVER


def context_of(node_id: int, run_id: int = 7) -> Context:
    """A node's context at the start of a run."""
    return Context(run_id, node_id, UserConfig(), RecordDict(), UserConfig())


class LocalGrid(Grid):
    """Carries messages to functions.

    Args:
        nodes: {node id: how it answers}; may change at any time.
        delays: {node id: how many pulls its replies are late}.
        refused: what stands for the id of a message to an unknown node.
    """

    def __init__(
        self,
        nodes: Mapping[int, Node],
        delays: Mapping[int, int] | None = None,
        refused: tuple[str, ...] = ("",),
    ) -> None:
        identify()
        self.nodes = dict(nodes)
        self.delays = dict(delays or {})
        self.sent: list[Message] = []
        self._refused = refused
        self._waiting: dict[str, tuple[Message, int]] = {}

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids: list[str] = []
        for message in messages:
            if message.metadata.dst_node_id not in self.nodes:
                ids += self._refused
                continue
            self.sent.append(message)
            name = f"message-{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = name
            late = self.delays.get(message.metadata.dst_node_id, 0)
            self._waiting[name] = message, late
            ids.append(name)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for name in message_ids:
            message, late = self._waiting.pop(name)  # KeyError: nobody sent it, or it is answered
            node = self.nodes.get(message.metadata.dst_node_id)
            reply = node(message) if node and late == 0 else None
            if reply is None:
                self._waiting[name] = message, max(0, late - 1)
            else:
                replies.append(reply)
        return replies

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, *args: Any, **kwargs: Any) -> Iterable[Message]:
        raise NotImplementedError


def failed(message: Message, code: int = 2, reason: str = "broken") -> Message:
    """Flower's report of a failure, which need not come from the node."""
    reply = Message(Error(code, reason), reply_to=message)
    reply.metadata.__dict__["_src_node_id"] = SERVER
    return reply
