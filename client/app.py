"""Flower edge of a device: handlers that decode, call and encode.

Model code is imported when a task is answered or a device opened, and not before: a process that
only has to say who the device is stays small.

What goes wrong inside stays inside. The coordinator gets a refusal, or the text of a protocol
error, or the name of an exception; never a message, a path or a stack trace.
"""

# ruff: noqa: PLC0415  see above

import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read once, when flwr is imported

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from proxymoe.common.errors import ProtocolError
from proxymoe.common.messages import (
    CONTENT,
    DESCRIBE,
    LETTER,
    RECORD,
    TRAIN,
    Description,
    Refusal,
    TrainTask,
    address_of,
    decode,
    encode,
)

if TYPE_CHECKING:
    from proxymoe.client.personalize import Device

log = logging.getLogger(__name__)

FAILED = 2
"""Flower's error code for a ClientApp that raised."""
MAX_OPEN = 4
"""Devices that one process keeps open."""

OpenDevice = Callable[[Context], "Device"]
"""Opens the device that a node is: its submodel, its layout, its private examples."""
Describe = Callable[[Context], Description]
"""Tells what the device that a node is would say of itself once it is open."""

_open: OrderedDict[tuple[int, int], "Device"] = OrderedDict()
# By run and node, least recently used first. It belongs to the process, not to a ClientApp:
# Flower's simulation shares a process between nodes, and sends it a new ClientApp every time.


def client_app(
    open_device: OpenDevice,
    describe: Describe | None = None,
    max_open: int = MAX_OPEN,
    answer: Callable[[bytes], bytes] | None = None,
) -> ClientApp:
    """A ClientApp that answers for the devices that `open_device` opens.

    Args:
        open_device: called when a device has to train.
        describe: called when it has to say who it is; None has it opened for that, too.
        max_open: most devices that are open in a process at once; those unused for longest are
            closed.
        answer: answers a letter of secure aggregation; None takes no part in it.
    """
    app = ClientApp()

    def opened(context: Context) -> Description:
        device = _device(open_device, context, max_open)
        return Description(device=device.name, plan=device.loaded.plan.digest)

    described = describe or opened

    # These two may be pickled with all they name, so the work is in the functions of this module.
    @app.query(DESCRIBE.partition(".")[2])
    def description(message: Message, context: Context) -> Message:
        return _reply(message, lambda: ConfigRecord(described(context).model_dump()))

    @app.train(TRAIN.partition(".")[2])
    def train(message: Message, context: Context) -> Message:
        return _reply(message, lambda: _update(message, open_device, context, max_open))

    if answer is not None:

        @app.query(LETTER.partition(".")[2])
        def letter(message: Message, context: Context) -> Message:  # noqa: ARG001  Flower's
            return _reply(message, lambda: ConfigRecord({CONTENT: answer(_content(message))}))

    return app


def withheld(
    message: Message,
    answer: RecordDict | Error,
    withhold: Callable[[TrainTask, bytes], bytes],
) -> RecordDict | Error:
    """An answer without its update, if that is to be summed under masks.

    Args:
        message: what is answered.
        answer: of the app.
        withhold: takes task and reply, keeps the update, and returns what is sent in its place.
    """
    if isinstance(answer, Error) or message.metadata.message_type != TRAIN:
        return answer
    task, _ = decode(_content(message))
    if not isinstance(task, TrainTask) or not task.masked:
        return answer
    reply = answer[RECORD]
    assert isinstance(reply, ConfigRecord)
    content = reply[CONTENT]
    assert isinstance(content, bytes)
    return RecordDict({RECORD: ConfigRecord({CONTENT: withhold(task, content)})})


def enveloped(answer: RecordDict | Error, envelope: bytes | None) -> RecordDict | Error:
    """What is sent: this envelope, or without one the answer as it is."""
    return answer if envelope is None else RecordDict({RECORD: ConfigRecord({CONTENT: envelope})})


def _content(message: Message) -> bytes:
    record = message.content.get(RECORD)
    content = record.get(CONTENT) if isinstance(record, ConfigRecord) else None
    if not isinstance(content, bytes):
        raise ProtocolError("a message without a task")
    return content


def _update(
    message: Message, open_device: OpenDevice, context: Context, max_open: int
) -> ConfigRecord:
    task = _content(message)
    from proxymoe.client.personalize import personalize

    try:
        reply = personalize(_device(open_device, context, max_open), task)
    except ProtocolError:
        raise
    except Exception:
        log.exception("a task failed on this device")
        reply = _refusal(task)
    return ConfigRecord({CONTENT: reply})


def _refusal(task: bytes) -> bytes:
    header, _ = decode(task)
    return encode(Refusal(**address_of(header), reason="failed"))


def _reply(message: Message, answer: Callable[[], ConfigRecord]) -> Message:
    """The answer, or an error reply that gives nothing private away."""
    try:
        return Message(RecordDict({RECORD: answer()}), reply_to=message)
    except ProtocolError as error:
        reason = str(error)
    except Exception as error:
        log.exception("a message failed on this device")
        reason = f"the device failed ({type(error).__name__})"
    return Message(Error(FAILED, reason), reply_to=message)


def _device(open_device: OpenDevice, context: Context, max_open: int) -> "Device":
    """The node's device, opened if it is not open yet."""
    key = (context.run_id, context.node_id)
    if key not in _open:
        while len(_open) >= max_open:
            _open.popitem(last=False)
        _open[key] = open_device(context)
    _open.move_to_end(key)
    return _open[key]
