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
    settings: FederationSettings,
    rate: float = 1.0,
) -> tuple[StrategyState, Tensor]:
    """The next state and the next adapter (P,); `rate` scales the server's learning rate.

    Blocks that nobody held have a zero mean update; with momentum they coast, without they rest.
    """
    learning_rate = rate * settings.server_learning_rate
    momentum = settings.momentum * state.momentum + (1.0 - settings.momentum) * mean_update
    if settings.strategy == "fedavg":
        step = learning_rate * momentum
        return StrategyState(momentum, state.variance), adapter + step
    variance = settings.beta2 * state.variance + (1.0 - settings.beta2) * mean_update.square()
    step = learning_rate * momentum / (variance.sqrt() + settings.epsilon)
    return StrategyState(momentum, variance), adapter + step
