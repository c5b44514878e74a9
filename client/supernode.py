"""Flower edge of a device: what the SuperNode's Runtime API takes and gives, task by task.

The one file with private names of Flower, all of them as in flwr 1.41 (see `client/node.py`):

| name                                | why                                                      |
|-------------------------------------|----------------------------------------------------------|
| proto.*_pb2                         | requests of the SuperNode's Runtime API                  |
| supercore.runtime.RuntimeHttpClient | sends them; Flower's own retries and heartbeats would    |
|                                     | interrupt this process when the SuperNode refuses one    |
| supercore.protobuf.client           | where headers are added; Flower's own way costs 20 MB    |
| supercore.auth, supercore.constant  | the signature of AcquireTask, a task's token and type    |
| supercore.inflatable                | a message travels as a tree of objects                   |
| Metadata._message_id                | whose root's id is the message's                         |
| common.serde, app.message.message   | messages and contexts as bytes, messages without content |
"""
# ruff: noqa: E402  the version is checked before any private name is imported

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from proxymoe.client.node import require_flower
from proxymoe.common.errors import ConfigError

require_flower()

import httpx
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common import serde
from flwr.proto import message_pb2, runtime_pb2
from flwr.supercore.auth import create_superexec_auth_metadata, derive_auth_secret
from flwr.supercore.constant import TASK_TOKEN_HEADER, TaskType
from flwr.supercore.inflatable import inflatable_object, inflatable_utils
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.runtime import RuntimeHttpClient

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 << 20
"""A larger message is refused; what is large travels as blobs."""
HEARTBEAT_SECONDS = 10.0
"""Between two signs of life; the SuperNode gives a task up after 60 s without one."""

Pair = tuple[bytes, bytes]
Headers = Callable[[ProtobufRequestContext], Mapping[str, str]]
Request = TypeVar("Request")
Response = TypeVar("Response")


class Unreadable(Exception):
    """A message that cannot be answered as it is; the text may leave the device."""


class Lost(Exception):
    """Nobody waits for the answer to a task any more."""


class Away(Exception):
    """The SuperNode does not answer."""


class SuperNode:
    """The SuperNode at host:port, on loopback, for who knows its secret; close it in the end.

    Args:
        address: of its Runtime API.
        secret: content of its `--superexec-auth-secret-file`.
    """

    def __init__(self, address: str, secret: bytes) -> None:
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it would tell of every request
        self.address = address
        self._key = derive_auth_secret(secret)
        self._client = _client(address, self._signed)

    def close(self) -> None:
        """Ends its connections."""
        self._client.close()

    def acquire(self) -> str:
        """The token of a task that is ours now; empty if there is none.

        Raises:
            Away: it does not answer, for now.
            ConfigError: it has another secret.
        """
        request = runtime_pb2.AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        try:
            return str(self._client.AcquireTask(request).token)
        except httpx.HTTPError as error:
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 401:
                raise ConfigError(
                    f"the SuperNode at {self.address} has another secret than this runner; "
                    "start both with the same file"
                ) from error
            raise Away(str(error)) from error

    def _signed(self, call: ProtobufRequestContext) -> Mapping[str, str]:
        return create_superexec_auth_metadata(
            auth_secret=self._key, method=call.rpc_method, request=call.message
        )


