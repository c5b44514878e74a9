"""Private or public text, from JSONL rows to batches of fixed shapes.

A row is {"prompt", "completion"}, or {"messages": [...]} for the tokenizer's chat template, or
{"text"}. Loss falls on the completion only (on everything but the first token of plain text).
Nothing in this file may be logged but counts.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from proxymoe.common.errors import DataError

LENGTH_STEP = 16
"""Rows are a multiple of this many tokens long: few shapes, few compiled kernels."""
MIN_ROW = 128
"""Tokens of the shortest row; short examples share it, with little padding whatever they are."""
TARGET_STEP = 32
"""Predicted positions of a batch are padded to a multiple of this."""
TOKENS_PER_BATCH = 1024
"""Of text that is only read; larger batches are no faster on a CPU and take more memory."""
IGNORED = -100
"""Target of a padded position."""


class TooLong(StrEnum):
    """What happens to a row with more tokens than the context."""

    TRUNCATE = "truncate"
    """The prompt loses its beginning first, then the completion its end."""
    DROP = "drop"
    """The row is left out and counted."""
    REFUSE = "refuse"
    """DataError."""


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised row; the loss falls on tokens from `start` on."""

    tokens: tuple[int, ...]
    start: int
    """Index of the first predicted token, at least 1."""

    @property
    def num_targets(self) -> int:
        """Tokens that the loss falls on."""
        return len(self.tokens) - self.start


