"""The profile of a base model: what every expert does on public text of several domains.

For each domain, layer and expert the profile keeps sums over the tokens routed to that expert;
with gate g and expert output f these are the count, Σg, Σg², Σ‖gf‖, Σ‖gf‖², Σ‖f‖ and Σg²f. Sums
are linear, so statistics of any domain mixture follow without touching the model again. Public
text only: nothing here ever sees private data.

Energies of different layers do not compare as they are: every layer reads the residual stream
through a norm, and the stream grows with depth, up to a thousandfold. What is lost in a layer
disturbs the layers after it by its share of the stream h that leaves the layer. So the profile
keeps Σ1/‖h‖² too; a mean of ‖h‖² itself would be that of the few tokens whose norm is huge.

Shapes: E experts, D hidden size.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from proxymoe.common.allocation import Scores
from proxymoe.common.errors import CheckpointError, ConfigError, DataError, PlanError
from proxymoe.common.experts import expert_state, valid_tokens
from proxymoe.common.model import LoadedModel
from proxymoe.common.moe import MoELayer, moe_layers
from proxymoe.common.text import Example, packed_batches
from proxymoe.server.reading import Reader, read_whole
from proxymoe.server.relations import LayerRelations, load_relations, mixed
from proxymoe.server.sums import load_sums, save_sums, weighted_sum

FEWEST_PICKS, ENOUGH_PICKS = 32, 128
"""How often an expert must be picked on average, and should be. On the shipped model, a plan for a
quarter or an eighth of the experts keeps, of the energy that the best plan keeps on other text of
the domain, 92 to 95 % with 32 picks, 98 to 99 % with 128, and hardly more with 512
(`python -m proxymoe.simulations.bench_calibration`)."""


@dataclass(frozen=True, slots=True)
class ExpertStatistics:
    """Sums over the tokens routed to each expert of one layer; per token after `Profile.mix`."""

    count: Tensor
    """(E,) tokens routed to the expert."""
    gate: Tensor
    """(E,) Σ g."""
    gate_squared: Tensor
    """(E,) Σ g²."""
    norm: Tensor
    """(E,) Σ ‖g f‖."""
    energy: Tensor
    """(E,) Σ ‖g f‖²."""
    magnitude: Tensor
    """(E,) Σ ‖f‖."""
    output: Tensor
    """(E, D) Σ g² f."""
    stream: Tensor
    """(1,) Σ 1/‖h‖² over all tokens; h is the residual stream that leaves the decoder layer."""

    @classmethod
    def zeros(cls, num_experts: int, hidden_size: int) -> Self:
        """The statistics of no tokens."""
        shapes = [(num_experts,)] * 6 + [(num_experts, hidden_size), (1,)]
        return cls(*(torch.zeros(shape) for shape in shapes))

    def mean_output(self) -> Tensor:
        """(E, D) the constant that best replaces each expert: Σg²f / Σg², zero if never routed."""
        return self.output / self.gate_squared.clamp_min(torch.finfo(torch.float32).tiny)[:, None]

    def residual_energy(self) -> Tensor:
        """(E,) energy that is lost when the expert is replaced by its mean output."""
        explained = (self.output * self.mean_output()).sum(-1)
        return (self.energy - explained).clamp_min(0.0)


COLUMNS = tuple(field.name for field in fields(ExpertStatistics))
"""Names of the statistics; a profile on disk that has others is of another version."""


@dataclass(frozen=True)
class Profile:
    """Statistics of one base model by domain and decoder layer, with the tokens behind them."""

    base: str
    domains: dict[str, dict[int, ExpertStatistics]]
    num_tokens: dict[str, int]
    relations: Mapping[str, tuple[LayerRelations, int]] = field(default_factory=dict)
    """{domain: how its experts relate, tokens behind that}, where they were made."""
    _last: dict[tuple[tuple[str, float], ...], dict[int, ExpertStatistics]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """The mixture asked for last: a search for the plan that fits asks for it again and again."""

    @cached_property
    def sensitivity(self) -> dict[int, float]:
        """E[1/‖h‖²] by decoder layer, over all domains alike: what makes energies comparable.

        It is the model's, not the mixture's, so that energies times it stay linear in the mixture.
        """
        found = self.mix(self.uniform())
        return {at: float(stats.stream) for at, stats in found.items()}

    def mix(self, mixture: dict[str, float]) -> dict[int, ExpertStatistics]:
        """Expected statistics per token of a domain mixture, by decoder layer.

        Raises:
            ConfigError: an unknown domain, or weights that are negative or all zero.
        """
        if unknown := sorted(set(mixture) - set(self.domains)):
            raise ConfigError(
                f"domains {unknown} are not in the profile; known: {sorted(self.domains)}"
            )
        total = sum(mixture.values())
        if min(mixture.values(), default=0.0) < 0 or total <= 0:
            raise ConfigError(f"domain mixture {mixture} needs weights >= 0, some above 0")
        scale = {name: w / total / self.num_tokens[name] for name, w in mixture.items()}
        key = tuple(mixture.items())
        if (known := self._last.get(key)) is not None:
            return known
        found = {
            at: weighted_sum([(scale[name], self.domains[name][at]) for name in mixture])
            for at in next(iter(self.domains.values()))
        }
        self._last.clear()
        self._last[key] = found
        return found

    def relative_energy(self, mixture: dict[str, float]) -> Scores:
        """What text of this mixture loses with every expert, as shares of the residual stream.

        Linear in the mixture, and the measure of all coverage, whatever plans are chosen by.
        """
        mixed = self.mix(mixture)
        return {at: k * mixed[at].energy.double().numpy() for at, k in self.sensitivity.items()}

    def mix_relations(self, mixture: dict[str, float]) -> LayerRelations:
        """Expected relations per token of a domain mixture, by decoder layer.

        Raises:
            PlanError: they were not made for one of its domains.
        """
        if missing := sorted(name for name in mixture if name not in self.relations):
            raise PlanError(f"no relations of experts on the domains {missing}; make them first")
        total = sum(mixture.values())
        found = {name: self.relations[name] for name in mixture}
        return mixed([(mixture[name] / total / n, r) for name, (r, n) in found.items()])

    def farthest(self, domain: str) -> str:
        """The domain whose energies are least like this one's: smallest cosine over all experts."""

        def energies(name: str) -> Tensor:
            return torch.cat([stats.energy for stats in self.domains[name].values()])

        own = energies(domain)
        alike = {
            name: float(own @ (found := energies(name)) / found.norm()) for name in self.domains
        }
        return min(alike, key=lambda name: (alike[name], name))

    def uniform(self) -> dict[str, float]:
        """The mixture for a device of which nothing is known: every domain alike."""
        return dict.fromkeys(self.domains, 1.0)


