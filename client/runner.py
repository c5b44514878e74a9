"""Flower edge of a device: an installed app answers the messages that the SuperNode receives.

It runs beside `flower-supernode --isolation process`, in the place of Flower's SuperExec, which
would unpack the bundle of a run and execute it. Here nobody looks at the bundle: an app that was
installed on the device answers, in a job process that stays warm. If that dies, the coordinator
gets an error, and the next message a new process. This process imports no model code; what the
app answers without any, it answers right here.
"""

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Container

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from proxymoe.client.job import JobDied, JobProcess, Pair
from proxymoe.client.supernode import Away, Lost, SuperNode, Task, Unreadable, packed, unpacked

log = logging.getLogger(__name__)

FAILED, REFUSED, DIED = 2, 6, 8
"""Flower's codes for an app that raised, for a condition not met, and for an app that died."""
MAX_REASON = 200
"""Characters of an error that leave the device."""
POLL_SECONDS = 0.5
"""Between two questions for a task; the SuperNode itself asks its coordinator every 3 s."""
IDLE_SECONDS = 30.0
"""After so long without a message the job process ends, and its memory is free."""

Check = Callable[[Message], str | None]
"""Why a message must not be answered, in words that may leave the device; None if it may be."""
Sending = Callable[
    [Message, RecordDict | Error], contextlib.AbstractContextManager[RecordDict | Error]
]
"""Surrounds the sending of an answer to a message, and yields what is sent; what it raises keeps
the answer here."""
Instead = Callable[[Message, RecordDict | Error], RecordDict | Error]
"""What is sent in the place of an answer to a message; what it raises keeps the answer here."""
LoadApp = Callable[[], ClientApp]
"""Makes the installed app, which imports what is heavy only to answer what needs it. It travels by
name: it must be picklable and no part of `__main__`."""
_app: Callable[[LoadApp], ClientApp] = functools.cache(lambda load: load())


class _Unanswered(Exception):
    """A message gets an error in place of an answer: Flower's code, and a reason."""


