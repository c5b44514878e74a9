"""Flower edge of a device: an installed app answers the messages that the SuperNode receives.

It runs beside `flower-supernode --isolation process`, in the place of Flower's SuperExec, which
would unpack the bundle of a run and execute it. Here nobody looks at the bundle: an app that was
installed on the device answers, in a job process that stays warm. If that dies, the coordinator
gets an error, and the next message a new process. This process imports no model code.

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
import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from proxymoe.client.job import JobDied, JobProcess, Pair
from proxymoe.client.node import require_flower
from proxymoe.common.errors import ConfigError

require_flower()

import httpx
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common import serde
from flwr.proto import message_pb2, runtime_pb2
from flwr.supercore.auth import create_superexec_auth_metadata, derive_auth_secret
from flwr.supercore.constant import TASK_TOKEN_HEADER, TaskType
from flwr.supercore.inflatable import inflatable_object, inflatable_utils
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.runtime import RuntimeHttpClient

log = logging.getLogger(__name__)

FAILED, REFUSED, DIED = 2, 6, 8
"""Flower's codes for an app that raised, for a condition not met, and for an app that died."""
MAX_REASON = 200
"""Characters of an error that leave the device."""
MAX_MESSAGE_BYTES = 64 << 20
"""A larger message is refused; what is large travels as blobs."""
POLL_SECONDS = 0.5
"""Between two questions for a task; the SuperNode itself asks its coordinator every 3 s."""
HEARTBEAT_SECONDS = 10.0
"""Between two signs of life; the SuperNode gives a task up after 60 s without one."""
IDLE_SECONDS = 30.0
"""After so long without a message the job process ends, and its memory is free."""

Check = Callable[[Message], str | None]
"""Why a message must not be answered, in words that may leave the device; None if it may be."""
LoadApp = Callable[[], ClientApp]
"""Makes the installed app, in the job process, where it imports what is heavy. It travels by name:
it must be picklable and no part of `__main__`."""
_app: Callable[[LoadApp], ClientApp] = functools.cache(lambda load: load())
Headers = Callable[[ProtobufRequestContext], Mapping[str, str]]
Request = TypeVar("Request")
Response = TypeVar("Response")


class _Unanswered(Exception):
    """A message gets an error in place of an answer: Flower's code, and a reason."""


class _Lost(Exception):
    """Nobody waits for the answer to a task any more."""


