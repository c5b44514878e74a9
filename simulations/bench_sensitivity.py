"""Whether energy says what a plan loses: layers are thinned one by one, and the divergence is read.

Of one layer at a time all experts but the quarter with most energy are left out, on public text of
one domain. If a measure of what is lost is to compare layers, the divergence from the whole model
must be in one proportion to it, wherever the layer lies. Beside the energy itself stands its share
of the residual stream, by which `drop` chooses (`Profile.sensitivity`).
`python -m proxymoe.simulations.bench_sensitivity`, with `--base FOLDER` on another model.
"""

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from proxymoe.common.experts import Redirect, expert_state
from proxymoe.common.files import write_json
from proxymoe.common.loss import completion_logits, divergence
from proxymoe.common.model import LoadedModel, load
from proxymoe.common.moe import MoELayer, moe_layers
from proxymoe.common.text import Batch, Example, packed_batches, read_rows, tokenise
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.profile import Profile, profile_domain
from proxymoe.simulations.site import asset

DOMAINS = ("banking", "math", "code", "travel", "shakespeare")
KEPT = 0.25
TOKENS, JUDGED = 2048, 1024
"""Of every domain; the divergence is read on other text, at fewer completion tokens."""
MEASURES = ("energy", "share of the stream")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class Thinned:
    """What one layer lost on one domain, and what came of it."""

    domain: str
    layer: int
    kl: float
    """Nats per token."""
    lost: dict[str, float]
    """Per token, by measure."""


@app.command()
def bench(
    base: Annotated[
        Path | None, typer.Option(help="A MoE checkpoint; the shipped one if none is named.")
    ] = None,
    domain: Annotated[
        list[str], typer.Option(help="Of the shipped public text; may be given many times.")
    ] = list(DOMAINS),  # noqa: B006
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Where to write the numbers as JSON.")
    ] = None,
) -> None:
    """Thins every layer on every domain, and prints the divergence per unit of what was lost."""
    torch.set_num_threads(2)
    checkpoint = BaseCheckpoint(base or asset("tiny-moe"))
    with tempfile.TemporaryDirectory(prefix="proxymoe-bench-") as folder:
        loaded = load(checkpoint.materialise(checkpoint.keep_all(), Path(folder)))
        found = thinned(loaded, checkpoint.digest, domain)
    layers = sorted({each.layer for each in found})
    ratios = {measure: [_ratio(found, at, measure) for at in layers] for measure in MEASURES}
    means = {measure: statistics.mean(column) for measure, column in ratios.items()}
    shown = Table("layer", *MEASURES, title="Divergence per unit, over its mean", show_footer=True)
    for number, at in enumerate(layers):
        shown.add_row(str(at), *(f"{ratios[m][number] / means[m]:.2g}" for m in MEASURES))
    shown.columns[0].footer = "spread"
    for column, measure in zip(shown.columns[1:], MEASURES, strict=True):
        column.footer = f"{statistics.pstdev(ratios[measure]) / means[measure]:.2f}"
    Console().print(shown)
    if json_path is not None:
        cells: list[dict[str, Any]] = [
            {"domain": x.domain, "layer": x.layer, "kl": x.kl, **x.lost} for x in found
        ]
        write_json(json_path, {"cells": cells, "layers": layers, "ratios": ratios})


def thinned(loaded: LoadedModel, base: str, domains: Sequence[str]) -> list[Thinned]:
    """Every layer of the model, on each of these domains."""
    texts = {domain: _halves(loaded, domain) for domain in domains}
    sums = {domain: profile_domain(loaded, known, TOKENS) for domain, (known, _) in texts.items()}
    profile = Profile(
        base,
        {domain: found for domain, (found, _) in sums.items()},
        {domain: count for domain, (_, count) in sums.items()},
    )
    found = []
    for domain, (_, judge) in texts.items():
        batches = packed_batches(judge)
        reference = completion_logits(loaded.model, batches, JUDGED)
        energy = {at: stats.energy for at, stats in profile.mix({domain: 1.0}).items()}
        for layer in track(moe_layers(loaded.model), domain, console=Console(stderr=True)):
            at = layer.position
            kept = energy[at].topk(round(KEPT * layer.num_experts)).indices
            kl = divergence(reference, _without_others(loaded, layer, kept, batches))
            lost = float(energy[at].sum() - energy[at][kept].sum())
            both = (lost, lost * profile.sensitivity[at])
            found.append(Thinned(domain, at, kl, dict(zip(MEASURES, both, strict=True))))
    return found


def _without_others(
    loaded: LoadedModel, layer: MoELayer, kept: torch.Tensor, batches: Sequence[Batch]
) -> torch.Tensor:
    """Logits of the model while one layer has these experts only."""
    slot = torch.full((layer.num_routed,), -1)
    slot[kept] = kept
    state = expert_state(layer.experts)
    state.redirect = Redirect(slot)
    try:
        return completion_logits(loaded.model, batches, JUDGED)
    finally:
        state.redirect = None


def _halves(loaded: LoadedModel, domain: str) -> tuple[list[Example], list[Example]]:
    """Text to choose by, and other text to read the divergence on."""
    rows = read_rows(asset("calibration") / f"{domain}.jsonl")
    examples = tokenise(rows, loaded.tokenizer, 128).examples
    return list(examples[::2]), list(examples[1::2])


def _ratio(found: list[Thinned], at: int, measure: str) -> float:
    own = [each for each in found if each.layer == at]
    return statistics.mean(each.kl / each.lost[measure] for each in own)


if __name__ == "__main__":
    app()
