"""Ranking answers in one tree equals scoring them one by one."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.common.errors import DataError
from proxymoe.common.text import Example
from proxymoe.simulations.ranking import AnswerTree, ranked_quality
from tests.tiny import some_tokens

CANDIDATES = [(5, 6, 7, 2), (5, 6, 2), (5, 9, 9, 9, 2), (8, 2), (2,), (5, 6, 7, 8, 2)]
PROMPTS = [tuple(some_tokens(1, length)[0].tolist()) for length in (3, 17, 40, 1)]
candidate_sets = st.lists(
    st.lists(st.integers(4, 7), max_size=4).map(lambda tokens: (*tokens, 2)),
    min_size=1,
    max_size=6,
    unique=True,
)


def by_hand(model, prompt, candidate):
    """Log-likelihood of one candidate, in a sequence of its own."""
    tokens = torch.tensor([prompt + candidate])
    log_probs = F.log_softmax(model(tokens, use_cache=False).logits[0].float(), dim=-1)
    steps = log_probs[len(prompt) - 1 : -1]
    return float(steps.gather(1, torch.tensor(candidate)[:, None]).sum())


def score(loaded, prompt, candidate, candidates):
    """The same from the tree: the loss, when this candidate is the right one."""
    found = ranked_quality(loaded, [Example(prompt + candidate, len(prompt))], candidates)
    return -found.loss * len(candidate)


def test_scores_equal_one_sequence_per_candidate(model):
    for prompt in PROMPTS[:2]:
        for candidate in CANDIDATES[1:5]:
            expected = by_hand(model.stock, prompt, candidate)
            found = score(model.full, prompt, candidate, CANDIDATES)
            assert found == pytest.approx(expected, abs=2e-4)


def test_accuracy_and_loss_are_those_of_the_best_candidates_by_hand(qwen):
    gold = [CANDIDATES[i] for i in (0, 3, 1, 4)]
    examples = [Example(p + c, len(p)) for p, c in zip(PROMPTS, gold, strict=True)]
    scores = [[by_hand(qwen.stock, p, c) for c in CANDIDATES] for p in PROMPTS]
    right = [CANDIDATES[row.index(max(row))] == c for row, c in zip(scores, gold, strict=True)]
    total = sum(row[CANDIDATES.index(c)] for row, c in zip(scores, gold, strict=True))
    found = ranked_quality(qwen.full, examples, CANDIDATES)
    assert found.accuracy == sum(right) / 4
    assert found.loss == pytest.approx(-total / sum(map(len, gold)), abs=1e-4)


def test_answers_of_one_token_need_no_tree(qwen):
    candidates = [(7,), (8,), (9,)]
    for candidate in candidates:
        expected = by_hand(qwen.stock, PROMPTS[0], candidate)
        found = score(qwen.full, PROMPTS[0], candidate, candidates)
        assert found == pytest.approx(expected, abs=1e-4)


def test_a_single_candidate_is_always_right(qwen):
    example = Example(PROMPTS[1] + CANDIDATES[0], len(PROMPTS[1]))
    assert ranked_quality(qwen.full, [example], CANDIDATES[:1]).accuracy == 1.0


def test_scores_do_not_depend_on_the_other_items_or_candidates(qwen):
    alone = score(qwen.full, PROMPTS[0], CANDIDATES[0], CANDIDATES[:1])
    among = score(qwen.full, PROMPTS[0], CANDIDATES[0], CANDIDATES[::-1])
    assert alone == pytest.approx(among, abs=1e-4)


def test_an_answer_that_is_no_candidate_is_refused(qwen):
    example = Example(PROMPTS[0] + (9, 9, 2), len(PROMPTS[0]))
    with pytest.raises(DataError, match="answer of 3 tokens is not among the 6 candidates"):
        ranked_quality(qwen.full, [example], CANDIDATES)


@given(candidate_sets)
def test_a_tree_spells_every_candidate_and_shares_every_prefix(candidates):
    tree = AnswerTree.of(candidates)
    token_at = [None, *tree.tokens]
    for candidate, path in zip(candidates, tree.paths, strict=True):
        assert tuple(token for _, token in path) == candidate
        assert [token_at[node] for node, _ in path[1:]] == list(candidate[:-1])
    prefixes = {candidate[:end] for candidate in candidates for end in range(1, len(candidate))}
    assert len(tree.tokens) == len(prefixes)


@given(candidate_sets)
def test_a_node_sees_itself_and_its_ancestors(candidates):
    tree = AnswerTree.of(candidates)
    sees = tree.ancestry()
    for node, (parent, depth) in enumerate(zip(tree.parents, tree.depths, strict=True)):
        assert sees[node, node]
        assert int(sees[node].sum()) == depth + 1
        if parent:
            assert torch.equal(
                sees[node].float() - sees[parent - 1].float(), torch.eye(len(sees))[node]
            )