@dataclass(frozen=True, slots=True)
class Examples:
    """A tokenised data set, and what became of rows that were too long."""

    examples: tuple[Example, ...]
    num_truncated: int = 0
    num_dropped: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples packed into B rows of L tokens, with N predicted positions."""

    tokens: Tensor
    """(B, L) int64."""
    positions: Tensor
    """(B, L) int64, position of each token within its example."""
    owners: Tensor
    """(B, L) int64, number of the example within its row, from 1; 0 for padding."""
    where: Tensor
    """(N,) positions in the flattened (B·L) whose next token is predicted."""
    targets: Tensor
    """(N,) the tokens to predict, `IGNORED` where padded."""

    @property
    def valid(self) -> Tensor:
        """(B, L) bool, False for padding."""
        return self.owners > 0

    def attention_mask(self, dtype: torch.dtype) -> Tensor:
        """(B, 1, L, L) additive: a token sees its own example up to itself."""
        same = self.owners[:, :, None] == self.owners[:, None, :]
        mask = torch.zeros(same.shape, dtype=dtype)
        mask.masked_fill_(~same.tril_(), torch.finfo(dtype).min)
        return mask[:, None]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSONL file; blank lines are skipped.

    Raises:
        DataError: the file is missing or empty, or a line is no JSON object with known keys; the
            message names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other line breaks
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows.append(_checked_row(line, f"{path}:{number}"))
    if not rows:
        raise DataError(f"{path}: no rows; give at least one JSON object per line")
    return rows


def tokenise(
    rows: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    too_long: TooLong = TooLong.TRUNCATE,
) -> Examples:
    """The rows as examples of at most `max_tokens` tokens, in order.

    Raises:
        DataError: a row is too long and `too_long` is REFUSE, or no row is left.
    """
    examples, num_truncated, num_dropped = [], 0, 0
    for number, row in enumerate(rows, start=1):
        prompt, completion = _tokens_of(row, tokenizer, f"row {number}")
        excess = len(prompt) + len(completion) - max_tokens
        if excess > 0:
            if too_long is TooLong.REFUSE:
                raise DataError(
                    f"row {number} has {max_tokens + excess} tokens, the limit is {max_tokens}; "
                    "raise max_tokens, or set too_long to 'truncate' or 'drop'"
                )
            if too_long is TooLong.DROP:
                num_dropped += 1
                continue
            num_truncated += 1
            prompt = prompt[min(excess, len(prompt) - 1) :]
            completion = completion[: max_tokens - len(prompt)]
        examples.append(Example((*prompt, *completion), len(prompt)))
    if not examples:
        raise DataError(f"none of {len(rows)} rows fits into {max_tokens} tokens")
    return Examples(tuple(examples), num_truncated, num_dropped)


def collate(examples: Sequence[Example]) -> Batch:
    """One batch of the examples, several to a row, in rounded shapes.

    Rows are as long as the longest example or MIN_ROW; examples go, longest first, into the first
    row with room. Packing wastes few tokens whatever the lengths, so batches can be random.
    """
    return packed(*_first_fit(examples))


def shuffled_batches(
    examples: Sequence[Example], batch_size: int, num_batches: int, rng: np.random.Generator
) -> list[Batch]:
    """`num_batches` random batches of exactly `batch_size` examples.

    They are dealt from one permutation of all examples after another, so every example is used
    equally often up to one; a data set smaller than a batch is repeated within it.
    """
    order: list[int] = []
    while len(order) < batch_size * num_batches:
        order += rng.permutation(len(examples)).tolist()
    chunks = (order[i * batch_size : (i + 1) * batch_size] for i in range(num_batches))
    return [collate([examples[i] for i in chunk]) for chunk in chunks]


def packed_batches(examples: Sequence[Example], max_tokens: int = TOKENS_PER_BATCH) -> list[Batch]:
    """All examples once, longest first, in batches of one shape (the last may have fewer rows).

    A batch has at most `max_tokens` tokens, or one row.
    """
    rows, length = _first_fit(examples)
    count = max(1, max_tokens // length)
    return [packed(rows[i : i + count], length) for i in range(0, len(rows), count)]


def _first_fit(examples: Sequence[Example]) -> tuple[list[list[Example]], int]:
    """The examples of each row, and the rows' length."""
    longest = max(len(example.tokens) for example in examples)
    length = max(MIN_ROW, _round_up(longest, LENGTH_STEP))
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda example: -len(example.tokens)):
        size = len(example.tokens)
        at = next((i for i, free in enumerate(room) if free >= size), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(length)
        rows[at].append(example)
        room[at] -= size
    return rows, length


def packed(rows: list[list[Example]], length: int) -> Batch:
    """The batch with these examples in each row of `length` tokens."""
    tokens, positions, owners = torch.zeros(3, len(rows), length, dtype=torch.long).unbind()
    where: list[int] = []
    targets: list[int] = []
    for row, members in enumerate(rows):
        first = 0
        for number, example in enumerate(members, start=1):
            end = first + len(example.tokens)
            tokens[row, first:end] = torch.tensor(example.tokens)
            positions[row, first:end] = torch.arange(end - first)
            owners[row, first:end] = number
            at = row * length + first
            where += range(at + example.start - 1, at + len(example.tokens) - 1)
            targets += example.tokens[example.start :]
            first = end
    padding = _round_up(len(targets), TARGET_STEP) - len(targets)
    # Positions that predict nothing, so that none occurs twice; zero where they run out.
    silent = [*set(range(len(rows) * length)).difference(where), *[0] * padding]
    return Batch(
        tokens,
        positions,
        owners,
        torch.tensor(where + silent[:padding]),
        torch.tensor(targets + [IGNORED] * padding),
    )


def _checked_row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected a JSON object, got {type(row).__name__}")
    if "messages" in row:
        _check_messages(row["messages"], place)
        return row
    keys = ("text",) if "text" in row else ("prompt", "completion")
    for key in keys:
        if not isinstance(row.get(key), str):
            raise DataError(
                f"{place}: needs 'prompt' and 'completion', 'messages', or 'text' as strings; "
                f"found keys {sorted(map(str, row))}"
            )
    if not row[keys[-1]].strip():
        raise DataError(f"{place}: '{keys[-1]}' is empty")
    return row


def _check_messages(messages: Any, place: str) -> None:
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(f"{place}: 'messages' must be a non-empty list: a question, an answer")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise DataError(f"{place}: every message needs 'role' and 'content'")
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            raise DataError(f"{place}: every message needs 'role' and 'content' as strings")
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{place}: the last message must be the assistant's, it is the target")
    if not messages[-1]["content"].strip():
        raise DataError(f"{place}: the last message is empty")


def _tokens_of(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, place: str
) -> tuple[list[int], list[int]]:
    """(prompt tokens, at least one; completion tokens with the end token)."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else end
    if not begin:
        raise DataError("the tokenizer has neither a begin nor an end token; give it one")
    if "messages" in row:
        asked, answer = _conversation(row["messages"], tokenizer, place)
        return encode(asked) or begin, encode(answer)
    if "text" in row:
        return begin, encode(row["text"]) + end
    return [*begin, *encode(row["prompt"])], encode(row["completion"]) + end


def _conversation(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, place: str
) -> tuple[str, str]:
    """(everything up to the last answer, the last answer) as the chat template writes them."""
    if tokenizer.chat_template is None:
        raise DataError("rows with 'messages' need a tokenizer with a chat template")
    try:
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
        asked = str(
            tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        )
    except TemplateError as error:
        raise DataError(f"{place}: the chat template refuses it ({error})") from error
    if not whole.startswith(asked) or whole == asked:
        raise DataError(
            f"{place}: the chat template changes earlier messages when an answer follows; "
            "use 'prompt' and 'completion'"
        )
    return asked, whole[len(asked) :]


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step