def profile_domain(
    loaded: LoadedModel,
    examples: Sequence[Example],
    max_tokens: int,
    progress: Callable[[int], None] = lambda _: None,
    read: Reader = read_whole,
) -> tuple[dict[int, ExpertStatistics], int]:
    """Statistics of the full model on one domain, and the number of tokens seen.

    Batches are taken until `max_tokens` is reached; `progress` is told the tokens of each. `read`
    runs the model: whole, or one layer at a time (`server/streamed.py`).
    """
    sums: dict[int, ExpertStatistics] = {}
    num_tokens = 0
    with contextlib.ExitStack() as stack:
        for layer in moe_layers(loaded.model):
            found = ExpertStatistics.zeros(layer.num_experts, layer.hidden_size)
            stack.enter_context(_watched(layer, found))
            sums[layer.position] = found
        for batch in read(loaded.model, packed_batches(head(examples, max_tokens))):
            num_tokens += (seen := int(batch.valid.sum()))
            progress(seen)
    if not all(bool(torch.isfinite(x).all()) for s in sums.values() for x in (s.energy, s.stream)):
        raise CheckpointError("profile statistics are not finite; are the weights damaged?")
    return sums, num_tokens


def require_tokens(
    domain: str, examples: Sequence[Example], max_tokens: int, loaded: LoadedModel
) -> None:
    """Raises DataError if there is too little text to tell a layer's experts apart."""
    found = sum(len(example.tokens) for example in head(examples, max_tokens))
    layer = max(moe_layers(loaded.model), key=lambda layer: layer.num_routed / layer.top_k)
    fewest, enough = (
        math.ceil(picks * layer.num_routed / layer.top_k) for picks in (FEWEST_PICKS, ENOUGH_PICKS)
    )
    if found < fewest:
        raise DataError(
            f"domain {domain!r}: {found} tokens to profile; with {layer.num_routed} experts of "
            f"which a token picks {layer.top_k}, a plan needs {fewest} tokens, and {enough} to be "
            "stable; add text, or raise calibration_tokens"
        )


