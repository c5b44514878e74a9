"""What every token of a batch sees: its own example, as far as the model's token mixers look.

Attention takes a mask, so examples can share a row. Layers that carry a state from token to token
(convolutions, linear attention, state spaces) take none and would carry it into the next example:
a model that has any gets one example per row.

Shapes: B rows, L tokens.
"""

from typing import Any

import torch
from torch import Tensor

from proxymoe.common.text import IGNORED, Batch, Example, packed

MASKED = {"full_attention", "sliding_attention"}
"""Kinds of layers, as configs call them, that look only where an attention mask lets them."""


def carries_state(model: Any) -> bool:
    """Whether some layer carries a state along the row, whatever the attention mask says."""
    return not _kinds(model) <= MASKED


def rows_for(model: Any, batch: Batch) -> Batch:
    """The batch as this model must see it; the same predictions in the same order."""
    if not carries_state(model) or int(batch.owners.max()) <= 1:
        return batch
    predicts = torch.zeros(batch.tokens.shape, dtype=torch.bool)
    predicts.view(-1)[batch.where[batch.targets != IGNORED]] = True
    rows = []
    for tokens, owners, marks in zip(batch.tokens, batch.owners, predicts, strict=True):
        for number in range(1, int(owners.max()) + 1):
            own = owners == number
            first = int(marks[own].nonzero()[0]) + 1
            rows.append([Example(tuple(tokens[own].tolist()), first)])
    return packed(rows, batch.tokens.shape[1])


def attention_masks(model: Any, whole: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
    """The mask as this model takes it: its sliding windows applied.

    Args:
        model: whose config knows of windows.
        whole: (B, 1, L, L) additive, without any window.
        positions: (B, L), of each token within its example.

    Returns:
        (B, 1, L, L), or one such mask by kind of layer where kinds see differently far.
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window is None or positions.shape[1] <= window:
        return whole
    near = positions[:, :, None] - positions[:, None, :] < window
    narrow = whole.masked_fill(~near[:, None], torch.finfo(whole.dtype).min)
    kinds = _kinds(model)
    if "sliding_attention" in kinds:
        return {"full_attention": whole, "sliding_attention": narrow}
    return whole if kinds else narrow


def _kinds(model: Any) -> set[str]:
    return set(getattr(model.config.get_text_config(), "layer_types", None) or ())
