"""How much public text a plan needs: what plans from little text keep of other text's energy.

Half of a domain's text is the judge. Plans are made from more and more of the other half, and keep
that share of the judge's energy which the best plan of as many experts keeps.
`python -m proxymoe.simulations.bench_calibration`.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from proxymoe.common.files import write_json
from proxymoe.common.model import LoadedModel, load
from proxymoe.common.moe import moe_layers
from proxymoe.common.text import Example, read_rows, tokenise
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.profile import ExpertStatistics, profile_domain
from proxymoe.simulations.site import asset

DOMAINS = ("banking", "math", "code", "travel", "small_talk", "shakespeare")
TOKENS = (128, 256, 512, 1024, 2048, 4096)
FRACTIONS = (0.125, 0.25)
MOST_TOKENS = 8000
"""Of the judge."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench(
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Where to write the numbers as JSON.")
    ] = None,
) -> None:
    """Profiles the shipped model on more and more text, and prints what its plans are worth."""
    torch.set_num_threads(1)
    base = BaseCheckpoint(asset("tiny-moe"))
    with tempfile.TemporaryDirectory(prefix="proxymoe-bench-") as folder:
        loaded = load(base.materialise(base.keep_all(), Path(folder)))
        found = [row for domain in DOMAINS for row in shares(loaded, domain)]
    rows = [_over_domains(found, tokens, kept) for tokens in TOKENS for kept in FRACTIONS]
    shown = Table("tokens", "picks per expert", "kept experts", "share of energy", "worst domain")
    for row in rows:
        shown.add_row(
            str(row["tokens"]),
            f"{row['picks']:.0f}",
            f"{row['kept']:.1%}",
            f"{row['mean']:.3f}",
            f"{row['worst']:.3f}",
        )
    Console().print(shown)
    if json_path is not None:
        write_json(json_path, {"table": rows, "domains": found})


def shares(loaded: LoadedModel, domain: str) -> list[dict[str, Any]]:
    """What plans from one domain's text keep, by tokens and kept share of the experts."""
    rows = read_rows(asset("calibration") / f"{domain}.jsonl")
    examples = tokenise(rows, loaded.tokenizer, 256).examples
    order = np.random.default_rng(0).permutation(len(examples))
    judge, others = _halves([examples[i] for i in order])
    expected, _ = profile_domain(loaded, judge, 10**9)
    layer = moe_layers(loaded.model)[0]
    found = []
    for tokens in TOKENS:
        statistics_, seen = profile_domain(loaded, others, tokens)
        picks = seen * layer.top_k / layer.num_routed
        found += [
            {
                "domain": domain,
                "tokens": tokens,
                "picks": picks,
                "kept": kept,
                "share": share_kept(statistics_, expected, kept),
            }
            for kept in FRACTIONS
        ]
    return found


def share_kept(
    known: dict[int, ExpertStatistics], judge: dict[int, ExpertStatistics], kept: float
) -> float:
    """Energy of the experts that are best by what is known, over that of the truly best."""
    found = []
    for at, stats in judge.items():
        count = int(kept * stats.energy.numel())
        chosen = stats.energy[known[at].energy.topk(count).indices]
        found.append(float(chosen.sum() / stats.energy.topk(count).values.sum()))
    return statistics.mean(found)


def _halves(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    total, limit = 0, min(MOST_TOKENS, sum(len(e.tokens) for e in examples) / 2)
    for number, example in enumerate(examples):
        total += len(example.tokens)
        if total > limit:
            return examples[:number], examples[number:]
    raise AssertionError("half of the text is less than all of it")


def _over_domains(found: list[dict[str, Any]], tokens: int, kept: float) -> dict[str, Any]:
    own = [row for row in found if (row["tokens"], row["kept"]) == (tokens, kept)]
    numbers = [row["share"] for row in own]
    return {
        "tokens": tokens,
        "picks": statistics.mean(row["picks"] for row in own),
        "kept": kept,
        "mean": statistics.mean(numbers),
        "worst": min(numbers),
    }


if __name__ == "__main__":
    app()
