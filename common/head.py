"""The output head of a language model: logits from final hidden states, and the way back.

Shapes: N positions, D hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from proxymoe.common.errors import UnsupportedModel

UNSUPPORTED = ("logit_scale", "final_logit_softcapping")
"""Settings of heads that compute something else."""


@dataclass(frozen=True, slots=True)
class Head:
    """Logits are (W h + b) / d."""

    weight: Tensor
    """(V, D)."""
    bias: Tensor | None
    divisor: float

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) in fp32 of (..., D)."""
        found = F.linear(hidden, self.weight, self.bias)
        return (found if self.divisor == 1.0 else found / self.divisor).float()

    def gradient(self, slope: Tensor) -> Tensor:
        """(N, D) of the slope (N, V) of the logits, in the type of the weight."""
        found = slope.to(self.weight.dtype) @ self.weight
        return found if self.divisor == 1.0 else found / self.divisor


def output_head(model: Any) -> Head:
    """The head of this model, real or on meta.

    Raises:
        UnsupportedModel: it has none, or one that computes something else.
    """
    config, module = model.config.get_text_config(), model.get_output_embeddings()
    settings = {name: getattr(config, name, None) for name in UNSUPPORTED}
    extras = [f"{name}={value}" for name, value in settings.items() if value not in (None, 1.0)]
    divisor = getattr(config, "logits_scaling", None) or 1.0
    if divisor != 1.0 and not hasattr(model, "logits_scaling"):
        extras.append(f"logits_scaling={divisor} that its code does not use")
    if module is None or extras:
        raise UnsupportedModel(
            f"{type(model).__name__}: supported is a linear output head, found an output head with "
            f"{', '.join(extras) or 'no weight'}"
        )
    return Head(module.weight, getattr(module, "bias", None), float(divisor))
