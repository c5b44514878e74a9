"""Server optimisers on the mean update: a strategy is `init` and `apply`, and state is a value.

FedAvg with a server learning rate and momentum (FedAvgM), and FedAdam: Reddi et al., Adaptive
Federated Optimization, arXiv 2003.00295, algorithm 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from proxymoe.common.config import FederationSettings


@dataclass(frozen=True, slots=True)
class StrategyState:
    """What the strategy remembers between rounds; all (P,) fp32."""

    momentum: Tensor
    variance: Tensor


def init(size: int) -> StrategyState:
    """The state before the first round of an adapter of P = `size` parameters."""
    return StrategyState(torch.zeros(size), torch.zeros(size))


def apply(
    state: StrategyState,
    adapter: Tensor,
    mean_update: Tensor,
    held: Tensor,
    settings: FederationSettings,
    rate: float = 1.0,
) -> tuple[StrategyState, Tensor]:
    """The next state and the next adapter (P,); `rate` scales the server's learning rate.

    What nobody held this round rests, and so does what is remembered of it (as in sparse Adam): a
    rare expert would otherwise coast for ten rounds on what one device once said.

    Args:
        state: before the round.
        adapter: (P,) before the round.
        mean_update: (P,) per block the mean over its holders.
        held: (P,) bool, False in blocks that nobody held.
        settings: of the federation.
        rate: of this round.
    """
    learning_rate = rate * settings.server_learning_rate
    momentum = settings.momentum * state.momentum + (1.0 - settings.momentum) * mean_update
    if settings.strategy == "fedavg":
        variance, step = state.variance, learning_rate * momentum
    else:
        variance = settings.beta2 * state.variance + (1.0 - settings.beta2) * mean_update.square()
        step = learning_rate * momentum / (variance.sqrt() + settings.epsilon)
    if not bool(held.all()):
        momentum = torch.where(held, momentum, state.momentum)
        variance = torch.where(held, variance, state.variance)
        step = step * held
    return StrategyState(momentum, variance), adapter + step
