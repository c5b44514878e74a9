"""How long a plan takes: any domain mixture, and any budget, from the profile of a large model.

The base model is an OLMoE with layers and experts in the numbers asked for, and small ones, for
nothing here reads their weights; the profile is random, and as wide as a real one. Statistics are
linear in the mixture, so no model is run. Seconds are those of one core.
`python -m proxymoe.simulations.bench_plan`.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from transformers import OlmoeConfig, OlmoeForCausalLM

from proxymoe.common.config import AdapterSettings, ExtractSettings, TrainSettings
from proxymoe.common.files import write_json
from proxymoe.common.plan import Precision
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.extract import largest_bytes, smallest_bytes
from proxymoe.server.fit import Fit
from proxymoe.server.profile import ExpertStatistics, Profile

DOMAINS, TOKENS, INNER = 10, 4096, 32
REPEATS = 5

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False)


@app.command()
def bench(
    layers: Annotated[int, typer.Option(min=1)] = 16,
    experts: Annotated[int, typer.Option(min=2)] = 64,
    hidden: Annotated[int, typer.Option(min=64, help="Width of the profile's vectors.")] = 2048,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Where to write the numbers as JSON.")
    ] = None,
) -> None:
    """Plans for random mixtures: by weights, as devices apply, and by the peak of tuning."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="proxymoe-plan-") as folder:
        base = base_of(Path(folder), layers, experts)
        profile = profile_of(base, hidden, rng)
    extract, train = ExtractSettings(experts=Precision.INT4), TrainSettings()
    fit = Fit(base, profile, extract, AdapterSettings(), train, [0])
    sizes = smallest_bytes(base, extract), largest_bytes(base, extract)
    ends = [
        fit.predicted(fit.cut(m, size).plan, m).peak for size in sizes for m in mixtures(rng, 1)
    ]
    by_weights, by_peak = [], []
    for mixture in mixtures(rng, REPEATS):
        started = time.process_time()
        fit.cut(mixture)
        by_weights.append(time.process_time() - started)
        started = time.process_time()
        fit.largest(mixture, int(np.mean(ends)))
        by_peak.append(time.process_time() - started)
    found: dict[str, Any] = {"layers": layers, "experts": experts, "hidden": hidden}
    for name, taken in (("plan_seconds", by_weights), ("fit_seconds", by_peak)):
        found[name] = statistics.median(taken)
        console.print(f"{name}: {found[name]:.3f} (median of {REPEATS}), worst {max(taken):.3f}")
    if json_path is not None:
        write_json(json_path, found)


def mixtures(rng: np.random.Generator, count: int) -> list[dict[str, float]]:
    """So many random mixtures of all domains."""
    weights = rng.dirichlet(np.ones(DOMAINS), count).tolist()
    return [{f"domain{i}": weight for i, weight in enumerate(row)} for row in weights]


def base_of(folder: Path, layers: int, experts: int) -> BaseCheckpoint:
    """An OLMoE with small layers and experts."""
    config = OlmoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=experts,
        num_experts_per_tok=min(8, experts),
        pad_token_id=0,
        eos_token_id=1,
    )
    model: Any = OlmoeForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return BaseCheckpoint(folder)


def profile_of(base: BaseCheckpoint, hidden: int, rng: np.random.Generator) -> Profile:
    """Random statistics: shares of experts as uneven as real ones are."""
    domains = {}
    for name in (f"domain{i}" for i in range(DOMAINS)):
        found = {}
        for at, num_experts in base.num_experts.items():
            share = torch.from_numpy(rng.dirichlet(np.full(num_experts, 0.5))).float()
            count = TOKENS * base.layers[at].top_k * share
            output = torch.from_numpy(rng.standard_normal((num_experts, hidden))).float()
            energy = count * torch.from_numpy(rng.exponential(size=num_experts)).float()
            stream = TOKENS * torch.from_numpy(rng.exponential(size=1)).float()
            found[at] = ExpertStatistics(
                count, 0.3 * count, 0.1 * count, count, energy, count, output, stream
            )
        domains[name] = found
    return Profile(base.digest, domains, dict.fromkeys(domains, TOKENS))


if __name__ == "__main__":
    app()