class Task:
    """One task's talk with the SuperNode, which knows it by its token; `Lost` if that ends."""

    def __init__(self, supernode: SuperNode, token: str) -> None:
        self._client = _client(supernode.address, lambda _: {TASK_TOKEN_HEADER: token})
        self.asked: Message
        self._beaten = time.monotonic()
        self._is_last_look = False

    def close(self) -> None:
        """Ends its connections."""
        self._client.close()

    def pull(self, superseded: Callable[[], bool]) -> tuple[Message, Context]:
        """The message and the node's context; nobody looks at the bundle that comes along.

        Args:
            superseded: whether the SuperNode has another task since. It receives one message at a
                time, so what it does not have by then, it will never have: when a run ends while a
                message of it is under way, Flower leaves the task behind.
        """
        given = self._call(self._client.PullTaskInput, runtime_pb2.PullTaskInputRequest())
        request = runtime_pb2.PullAppMessagesRequest()
        # A task can be there a moment before its message, and minutes before its objects.
        while not (listed := self._call(self._client.PullMessages, request)).messages_list:
            self._wait(superseded)
        self.asked = serde.message_from_proto(listed.messages_list[0])
        tree, size = listed.message_object_trees[0], 0
        parts: dict[str, bytes] = {}
        for name in {part.object_id for part in inflatable_object.iterate_object_tree(tree)}:
            if size <= MAX_MESSAGE_BYTES:
                parts[name] = self._part(name, superseded)
                size += len(parts[name])
        got = message_pb2.ConfirmMessageReceivedRequest(message_object_id=tree.object_id)
        self._call(self._client.ConfirmMessageReceived, got)  # or the SuperNode would keep it
        if size > MAX_MESSAGE_BYTES:
            raise Unreadable(f"more than {MAX_MESSAGE_BYTES >> 20} MiB of message")
        try:
            message = inflatable_utils.inflate_object_from_contents(tree.object_id, parts)
            assert isinstance(message, Message), type(message)
        except Exception as error:
            log.exception("a message cannot be read")
            raise Unreadable("the message cannot be read") from error
        message.metadata.__dict__["_message_id"] = tree.object_id
        self.asked = message  # with its content, which a listing leaves out
        return message, serde.context_from_proto(given.context)

    def push(self, answer: RecordDict | Error, context: Context | None = None) -> None:
        """Answers what was pulled, with the new context if there is one; that ends the task."""
        reply = Message(answer, reply_to=self.asked)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with inflatable_object.no_object_id_recompute():
            request = runtime_pb2.PushAppMessagesRequest(
                messages_list=[serde.message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[inflatable_object.get_object_tree(reply)],
            )
            taken = self._call(self._client.PushMessages, request)
            parts = inflatable_object.get_all_nested_objects(reply)
            for name in taken.objects_to_push:
                part = message_pb2.PushObjectRequest(
                    object_id=name,
                    object_content=parts[name].deflate(),
                    session_id=taken.session_id,
                )
                self._call(self._client.PushObject, part)
                self.beat()
        end = runtime_pb2.PushTaskOutputRequest(
            sub_status="completed" if context else "failed",
            context=serde.context_to_proto(context) if context else None,
        )
        self._call(self._client.PushTaskOutput, end)

    def give_up(self) -> None:
        """Ends the task without an answer, if the SuperNode still knows of it.

        Left alone, it would lapse after 60 s, and Flower would put an error into the outbox. That
        is taken for the answer to whatever message comes next, whose own then waits for another.
        """
        with contextlib.suppress(Lost):
            end = runtime_pb2.PushTaskOutputRequest(sub_status="failed")
            self._call(self._client.PushTaskOutput, end)

    def beat(self, pause: float = 0.0) -> None:
        """A sign of life if one is due, after a pause in seconds."""
        time.sleep(pause)
        if time.monotonic() - self._beaten >= HEARTBEAT_SECONDS:
            request = runtime_pb2.SendTaskHeartbeatRequest()
            if not self._call(self._client.SendTaskHeartbeat, request).success:
                raise Lost("the SuperNode has given it up")
            self._beaten = time.monotonic()

    def _part(self, name: str, superseded: Callable[[], bool]) -> bytes:
        request = message_pb2.PullObjectRequest(object_id=name)
        while not (found := self._call(self._client.PullObject, request)).object_available:
            if not found.object_found:
                raise Lost("its message is gone")
            self._wait(superseded)
        return found.object_content

    def _wait(self, superseded: Callable[[], bool]) -> None:
        """A pause; `Lost` if what was waited for cannot come any more."""
        if self._is_last_look:
            raise Lost("its message never came whole")
        self.beat(pause=0.1)
        self._is_last_look = superseded()  # it may have come just before the other task

    def _call(
        self, call: Callable[[Request], Response], request: Request, tries: int = 3
    ) -> Response:
        try:
            return call(request)
        except httpx.HTTPStatusError as error:
            raise Lost(f"the SuperNode says {error.response.status_code}") from error
        except httpx.TransportError as error:  # perhaps it just closed an idle connection
            if tries == 1:
                raise Lost(f"the SuperNode is away: {error}") from error
        return self._call(call, request, tries - 1)


@dataclass
class _Adding:
    """Flower's interceptor: adds headers to every request."""

    headers: Headers

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers.update(self.headers(context))
        return call_next(context)


def _client(address: str, headers: Headers) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(address, True, None, [_Adding(headers)])


def packed(message: Message, context: Context) -> Pair:
    """A message and its context as bytes, for another process."""
    parts = serde.message_to_proto(message), serde.context_to_proto(context)
    return parts[0].SerializeToString(), parts[1].SerializeToString()


def unpacked(pair: Pair) -> tuple[Message, Context]:
    """What `packed` packed."""
    message = message_pb2.Message.FromString(pair[0])
    context = message_pb2.Context.FromString(pair[1])
    return serde.message_from_proto(message), serde.context_from_proto(context)
