"""★ What tuning a proxy submodel takes of a device's memory: a sum of named terms.

A budget is the peak of a training job: everything that is resident when most is. It is predicted
from sizes alone, before anything is built, so that a coordinator can choose the largest submodel
that fits and a device can refuse one that does not; `client/rehearse.py` measures the same.

What autograd keeps of a layer follows from our own backward passes (`common/attention.py`,
`common/experts.py`, `common/norm.py`) and is exact there; a test holds the formula to the tensors
that are really kept. Families with code of their own keep more or less. Weights count in full,
although pages of a mapped file that nothing has read, such as rows of the embedding, take nothing:
that errs on the safe side. What cannot be counted is measured: `RUNTIME_BYTES`, `SLACK`, `SAFETY`.

Shapes: T = B·L tokens of a step in B rows of L, D hidden size, I inner size of an expert, V
vocabulary, H heads, P trained numbers, w bytes of a number while computing, S experts held.
"""

from dataclasses import dataclass
from enum import StrEnum

from proxymoe.common.config import TrainSettings
from proxymoe.common.experts import LARGE_ROWS, LARGE_STEP, SMALL_STEP
from proxymoe.common.loss import CHUNK_ROWS

RUNTIME_BYTES = 510_000_000
"""Python, torch and transformers, and the kernels that a job compiles."""
SLACK = 0.6
"""What the heap holds beside what is in use, as a share of what tuning allocates and frees."""

SAFETY = 0.05
"""Added to the whole. In 22 rehearsals (models of 35 MB and 1 GB; 16 to 8,192 tokens a step; 12.5
to 100 % of the experts; bf16, int8, int4, fp32) prediction over measurement was then .94 to 1.18.
What the heap holds differs from run to run by 4 %, and with the sizes of what is freed."""


class Part(StrEnum):
    """The terms of a budget."""

    RUNTIME = "runtime"
    """Python, torch and transformers."""
    TRUNK = "trunk"
    """All weights but those of routed experts."""
    EXPERTS = "kept experts"
    """Weights of the kept experts, as the device holds them."""
    ADAPTER = "adapter and optimiser"
    """The trained numbers, gradient and moments, and the frozen factors."""
    ACTIVATIONS = "activations"
    """What the backward pass needs of the forward pass."""
    WORKSPACE = "workspace"
    """What one layer's backward pass makes and frees."""
    LOGITS = "logits"
    """Those of a chunk of positions, as far as they pass the workspace: both are never there."""
    SLACK = "slack of the heap"
    """Freed, and not yet given back."""
    SAFETY = "safety"
    """By which the sum of the others may err."""


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """Sizes of a decoder layer with routed experts."""

    num_routed: int
    top_k: int
    inner: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a base model and its adapter."""

    hidden: int
    vocabulary: int
    num_layers: int
    heads: int
    """Attention heads of all layers."""
    trunk: int
    """Numbers per token that autograd keeps of the trunk, beside attention's probabilities."""
    layers: dict[int, LayerSizes]
    """By number of the decoder layer."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a device holds under one plan."""

    trunk_bytes: int
    expert_bytes: int
    kept: dict[int, int]
    """S, by number of the decoder layer."""
    picks: dict[int, float]
    """Kept experts that a token is sent to on average, by number of the decoder layer."""
    trained: int
    """P."""
    frozen: int
    """Numbers of the adapter's frozen factors."""
    adapted: float
    """Numbers per token that all adapters keep for their slopes: inputs and low-rank states."""
    widest: int = 0
    """Numbers of an expert's larger matrix, if it is dequantised at use."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The predicted peak of tuning, term by term, in bytes."""

    terms: dict[Part, int]

    @property
    def peak(self) -> int:
        """The sum."""
        return sum(self.terms.values())

    @property
    def dominant(self) -> Part:
        """The largest term."""
        return max(self.terms, key=lambda part: self.terms[part])

    def share(self, part: Part) -> float:
        """A term as a share of the peak."""
        return self.terms[part] / self.peak