class Runner:
    """Answers the messages of one SuperNode, one after another.

    Args:
        address: host:port of the SuperNode's Runtime API, on loopback.
        secret: content of the SuperNode's `--superexec-auth-secret-file`.
        load: makes the app that answers.
        check: asked here about every message, before the app gets to see it.
        sending: entered before anything is sent, errors included, and left once it is; an
            exception from it puts an error without any content in the place of an answer.
        light: types of messages that the app answers at once and without model code, in this
            process; all others wait for the job process.
        instead: sees every answer in this process, before `sending` does.
    """

    def __init__(
        self,
        address: str,
        secret: bytes,
        load: LoadApp,
        check: Check,
        sending: Sending = lambda _, answer: contextlib.nullcontext(answer),
        idle_seconds: float = IDLE_SECONDS,
        light: Container[str] = (),
        instead: Instead = lambda _, answer: answer,
    ) -> None:
        self._address, self._secret = address, secret
        self._check = check
        self._sending, self._instead = sending, instead
        self._idle_seconds = idle_seconds
        self._load, self._light = load, light
        self._jobs = JobProcess(functools.partial(_work, load))
        self._is_away = False
        self._next = ""
        """Token of a task that came while another one was waited for."""

    def run(self, stop: threading.Event) -> None:
        """Returns when `stop` is set; a message that is being answered then gets an error.

        A SuperNode that is away is waited for. No signals are used: any thread will do.

        Raises:
            ConfigError: the SuperNode has another secret.
        """
        supernode = SuperNode(self._address, self._secret)
        with contextlib.closing(self._jobs), contextlib.closing(supernode):
            while not stop.wait(POLL_SECONDS):
                if token := self._acquired(supernode):
                    self._see_to(supernode, token, stop)
                elif self._jobs.idle_seconds > self._idle_seconds:
                    self._jobs.close()

    def _acquired(self, supernode: SuperNode) -> str:
        """The token of a task that is ours now; empty if there is none."""
        if token := self._next:
            self._next = ""
            return token
        try:
            token = supernode.acquire()
        except Away as away:
            if not self._is_away:  # said once, not twice a second
                log.warning("the SuperNode at %s is away: %s", self._address, away)
            self._is_away = True
            return ""
        self._is_away = False
        return token

    def _is_superseded(self, supernode: SuperNode) -> bool:
        """Whether there is a task after the one that is seen to; it is seen to next."""
        self._next = self._next or self._acquired(supernode)
        return bool(self._next)

    def _see_to(self, supernode: SuperNode, token: str, stop: threading.Event) -> None:
        """Sees one task to its end, whatever the message, the app or the SuperNode do."""
        try:
            with contextlib.closing(Task(supernode, token)) as task:
                answer: RecordDict | Error
                context: Context | None
                try:
                    pulled = self._pulled(task, supernode, stop)
                    answer, context = self._answer(task, *pulled, stop)
                except Unreadable as error:
                    answer, context = _error(REFUSED, str(error)), None
                except _Unanswered as error:
                    answer, context = _error(*error.args), None
                self._send(task, answer, context)
        except Lost as error:
            log.warning("a task is lost: %s", error)
        except Exception:  # one bad task must not be the last
            log.exception("a task failed")

    def _pulled(
        self, task: Task, supernode: SuperNode, stop: threading.Event
    ) -> tuple[Message, Context]:
        try:
            return task.pull(lambda: stop.is_set() or self._is_superseded(supernode))
        except Lost:
            task.give_up()
            raise

    def _send(self, task: Task, answer: RecordDict | Error, context: Context | None) -> None:
        """Sends an answer that may be on record, else nothing but that there is none."""
        with contextlib.ExitStack() as stack:
            try:
                answer = self._instead(task.asked, answer)
                answer = stack.enter_context(self._sending(task.asked, answer))
            except Exception:
                log.exception("an answer cannot be put on record, so it is not sent")
                answer, context = Error(FAILED, "the device cannot send now"), None
            task.push(answer, context)

    def _answer(
        self, task: Task, message: Message, context: Context, stop: threading.Event
    ) -> tuple[RecordDict | Error, Context]:
        """What the app says, if it may be asked and answers within the message's life."""
        try:
            reason = self._check(message)
        except Exception as error:
            log.exception("a message cannot be checked")
            reason = f"the check failed ({type(error).__name__})"
        if reason is not None:
            raise _Unanswered(REFUSED, reason)
        if message.metadata.message_type in self._light:
            answer, context = _answered(self._load, message, context)
        else:
            answer, context = self._answer_of_job(task, message, context, stop)
        return answer.error if answer.has_error() else answer.content, context

    def _answer_of_job(
        self, task: Task, message: Message, context: Context, stop: threading.Event
    ) -> tuple[Message, Context]:
        """As `_answered`, in the job process; _Unanswered if that ends first, or the time."""
        deadline = time.monotonic() + message.metadata.ttl
        self._jobs.ask(packed(message, context))
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
            return unpacked(self._jobs.answer())
        except JobDied as error:
            raise _Unanswered(DIED, str(error)) from error


def _error(code: int, reason: str) -> Error:
    log.warning("a message gets an error: %s", reason)
    return Error(code, reason[:MAX_REASON])


def _work(load: LoadApp, job: Pair) -> Pair:
    """In the job process: what `_answered` says, as bytes."""
    return packed(*_answered(load, *unpacked(job)))


def _answered(load: LoadApp, message: Message, context: Context) -> tuple[Message, Context]:
    """The app's answer to a message, and the context after it."""
    try:
        answer = _app(load)(message, context)
    except Exception as error:
        log.exception("a message failed on this device")
        reason = f"the device failed ({type(error).__name__})"
        answer = Message(Error(FAILED, reason), reply_to=message)
    return answer, context
