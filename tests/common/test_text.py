"""From JSONL rows to batches: what is refused, what is cut, and where the loss falls."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.errors import DataError
from proxymoe.common.text import (
    IGNORED,
    LENGTH_STEP,
    MIN_ROW,
    TARGET_STEP,
    Example,
    TooLong,
    collate,
    packed_batches,
    read_rows,
    shuffled_batches,
    tokenise,
)
from tests.laws import tried
from tests.tiny import BOS, EOS, tiny_tokenizer

ROW = {"prompt": "2+2=", "completion": "4"}
TOKENIZER = tiny_tokenizer()

words = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=60)
rows = st.fixed_dictionaries({"prompt": words | st.just(""), "completion": words.filter(str.strip)})
examples = st.lists(
    st.lists(st.integers(4, 98), min_size=2, max_size=40).flatmap(
        lambda tokens: st.integers(1, len(tokens) - 1).map(lambda at: Example(tuple(tokens), at))
    ),
    min_size=1,
    max_size=12,
)


def ids(text):
    return tuple(ord(character) - 28 for character in text)


def written(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def chat(role, content):
    """A line whose last message is this one."""
    first = {"role": "user", "content": "a"}
    return json.dumps({"messages": [first, {"role": role, "content": content}]})


few = tried(25)


def one(row, **limits):
    return tokenise([row], TOKENIZER, limits.pop("max_tokens", 100), **limits).examples[0]


@given(st.lists(rows, min_size=1, max_size=5))
def test_rows_survive_a_file(tmp_path_factory, content):
    path = written(tmp_path_factory.getbasetemp(), *map(json.dumps, content))
    assert read_rows(path) == content


def test_blank_lines_are_skipped_and_counted(tmp_path):
    path = written(tmp_path, "", json.dumps(ROW), "   ", json.dumps(ROW), "oops")
    with pytest.raises(DataError, match=r"rows\.jsonl:5: not JSON \(Expecting value at column 1"):
        read_rows(path)


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0c", "\u2029"])
def test_only_a_line_feed_ends_a_line(tmp_path, separator):
    row = {"prompt": f"one{separator}two", "completion": "three"}
    line = json.dumps(row, ensure_ascii=False)
    assert read_rows(written(tmp_path, line, line)) == [json.loads(line)] * 2


def test_windows_line_ends_are_fine(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\r\n".join([json.dumps(ROW).encode()] * 2))
    assert read_rows(path) == [ROW, ROW]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("NaN x", "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ("3", "expected a JSON object, got int"),
        ("{}", r"needs 'prompt' and 'completion'.*found keys \[\]"),
        ('{"prompt": "a"}', r"found keys \['prompt'\]"),
        ('{"prompt": "a", "completion": 4}', "as strings"),
        ('{"prompt": null, "completion": "a"}', "as strings"),
        ('{"prompt": "a", "completion": " "}', "'completion' is empty"),
        ('{"text": ""}', "'text' is empty"),
        ('{"text": ["a"]}', "as strings"),
        ('{"messages": []}', "non-empty list"),
        ('{"messages": "hello"}', "non-empty list"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "a question, an answer"),
        ('{"messages": [{"role": "user"}, {}]}', "every message needs 'role' and 'content'"),
        ('{"messages": ["hello", "you"]}', "every message needs"),
        (chat("user", 3), "as strings"),
        (chat(None, "a"), "as strings"),
        (chat("user", "a"), "last message must be the assistant"),
        (chat("assistant", " "), "is empty"),
    ],
)
def test_a_bad_row_is_refused_with_file_and_line(tmp_path, line, reason):
    path = written(tmp_path, json.dumps(ROW), line)
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{reason}"):
        read_rows(path)


def test_a_file_that_is_missing_empty_or_no_text_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot be read"):
        read_rows(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match=r"rows\.jsonl: no rows; give at least one"):
        read_rows(written(tmp_path, "", "  "))
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"rows\.jsonl: cannot be read as UTF-8"):
        read_rows(tmp_path / "rows.jsonl")


def test_refusals_tell_no_content(tmp_path):
    line = '{"prompt": "my secret", "completion": 4}'
    with pytest.raises(DataError) as refused:
        read_rows(written(tmp_path, line))
    assert "secret" not in str(refused.value)


def test_the_loss_falls_on_the_completion_and_its_end():
    example = one(ROW)
    assert example.tokens == (BOS, *ids("2+2="), *ids("4"), EOS)
    assert example.tokens[example.start :] == (*ids("4"), EOS)
    assert example.num_targets == 2


def test_the_loss_of_plain_text_falls_on_all_but_its_beginning():
    example = one({"text": "abc"})
    assert example.tokens == (BOS, *ids("abc"), EOS)
    assert example.start == 1


def test_the_loss_of_messages_falls_on_the_last_answer():
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "2+2?"), ("assistant", "4")]
    example = one({"messages": [{"role": role, "content": text} for role, text in turns]})
    prompt = "<user>hi|<assistant>yo|<user>2+2?|<assistant>"
    assert example.tokens == (*ids(prompt), *ids("4|"))
    assert example.start == len(prompt)


def test_a_prompt_that_a_template_leaves_empty_still_has_one_token():
    bare = tiny_tokenizer()
    bare.chat_template = "{% for m in messages[1:] %}{{ m['content'] }}{% endfor %}"
    row = {"messages": [{"role": r, "content": "hello"} for r in ("user", "assistant")]}
    assert tokenise([row], bare, 100).examples[0] == Example((BOS, *ids("hello")), 1)


def test_messages_without_a_chat_template_are_refused():
    row = {"messages": [{"role": "assistant", "content": "hello"}]}
    with pytest.raises(DataError, match="need a tokenizer with a chat template"):
        tokenise([row], tiny_tokenizer(chat=False), 100)


def test_a_template_that_rewrites_the_past_is_refused():
    forgetful = tiny_tokenizer()
    forgetful.chat_template = "{{ messages | length }}{% if add_generation_prompt %}?{% endif %}"
    row = {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]}
    with pytest.raises(DataError, match=r"row 1: the chat template changes earlier"):
        tokenise([row], forgetful, 100)


def test_a_template_that_refuses_a_row_is_told_with_its_number():
    strict = tiny_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    row = {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]}
    with pytest.raises(DataError, match=r"row 1: .*refuses it \(roles must alternate\)"):
        tokenise([row], strict, 100)


def test_a_tokenizer_without_begin_and_end_is_refused_by_name():
    nameless = tiny_tokenizer()
    nameless.bos_token = nameless.eos_token = None
    with pytest.raises(DataError, match="neither a begin nor an end token"):
        tokenise([ROW], nameless, 100)


def test_a_tokenizer_without_a_begin_token_begins_with_the_end_token():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    assert tokenise([ROW], tokenizer, 100).examples[0].tokens[0] == EOS


@given(rows, st.integers(8, 130))
def test_truncation_keeps_the_end_of_the_prompt_and_the_start_of_the_completion(row, limit):
    whole = one(row, max_tokens=10**6)
    result = tokenise([row], TOKENIZER, limit)
    cut = result.examples[0]
    assert len(cut.tokens) == min(limit, len(whole.tokens))
    assert result.num_truncated == (len(whole.tokens) > limit)
    prompt, completion = cut.tokens[: cut.start], cut.tokens[cut.start :]
    assert 1 <= cut.start < len(cut.tokens)
    assert whole.tokens[: whole.start][-len(prompt) :] == prompt
    assert whole.tokens[whole.start :][: len(completion)] == completion
    if len(completion) < whole.num_targets:
        assert len(prompt) == 1


def test_rows_that_are_too_long_are_dropped_and_counted():
    long = {"prompt": "x" * 50, "completion": "y"}
    result = tokenise([ROW, long, ROW], TOKENIZER, 20, TooLong.DROP)
    assert (len(result.examples), result.num_dropped, result.num_truncated) == (2, 1, 0)
    with pytest.raises(DataError, match="none of 2 rows fits into 20 tokens"):
        tokenise([long, long], TOKENIZER, 20, TooLong.DROP)


def test_rows_that_are_too_long_are_refused_with_number_and_remedy():
    long = {"prompt": "x" * 50, "completion": "y"}
    with pytest.raises(DataError, match=r"row 2 has 53 tokens, the limit is 20; raise max_tokens"):
        tokenise([ROW, long], TOKENIZER, 20, TooLong.REFUSE)


def members(batch):
    """The tokens of every example in a batch, row by row."""
    return [
        tuple(batch.tokens[row, batch.owners[row] == number].tolist())
        for row in range(len(batch.tokens))
        for number in range(1, int(batch.owners[row].max()) + 1)
    ]


@few
@given(examples)
def test_a_batch_predicts_every_completion_token_from_the_one_before(content):
    batch = collate(content)
    real = batch.targets != IGNORED
    assert batch.where.shape == batch.targets.shape
    assert len(batch.targets) % TARGET_STEP == 0
    assert int(real.sum()) == sum(example.num_targets for example in content)
    if 2 * batch.where.numel() <= batch.tokens.numel():
        assert len(set(batch.where.tolist())) == batch.where.numel()
    where = batch.where[real]
    assert torch.equal(batch.tokens.view(-1)[where + 1], batch.targets[real])
    assert torch.equal(batch.owners.view(-1)[where + 1], batch.owners.view(-1)[where])
    expected = sorted(token for example in content for token in example.tokens[example.start :])
    assert sorted(batch.targets[real].tolist()) == expected


@few
@given(examples)
def test_a_batch_holds_every_example_once_in_rows_of_rounded_length(content):
    batch = collate(content)
    assert sorted(members(batch)) == sorted(example.tokens for example in content)
    assert int(batch.valid.sum()) == sum(len(example.tokens) for example in content)
    length = batch.tokens.shape[1]
    assert length >= MIN_ROW
    assert length % LENGTH_STEP == 0
    # First fit: no two rows could have shared one.
    filled = sorted(batch.valid.sum(1).tolist())
    assert len(filled) == 1 or filled[0] + filled[1] > length


@few
@given(examples)
def test_a_token_sees_its_own_example_up_to_itself(content):
    batch = collate(content)
    sees = batch.attention_mask(torch.float32)[:, 0] == 0
    for row in range(len(batch.tokens)):
        for number in range(1, int(batch.owners[row].max()) + 1):
            (own,) = (batch.owners[row] == number).nonzero(as_tuple=True)
            assert batch.positions[row, own].tolist() == list(range(len(own)))
            assert torch.equal(sees[row, own][:, own], torch.ones(len(own), len(own)).tril().bool())
            assert int(sees[row, own].sum()) == len(own) * (len(own) + 1) // 2
    assert sees.any(-1).all()


@few
@given(examples, st.integers(1, 5), st.integers(1, 20), st.integers(0, 99))
def test_shuffled_batches_are_of_fixed_size_and_use_examples_equally_often(
    content, size, count, seed
):
    content = [Example((number, *e.tokens), e.start) for number, e in enumerate(content)]
    batches = shuffled_batches(content, size, count, np.random.default_rng(seed))
    assert len(batches) == count
    assert all(len(members(batch)) == size for batch in batches)
    drawn = [tokens[0] for batch in batches for tokens in members(batch)]
    used = np.bincount(drawn, minlength=len(content))
    assert used.max() - used.min() <= 1
    again = shuffled_batches(content, size, count, np.random.default_rng(seed))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(batches, again, strict=True))


def test_another_seed_gives_another_order():
    content = [Example((number, 5), 1) for number in range(30)]
    first, second = (
        [members(b) for b in shuffled_batches(content, 4, 5, np.random.default_rng(seed))]
        for seed in (0, 1)
    )
    assert first != second


def test_one_example_fills_a_batch():
    batches = shuffled_batches([one(ROW)], 4, 3, np.random.default_rng(0))
    assert [members(batch) for batch in batches] == [[one(ROW).tokens] * 4] * 3


@few
@given(examples, st.integers(1, 300))
def test_packed_batches_hold_every_example_once_in_one_shape(content, max_tokens):
    batches = packed_batches(content, max_tokens)
    found = [tokens for batch in batches for tokens in members(batch)]
    assert sorted(found) == sorted(example.tokens for example in content)
    assert all(b.tokens.shape[0] == 1 or b.tokens.numel() <= max_tokens for b in batches)
    assert len({batch.tokens.shape for batch in batches[:-1]}) <= 1
    assert len({batch.tokens.shape[1] for batch in batches}) == 1