def save_domain(
    path: Path, base: str, statistics: dict[int, ExpertStatistics], num_tokens: int
) -> None:
    """Writes one domain's statistics atomically; a profile on disk is a folder of these."""
    digest = torch.tensor(list(bytes.fromhex(base)), dtype=torch.uint8)
    save_sums(path, statistics, num_tokens, base=digest)


def load_profile(folder: Path, base: str, relations: Path | None = None) -> Profile:
    """The profile in a folder; domains of another base model are an error.

    Args:
        folder: one file per domain.
        base: digest of the base model.
        relations: folder of the same domains' relations, where they were made.

    Raises:
        CheckpointError: not a profile, or of another base model.
    """
    domains, num_tokens = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        domains[path.stem], num_tokens[path.stem], found = load_sums(path, ExpertStatistics, "base")
        if (of := bytes(found["base"].tolist()).hex()) != base:
            raise CheckpointError(f"{path}: profile of base model {of[:12]}, not {base[:12]}")
    if not domains:
        raise CheckpointError(f"{folder}: no profile here; profile the base model first")
    related = (
        {}
        if relations is None
        else {d: load_relations(relations / f"{d}.safetensors") for d in domains}
    )
    return Profile(base, domains, num_tokens, related)


@contextlib.contextmanager
def _watched(layer: MoELayer, sums: ExpertStatistics) -> Iterator[None]:
    """While the block runs, what the layer's experts do is added to the sums."""
    state = expert_state(layer.experts)
    asked = False

    def observe(outputs: Tensor, gates: Tensor, slots: Tensor) -> None:
        nonlocal asked
        asked = True
        outputs, gates = outputs.float(), gates.float()
        lengths = outputs.norm(dim=-1)
        norms, ones = lengths * gates, torch.ones_like(gates)
        columns = (ones, gates, gates.square(), norms, norms.square(), lengths)
        totals = (sums.count, sums.gate, sums.gate_squared, sums.norm, sums.energy, sums.magnitude)
        for total, column in zip(totals, columns, strict=True):
            total.index_add_(0, slots, column)
        sums.output.index_add_(0, slots, gates.square()[:, None] * outputs)

    def leave(_layer: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal asked
        if not asked:  # Read one layer at a time, a layer is passed often and runs once.
            return
        asked = False
        stream = output if isinstance(output, Tensor) else output[0]
        energy = stream.reshape(-1, layer.hidden_size).float().square().sum(-1)
        valid = valid_tokens(energy.numel())
        sums.stream.add_((energy if valid is None else energy[valid]).reciprocal().sum())

    state.observer = observe
    handle = layer.decoder_layer.register_forward_hook(leave)
    try:
        yield
    finally:
        handle.remove()
        state.observer = None


def head(examples: Sequence[Example], max_tokens: int) -> list[Example]:
    """The first examples that have `max_tokens` tokens together, or all."""
    taken, total = [], 0
    for example in examples:
        taken.append(example)
        total += len(example.tokens)
        if total >= max_tokens:
            break
    return taken
