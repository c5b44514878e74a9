"""Accuracy among given answers: rank every candidate completion by its log-likelihood.

All candidates of an item share one forward pass: their tokens form a tree behind the prompt, and
an attention mask lets each node see the prompt and its ancestors only. That is exact, and several
times cheaper than one sequence per candidate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from proxymoe.common.context import attention_masks, carries_state
from proxymoe.common.errors import DataError, UnsupportedModel
from proxymoe.common.experts import only_valid_tokens
from proxymoe.common.head import output_head
from proxymoe.common.loss import Quality
from proxymoe.common.model import LoadedModel
from proxymoe.common.text import TOKENS_PER_BATCH, Example

LENGTH_STEP = 16


@dataclass(frozen=True, slots=True)
class AnswerTree:
    """The candidates' tokens as a tree; node 0 stands for the prompt's last token."""

    tokens: list[int]
    """Token of every node but 0."""
    parents: list[int]
    """Node that precedes node i + 1."""
    depths: list[int]
    """Tokens between the prompt's end and node i + 1."""
    paths: list[list[tuple[int, int]]]
    """Per candidate: (node that predicts, token predicted), for every token and the end."""

    @classmethod
    def of(cls, candidates: Sequence[tuple[int, ...]]) -> "AnswerTree":
        """The tree of the candidates' tokens, end token included in each."""
        tokens: list[int] = []
        parents: list[int] = []
        depths: list[int] = []
        children: dict[tuple[int, int], int] = {}
        paths = []
        for candidate in candidates:
            node, path = 0, []
            for depth, token in enumerate(candidate):
                path.append((node, token))
                if depth == len(candidate) - 1:
                    break
                if (node, token) not in children:
                    tokens.append(token)
                    parents.append(node)
                    depths.append(depth)
                    children[node, token] = len(tokens)
                node = children[node, token]
            paths.append(path)
        return cls(tokens, parents, depths, paths)

    def ancestry(self) -> Tensor:
        """(M, M) bool: whether node i + 1 may look at node j + 1."""
        size = len(self.tokens)
        sees = torch.eye(size, dtype=torch.bool)
        for i, parent in enumerate(self.parents):
            if parent:
                sees[i] |= sees[parent - 1]
        return sees


@torch.no_grad()
def ranked_quality(
    loaded: LoadedModel, examples: Sequence[Example], candidates: Sequence[tuple[int, ...]]
) -> Quality:
    """Accuracy of ranking, and mean loss of the right completion in nats per token.

    Args:
        loaded: the model; an adapter attached to it is in effect.
        examples: prompts with the right completion, which must be among the candidates.
        candidates: token sequences with their end token.

    Raises:
        DataError: a right completion is no candidate.
        UnsupportedModel: layers carry a state along the row, past what a mask hides.
    """
    if carries_state(loaded.model):
        raise UnsupportedModel(
            f"{type(loaded.model).__name__}: answers are ranked as a tree in one row, and layers "
            "that carry a state along the row cannot branch; use data without given answers"
        )
    tree = AnswerTree.of(candidates)
    gold_of = {candidate: i for i, candidate in enumerate(candidates)}
    for example in examples:
        if example.tokens[example.start :] not in gold_of:
            raise DataError(
                f"an answer of {example.num_targets} tokens is not among the {len(candidates)} "
                "candidates; every test answer must occur in the training rows, and max_tokens "
                "must not cut it"
            )
    right, loss, num_tokens = 0, 0.0, 0
    # One width for all batches: few shapes, few compiled kernels.
    width = _round_up(max(example.start for example in examples))
    size = max(1, TOKENS_PER_BATCH // _round_up(width + len(tree.tokens)))
    for start in range(0, len(examples), size):
        batch = examples[start : start + size]
        prompts = [example.tokens[: example.start] for example in batch]
        scores = _scores(loaded, prompts, width, tree)
        gold = torch.tensor([gold_of[example.tokens[example.start :]] for example in batch])
        right += int((scores.argmax(1) == gold).sum())
        loss -= float(scores.gather(1, gold[:, None]).sum())
        num_tokens += sum(example.num_targets for example in batch)
    return Quality(loss / num_tokens, right / len(examples))


def _scores(
    loaded: LoadedModel, prompts: list[tuple[int, ...]], width: int, tree: AnswerTree
) -> Tensor:
    """(B, candidates) total log-likelihoods; prompts are at most `width` tokens long."""
    count, num_nodes = len(prompts), len(tree.tokens)
    length = _round_up(width + num_nodes)
    tokens = torch.zeros(count, length, dtype=torch.long)
    positions = torch.zeros(count, length, dtype=torch.long)
    valid = torch.zeros(count, length, dtype=torch.bool)
    sees = torch.zeros(count, length, length, dtype=torch.bool)
    nodes = slice(width, width + num_nodes)
    tokens[:, nodes] = torch.tensor(tree.tokens)
    valid[:, nodes] = True
    sees[:, nodes, nodes] = tree.ancestry()
    sees |= torch.eye(length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        end = len(prompt)
        tokens[row, :end] = torch.tensor(prompt)
        positions[row, :end] = torch.arange(end)
        positions[row, nodes] = end + torch.tensor(tree.depths)
        valid[row, :end] = True
        sees[row, :end, :end] = torch.ones(end, end, dtype=torch.bool).tril()
        sees[row, nodes, :end] = True
    model = loaded.model
    dtype = next(model.parameters()).dtype
    mask = torch.zeros(count, 1, length, length, dtype=dtype)
    mask.masked_fill_(~sees[:, None], torch.finfo(dtype).min)
    with only_valid_tokens(valid):
        hidden = model.base_model(
            input_ids=tokens,
            attention_mask=attention_masks(model, mask, positions),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
    ends = torch.tensor([len(prompt) - 1 for prompt in prompts])
    last = hidden[torch.arange(count), ends][:, None]
    states = torch.cat([last, hidden[:, nodes]], dim=1)
    log_probs = F.log_softmax(output_head(model).logits(states), dim=-1)
    steps = [(c, node, token) for c, path in enumerate(tree.paths) for node, token in path]
    owner, node, token = (torch.tensor(column) for column in zip(*steps, strict=True))
    picked = log_probs[:, node, token]
    return picked.new_zeros(count, len(tree.paths)).index_add(1, owner, picked)


def _round_up(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP
