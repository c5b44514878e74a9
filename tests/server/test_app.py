"""Tasks over a Flower grid: whoever fails, is late or unknown is missing, and nobody else."""

import logging

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from proxymoe.common.messages import CONTENT, DESCRIBE, LETTER, RECORD, ROUND_KEYS, TRAIN
from proxymoe.server.aggregate import PlainSum
from proxymoe.server.app import GridTransport, server_app
from proxymoe.server.journal import initial_state
from proxymoe.server.round import run_round
from proxymoe.simulations.faults.cohort import InMemory, honest, small_federation
from tests.grid import LocalGrid, context_of, failed

PLAN = "ab" * 32
TASKS = {name: f"task for {name}".encode() for name in "abc"}


def reply_with(message, **fields):
    return Message(RecordDict({RECORD: ConfigRecord(fields)}), reply_to=message)


def node(name, answer=lambda task: b"done: " + task, **described):
    """A device that answers tasks; `answer` gives bytes, or a whole message from a message."""

    def receive(message):
        if message.metadata.message_type == DESCRIBE:
            return reply_with(message, **{"device": name, "plan": PLAN, **described})
        assert message.metadata.message_type == TRAIN
        task = message.content[RECORD][CONTENT]
        return reply_with(message, **{CONTENT: answer(task)})

    return receive


def at_training(name, react):
    """A device that describes itself well, and then reacts to a task message like this."""
    good = node(name)
    return lambda message: (
        good(message) if message.metadata.message_type == DESCRIBE else react(message)
    )


def transport(grid, num_devices=3, reply_seconds=5.0, gather_seconds=5.0, pause=lambda _: None):
    return GridTransport(grid, lambda: num_devices, gather_seconds, reply_seconds, pause)


def answers(exchange):
    return dict(filter(None, exchange))


def three():
    return {11: node("a"), 12: node("b"), 13: node("c")}


def test_nodes_are_asked_once_which_device_they_are():
    grid = LocalGrid({11: node("c"), 12: node("a"), 13: node("b")})
    link = transport(grid)
    assert link.devices() == ["a", "b", "c"]
    assert link.devices() == ["a", "b", "c"]
    assert [m.metadata.message_type for m in grid.sent] == [DESCRIBE] * 3


def test_each_device_gets_its_own_task_and_replies_come_as_they_arrive():
    link = transport(LocalGrid(three(), delays={11: 2, 12: 1}))
    link.devices()
    replies = list(filter(None, link.exchange(TASKS)))
    assert replies == [(name, b"done: " + TASKS[name]) for name in "cba"]


def test_a_round_over_the_grid_equals_one_in_memory():
    federation = small_federation()
    grid = LocalGrid({20 + i: node(name, honest) for i, name in enumerate("cab")})

    def one_round(link):
        state = initial_state(federation.layout.size)
        return run_round(federation, state, link, PlainSum(federation.layout))

    over_grid, report = one_round(transport(grid))
    in_memory, _ = one_round(InMemory())
    assert report.num_updates == 3
    assert torch.equal(over_grid.adapter, in_memory.adapter)


@pytest.mark.parametrize("code", [2, 3, 5, 8])
def test_an_error_reply_from_anywhere_costs_only_its_device(code, caplog):
    nodes = three() | {12: at_training("b", lambda m: failed(m, code, "x\n" + "y" * 999))}
    link = transport(LocalGrid(nodes))
    link.devices()
    assert answers(link.exchange(TASKS)).keys() == {"a", "c"}
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert line.startswith(f"b: no answer, error {code}")
    assert "\n" not in line
    assert len(line) < 250


def test_a_missing_reply_costs_only_its_device_and_the_deadline(caplog):
    link = transport(LocalGrid(three() | {12: at_training("b", lambda _: None)}), reply_seconds=0.1)
    link.devices()
    assert answers(link.exchange(TASKS)).keys() == {"a", "c"}
    assert "no reply within 0 s from ['b']" in caplog.text


def test_a_late_reply_is_never_taken_for_the_next_rounds():
    late = [True]

    def slow(message):
        return None if late[0] else node("b")(message)

    link = transport(LocalGrid(three() | {12: at_training("b", slow)}), reply_seconds=0.1)
    link.devices()
    assert "b" not in answers(link.exchange({"b": b"first"}))
    late[0] = False
    assert answers(link.exchange({"b": b"second"})) == {"b": b"done: second"}


def test_tasks_expire_with_the_exchange():
    grid = LocalGrid(three())
    link = transport(grid, reply_seconds=60.0)
    link.devices()
    list(link.exchange(TASKS))
    assert {m.metadata.ttl for m in grid.sent if m.metadata.message_type == TRAIN} == {60.0}


@pytest.mark.parametrize("refused", [("",), ()])
def test_a_node_that_has_left_and_a_device_never_met_are_skipped(refused, caplog):
    grid = LocalGrid(three(), refused=refused)
    link = transport(grid)
    link.devices()
    del grid.nodes[12]
    assert answers(link.exchange(TASKS | {"z": b"task"})).keys() == {"a", "c"}
    assert "device b: unreachable" in caplog.text
    assert "device z: unreachable" in caplog.text


