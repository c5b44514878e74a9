"""A worker's jobs on public text: what every expert does there, and how experts relate."""

from pathlib import Path

from proxymoe.server.profile import head, profile_domain, require_tokens, save_domain
from proxymoe.server.relations import relate_domain, save_relations
from proxymoe.simulations import worker
from proxymoe.simulations.site import asset, public_examples


def profile(domain: str, folder: Path) -> int:
    """Profiles one public domain with the full model; returns the tokens seen."""
    here = worker.here()
    experiment = here.site.experiment
    path = asset(experiment.calibration) / f"{domain}.jsonl"
    examples = public_examples(path, here.full.tokenizer, experiment.train.max_tokens)
    loaded = here.mounted(None)
    require_tokens(domain, examples, experiment.calibration_tokens, loaded)
    statistics, num_tokens = profile_domain(loaded, examples, experiment.calibration_tokens)
    save_domain(folder / f"{domain}.safetensors", here.site.base, statistics, num_tokens)
    return num_tokens


def relate(domain: str, folder: Path) -> int:
    """Sees how experts relate on one public domain; returns the tokens seen."""
    here = worker.here()
    experiment = here.site.experiment
    path = asset(experiment.calibration) / f"{domain}.jsonl"
    examples = public_examples(path, here.full.tokenizer, experiment.train.max_tokens)
    seen = head(examples, experiment.calibration_tokens)
    relations, num_tokens = relate_domain(here.mounted(None), seen)
    save_relations(folder / f"{domain}.safetensors", relations, num_tokens)
    return num_tokens