def predict(sizes: Sizes, held: Held, train: TrainSettings) -> Budget:
    """The peak of tuning at full rows of `train.max_tokens`, all of it predicted."""
    activations = _activations(sizes, held, train)
    workspace = _workspace(sizes, held, train)
    logits = max(0, _logits(sizes, train) - workspace)
    terms = {
        Part.RUNTIME: RUNTIME_BYTES,
        Part.TRUNK: held.trunk_bytes,
        Part.EXPERTS: held.expert_bytes,
        Part.ADAPTER: _adapter(held, train),
        Part.ACTIVATIONS: activations,
        Part.WORKSPACE: workspace,
        Part.LOGITS: logits,
        Part.SLACK: round(SLACK * (activations + workspace + logits)),
    }
    return Budget(terms | {Part.SAFETY: round(SAFETY * sum(terms.values()))})


def kept_bytes(sizes: Sizes, held: Held, train: TrainSettings) -> int:
    """What autograd keeps of a step without checkpointing.

    Numbers of w bytes, and whatever w is: root mean squares and router probabilities in fp32, ids
    in int64.
    """
    width, tokens = _width(train), train.batch_size * train.max_tokens
    routers = sum(4 * layer.num_routed + 32 * layer.top_k for layer in sizes.layers.values())
    return round(
        width * _kept_numbers(sizes, held, train) + tokens * (8 * sizes.num_layers + routers)
    )


def _width(train: TrainSettings) -> int:
    return 4 if train.dtype == "float32" else 2


def _adapter(held: Held, train: TrainSettings) -> int:
    """Bytes per trained number: 4 for each of its start, itself, gradient, moments and a copy.

    The copy is for the step's arithmetic. Another two of w bytes are to compute with: itself and
    its gradient.
    """
    moments, width = 2 if train.optimizer == "adamw" else 0, _width(train)
    return held.trained * (4 * (4 + moments) + 2 * width) + held.frozen * width


def _activations(sizes: Sizes, held: Held, train: TrainSettings) -> int:
    """Under checkpointing, the input of every layer and all of the one that runs again."""
    every = kept_bytes(sizes, held, train)
    if train.gradient_checkpointing:
        tokens = train.batch_size * train.max_tokens
        inputs = tokens * _width(train) * sizes.hidden * sizes.num_layers
        return every // sizes.num_layers + inputs
    return every


def _kept_numbers(sizes: Sizes, held: Held, train: TrainSettings) -> float:
    """Numbers of w bytes that autograd keeps of a step.

    Of a token: what the trunk and the adapters keep, and H·L probabilities. Of a pick: D, its
    output. Of a row of a segment: 3·I (gate, SiLU(gate), up).
    """
    tokens = train.batch_size * train.max_tokens
    numbers = tokens * (sizes.trunk + sizes.heads * train.max_tokens + held.adapted)
    for at, layer in sizes.layers.items():
        numbers += 3 * layer.inner * _rows(tokens, held.picks[at], held.kept[at])
        numbers += tokens * held.picks[at] * sizes.hidden
    return numbers


def _rows(tokens: int, picks: float, kept: int) -> float:
    """Rows of all segments: picks, and half a step for every expert held."""
    step = SMALL_STEP if tokens * picks <= LARGE_ROWS * kept else LARGE_STEP
    return tokens * picks + kept * step / 2


def _workspace(sizes: Sizes, held: Held, train: TrainSettings) -> int:
    """The larger of what attention and experts of one layer make on the way back.

    Attention: slopes of probabilities and of scores, and the mask. Experts: slopes of outputs and
    inputs, D each, and of what lies between, 5·I; and one dequantised matrix, its codes widened.
    Both: slopes of the stream, in fp32 where norms take them.
    """
    width, tokens = _width(train), train.batch_size * train.max_tokens
    heads = sizes.heads / sizes.num_layers
    attention = tokens * train.max_tokens * (2 * heads + 2) * width
    experts = 2 * held.widest * width + max(
        _rows(tokens, held.picks[at], held.kept[at]) * (2 * sizes.hidden + 5 * layer.inner) * width
        for at, layer in sizes.layers.items()
    )
    return round(max(attention, experts) + tokens * sizes.hidden * (8 + 2 * width))


def _logits(sizes: Sizes, train: TrainSettings) -> int:
    """Logits and their log-softmax in fp32, the head's weight, and the slope of hidden states.

    The weight because a matmul lays it out anew.
    """
    width, positions = _width(train), train.batch_size * train.max_tokens
    head = (8 * min(CHUNK_ROWS, positions) + width * sizes.hidden) * sizes.vocabulary
    return head + 2 * width * positions * sizes.hidden