class Runner:
    """Answers the messages of one SuperNode, one after another.

    Args:
        address: host:port of the SuperNode's Runtime API, on loopback.
        secret: content of the SuperNode's `--superexec-auth-secret-file`.
        load: makes the app that answers.
        check: asked here about every message, before the app gets to see it.
    """

    def __init__(
        self,
        address: str,
        secret: bytes,
        load: LoadApp,
        check: Check,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self._address = address
        self._key = derive_auth_secret(secret)
        self._check = check
        self._idle_seconds = idle_seconds
        self._jobs = JobProcess(functools.partial(_work, load))
        self._is_away = False

    def run(self, stop: threading.Event) -> None:
        """Returns when `stop` is set; a message that is being answered then gets an error.

        A SuperNode that is away is waited for. No signals are used: any thread will do.

        Raises:
            ConfigError: the SuperNode has another secret.
        """
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it would tell of every request
        with contextlib.closing(self._jobs), _client(self._address, self._signed) as client:
            while not stop.wait(POLL_SECONDS):
                if token := self._acquired(client):
                    self._see_to(token, stop)
                elif self._jobs.idle_seconds > self._idle_seconds:
                    self._jobs.close()

    def _signed(self, call: ProtobufRequestContext) -> Mapping[str, str]:
        return create_superexec_auth_metadata(
            auth_secret=self._key, method=call.rpc_method, request=call.message
        )

    def _acquired(self, client: RuntimeHttpClient) -> str:
        """The token of a task that is ours now; empty if there is none."""
        request = runtime_pb2.AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        try:
            token = client.AcquireTask(request).token
        except httpx.HTTPError as error:
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 401:
                raise ConfigError(
                    f"the SuperNode at {self._address} has another secret than this runner; "
                    "start both with the same file"
                ) from error
            if not self._is_away:  # said once, not twice a second
                log.warning("the SuperNode at %s is away: %s", self._address, error)
            self._is_away = True
            return ""
        self._is_away = False
        return token

    def _see_to(self, token: str, stop: threading.Event) -> None:
        """Sees one task to its end, whatever the message, the app or the SuperNode do."""
        try:
            with _client(self._address, lambda _: {TASK_TOKEN_HEADER: token}) as client:
                task = _Task(client)
                try:
                    task.push(*self._answer(task, *task.pull(), stop))
                except _Unanswered as error:
                    code, reason = error.args
                    log.warning("a message gets an error: %s", reason)
                    task.push(Error(code, reason[:MAX_REASON]))
        except _Lost as error:
            log.warning("a task is lost: %s", error)
        except Exception:  # one bad task must not be the last
            log.exception("a task failed")

    def _answer(
        self, task: "_Task", message: Message, context: Context, stop: threading.Event
    ) -> tuple[RecordDict | Error, Context]:
        """What the app says, if it may be asked and answers within the message's life."""
        try:
            reason = self._check(message)
        except Exception as error:
            log.exception("a message cannot be checked")
            reason = f"the check failed ({type(error).__name__})"
        if reason is not None:
            raise _Unanswered(REFUSED, reason)
        deadline = time.monotonic() + message.metadata.ttl
        self._jobs.ask(_packed(message, context))
        try:
            while not self._jobs.poll(POLL_SECONDS):
                task.beat()
                if stop.is_set():
                    raise _Unanswered(DIED, "the device was stopped")
                if time.monotonic() > deadline:
                    raise _Unanswered(DIED, "the device took longer than the message lives")
        except BaseException:
            self._jobs.close()  # or its answer would be taken for the next one's
            raise
        try:
            answer, context = _unpacked(self._jobs.answer())
        except JobDied as error:
            raise _Unanswered(DIED, str(error)) from error
        return answer.error if answer.has_error() else answer.content, context


class _Task:
    """One task's talk with the SuperNode, which knows it by its token; `_Lost` if that ends."""

    def __init__(self, client: RuntimeHttpClient) -> None:
        self._client = client
        self._asked: Message
        self._beaten = time.monotonic()

    def pull(self) -> tuple[Message, Context]:
        """The message and the node's context; nobody looks at the bundle that comes along."""
        given = self._call(self._client.PullTaskInput, runtime_pb2.PullTaskInputRequest())
        request = runtime_pb2.PullAppMessagesRequest()
        # A task can be there a moment before its message, and minutes before its objects.
        while not (listed := self._call(self._client.PullMessages, request)).messages_list:
            self.beat(pause=0.1)
        self._asked = serde.message_from_proto(listed.messages_list[0])
        tree, size = listed.message_object_trees[0], 0
        parts: dict[str, bytes] = {}
        for name in {part.object_id for part in inflatable_object.iterate_object_tree(tree)}:
            if size <= MAX_MESSAGE_BYTES:
                parts[name] = self._part(name)
                size += len(parts[name])
        got = message_pb2.ConfirmMessageReceivedRequest(message_object_id=tree.object_id)
        self._call(self._client.ConfirmMessageReceived, got)  # or the SuperNode would keep it
        if size > MAX_MESSAGE_BYTES:
            raise _Unanswered(REFUSED, f"more than {MAX_MESSAGE_BYTES >> 20} MiB of message")
        try:
            message = inflatable_utils.inflate_object_from_contents(tree.object_id, parts)
            assert isinstance(message, Message), type(message)
        except Exception as error:
            log.exception("a message cannot be read")
            raise _Unanswered(REFUSED, "the message cannot be read") from error
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message, serde.context_from_proto(given.context)

    def push(self, answer: RecordDict | Error, context: Context | None = None) -> None:
        """Answers what was pulled, with the new context if there is one; that ends the task."""
        reply = Message(answer, reply_to=self._asked)
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

    def beat(self, pause: float = 0.0) -> None:
        """A sign of life if one is due, after a pause in seconds."""
        time.sleep(pause)
        if time.monotonic() - self._beaten >= HEARTBEAT_SECONDS:
            request = runtime_pb2.SendTaskHeartbeatRequest()
            if not self._call(self._client.SendTaskHeartbeat, request).success:
                raise _Lost("the SuperNode has given it up")
            self._beaten = time.monotonic()

    def _part(self, name: str) -> bytes:
        request = message_pb2.PullObjectRequest(object_id=name)
        while not (found := self._call(self._client.PullObject, request)).object_available:
            if not found.object_found:
                raise _Lost("its message is gone")
            self.beat(pause=0.1)
        return found.object_content

    def _call(
        self, call: Callable[[Request], Response], request: Request, tries: int = 3
    ) -> Response:
        try:
            return call(request)
        except httpx.HTTPStatusError as error:
            raise _Lost(f"the SuperNode says {error.response.status_code}") from error
        except httpx.TransportError as error:  # perhaps it just closed an idle connection
            if tries == 1:
                raise _Lost(f"the SuperNode is away: {error}") from error
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


def _work(load: LoadApp, job: Pair) -> Pair:
    """In the job process: the app's answer to a message, and the context after it."""
    message, context = _unpacked(job)
    try:
        answer = _app(load)(message, context)
    except Exception as error:
        log.exception("a message failed on this device")
        reason = f"the device failed ({type(error).__name__})"
        answer = Message(Error(FAILED, reason), reply_to=message)
    return _packed(answer, context)


def _packed(message: Message, context: Context) -> Pair:
    parts = serde.message_to_proto(message), serde.context_to_proto(context)
    return parts[0].SerializeToString(), parts[1].SerializeToString()


def _unpacked(pair: Pair) -> tuple[Message, Context]:
    message = message_pb2.Message.FromString(pair[0])
    context = message_pb2.Context.FromString(pair[1])
    return serde.message_from_proto(message), serde.context_from_proto(context)
