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

LENGTH_STEP = 8
"""Batches are padded to a multiple of this many tokens: few shapes, few compiled kernels."""
TARGET_STEP = 32
"""Predicted positions of a batch are padded to a multiple of this."""
POOL = 8
"""Batches whose examples are sorted by length together."""
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
    """B examples padded on the right to L tokens, with N predicted positions."""

    tokens: Tensor
    """(B, L) int64."""
    valid: Tensor
    """(B, L) bool, False for padding."""
    where: Tensor
    """(N,) positions in the flattened (B·L) whose next token is predicted."""
    targets: Tensor
    """(N,) the tokens to predict, `IGNORED` where padded."""


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
    """One batch of the examples, padded to rounded shapes."""
    length = _round_up(max(len(example.tokens) for example in examples), LENGTH_STEP)
    tokens = torch.zeros(len(examples), length, dtype=torch.long)
    valid = torch.zeros(len(examples), length, dtype=torch.bool)
    where: list[int] = []
    targets: list[int] = []
    for row, example in enumerate(examples):
        count = len(example.tokens)
        tokens[row, :count] = torch.tensor(example.tokens)
        valid[row, :count] = True
        where += range(row * length + example.start - 1, row * length + count - 1)
        targets += example.tokens[example.start :]
    padding = _round_up(len(targets), TARGET_STEP) - len(targets)
    return Batch(
        tokens,
        valid,
        torch.tensor(where + [0] * padding),
        torch.tensor(targets + [IGNORED] * padding),
    )


def shuffled_batches(
    examples: Sequence[Example], batch_size: int, num_batches: int, rng: np.random.Generator
) -> list[Batch]:
    """`num_batches` random batches of exactly `batch_size` examples.

    Neighbours in length share a batch, out of windows of POOL batches, which saves padding. Windows
    are dealt from one permutation of all examples after another; of the last window the batches
    are a random choice. A data set smaller than a batch is repeated within it, so shapes never
    change.
    """
    num_windows = -(-num_batches // POOL)
    order: list[int] = []
    while len(order) < num_windows * POOL * batch_size:
        order += rng.permutation(len(examples)).tolist()
    batches: list[Batch] = []
    for start in range(0, num_windows * POOL, POOL):
        window = order[start * batch_size : (start + POOL) * batch_size]
        window.sort(key=lambda i: len(examples[i].tokens))
        for at in rng.permutation(POOL)[: num_batches - len(batches)]:
            chunk = window[at * batch_size : (at + 1) * batch_size]
            batches.append(collate([examples[i] for i in chunk]))
    return batches


def sequential_batches(examples: Sequence[Example], batch_size: int) -> list[Batch]:
    """All examples once, in batches of similar length."""
    order = sorted(examples, key=lambda example: len(example.tokens))
    return [collate(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]


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
