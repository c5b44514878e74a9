"""How dense layers become mixtures of experts: what is chosen before any weight is read."""

from dataclasses import dataclass
from enum import StrEnum

from proxymoe.common.errors import ConfigError


class ExpertKind(StrEnum):
    """What an expert is made of."""

    COPY = "copy"
    """The whole dense MLP."""
    SPLIT = "split"
    """A part of its neurons."""


class RouterInit(StrEnum):
    """Where a router's rows come from."""

    RANDOM = "random"
    CHEAP_EMBED = "cheap_embed"
    HIDDEN = "hidden"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How dense layers become mixtures; always a possible one.

    Raises:
        ConfigError: top-k above the number of experts, or a number out of range.
    """

    num_experts: int = 16
    top_k: int = 4
    expert: ExpertKind = ExpertKind.SPLIT
    router: RouterInit = RouterInit.HIDDEN
    shared_fraction: float = 1 / 3
    """Share of the neurons that every token uses; `split` only."""
    noise: float = 0.0
    """Of `copy`: noise on each expert's weights, in standard deviations of the weights."""
    heal: bool = True
    """Whether `split` is followed by the two regressions."""
    ridge: float = 0.01
    """Strength of both, in units of the mean square of a feature."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts or self.num_experts < 2:
            raise ConfigError(
                f"{self.num_experts} experts with top_k {self.top_k}: needed are at least two "
                "experts, and top_k of at least 1 and at most as many"
            )
        if not 0 <= self.shared_fraction < 1:
            raise ConfigError(f"shared_fraction {self.shared_fraction}: choose from 0 to below 1")
        if self.noise < 0 or self.ridge <= 0:
            raise ConfigError(f"noise {self.noise}, ridge {self.ridge}: noise >= 0, ridge > 0")

    def num_shared(self, neurons: int) -> int:
        """S: at least the wanted share of `neurons`, such that E divides the rest.

        Raises:
            ConfigError: nothing would be left for the experts.
        """
        if self.expert is ExpertKind.COPY:
            return 0
        if not self.shared_fraction and neurons % self.num_experts:
            raise ConfigError(
                f"{neurons} neurons cannot be split evenly into {self.num_experts} experts; choose "
                "a divisor, or a shared part, which takes what is left over"
            )
        each = int(neurons * (1 - self.shared_fraction) + 1e-6) // self.num_experts
        if not each:
            raise ConfigError(
                f"{neurons} neurons are too few for {self.num_experts} experts beside a shared "
                f"part of {self.shared_fraction:.0%}; choose fewer experts or a smaller part"
            )
        return neurons - each * self.num_experts