@pytest.mark.parametrize(
    "react",
    [
        lambda m: Message(RecordDict(), reply_to=m),
        lambda m: reply_with(m, **{CONTENT: "text"}),
        reply_with,
    ],
    ids=["no record", "text for bytes", "no content"],
)
def test_a_reply_without_our_content_costs_only_its_device(react):
    link = transport(LocalGrid(three() | {12: at_training("b", react)}))
    link.devices()
    assert answers(link.exchange(TASKS)).keys() == {"a", "c"}


@pytest.mark.parametrize(
    "described",
    [{"device": "a" * 129}, {"device": ""}, {"plan": "short"}, {"device": 5}, {"more": 1}],
)
def test_a_node_without_a_valid_description_is_left_out_and_asked_again(described):
    grid = LocalGrid({11: node("a"), 12: node("b", **described)})
    link = transport(grid, num_devices=2)
    assert link.devices() == ["a"]
    grid.nodes[12] = node("b")
    assert link.devices() == ["a", "b"]


def test_the_name_of_a_device_that_is_online_is_not_given_to_another_node(caplog):
    link = transport(LocalGrid({11: node("a"), 12: node("a", lambda _: b"forged")}), num_devices=2)
    assert link.devices() == ["a"]
    assert "node 12: claims the name of device a" in caplog.text
    assert answers(link.exchange({"a": b"task"})) == {"a": b"done: task"}


def test_a_device_that_returns_under_another_node_is_found_there():
    grid = LocalGrid(three())
    link = transport(grid)
    link.devices()
    grid.nodes[99] = grid.nodes.pop(12)
    assert link.devices() == ["a", "b", "c"]
    assert answers(link.exchange(TASKS)).keys() == {"a", "b", "c"}


def test_devices_waits_for_nodes_to_come_and_no_longer_than_it_may(caplog):
    grid, coming = LocalGrid({}), list(three().items())
    link = transport(grid, pause=lambda _: grid.nodes.update([coming.pop()]) if coming else None)
    assert link.devices() == ["a", "b", "c"]

    link = transport(LocalGrid({11: node("a")}), gather_seconds=0.1)
    assert link.devices() == ["a"]
    assert "1 of 3 devices" in caplog.text


def test_a_node_that_does_not_describe_itself_holds_up_nobody_else():
    grid = LocalGrid(three() | {14: lambda _: None})
    link = transport(grid)
    assert link.devices() == ["a", "b", "c"]
    assert link.devices() == ["a", "b", "c"]
    assert len([m for m in grid.sent if m.metadata.dst_node_id == 14]) == 1


def test_a_silent_node_is_waited_for_once_and_met_when_it_speaks():
    pauses: list[float] = []
    grid = LocalGrid({11: node("a"), 12: lambda _: None})
    link = transport(grid, num_devices=2, gather_seconds=0.1, pause=pauses.append)
    assert link.devices() == ["a"]
    assert pauses
    pauses.clear()
    assert link.devices() == ["a"]
    assert not pauses

    grid.nodes[12] = node("b")
    link._asked.clear()  # As if the question that was not answered had lapsed.
    assert link.devices() == ["a", "b"]
    assert not link._silent


def test_what_pause_raises_ends_the_exchange():
    class Enough(Exception):
        pass

    def pause(seconds):
        raise Enough

    link = transport(LocalGrid(three() | {12: at_training("b", lambda _: None)}), pause=pause)
    link.devices()
    with pytest.raises(Enough):
        list(link.exchange(TASKS))


def test_a_server_app_calls_main_with_the_devices_of_its_grid():
    seen = []
    app = server_app(lambda link: seen.extend(link.devices()), 3, 5.0, 5.0)
    app(LocalGrid(three()), context_of(1))
    assert seen == ["a", "b", "c"]


def test_letters_go_where_letters_are_answered():
    kinds = []

    def react(message):
        kinds.append(message.metadata.message_type)
        return reply_with(message, **{CONTENT: b"answer to " + message.content[RECORD][CONTENT]})

    link = transport(LocalGrid({11: at_training("a", react)}), num_devices=1)
    link.devices()
    assert answers(link.exchange_letters({"a": b"letter"})) == {"a": b"answer to letter"}
    assert answers(link.exchange({"a": b"task"})) == {"a": b"answer to task"}
    assert kinds == [LETTER, TRAIN]


def test_round_keys_go_with_tasks_and_with_nothing_else():
    carried = []

    def react(message):
        carried.append((message.metadata.message_type, message.content[RECORD].get(ROUND_KEYS)))
        return reply_with(message, **{CONTENT: b"answer"})

    grid = LocalGrid({11: at_training("a", react)})
    link = GridTransport(grid, lambda: 1, 5.0, 5.0, round_keys=lambda: b"signed")
    link.devices()
    list(link.exchange_letters({"a": b"letter"}))
    list(link.exchange({"a": b"task"}))
    assert carried == [(LETTER, None), (TRAIN, b"signed")]
    assert ROUND_KEYS not in grid.sent[0].content[RECORD]
