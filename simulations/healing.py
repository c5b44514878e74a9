"""A worker's job: heals the submodel of a plan on the experiment's public text."""

import numpy as np

from proxymoe.common.plan import Plan
from proxymoe.common.text import packed_batches
from proxymoe.server.heal import heal, layer_outputs
from proxymoe.server.profile import head
from proxymoe.simulations import worker
from proxymoe.simulations.site import asset, public_examples


def healing(plan: Plan) -> np.ndarray:
    """The adapter, in the full layout, that makes this plan's submodel imitate the full model."""
    here = worker.here()
    experiment, full = here.site.experiment, here.site.layout
    settings, length = experiment.compare.heal, experiment.train.max_tokens
    examples = [
        example
        for path in sorted(asset(experiment.calibration).glob("*.jsonl"))
        for example in head(public_examples(path, here.full.tokenizer, length), settings.tokens)
    ]
    batches = packed_batches(examples)
    wanted = layer_outputs(here.mounted(None).model, batches)
    held, model = full.held_under(plan), here.mounted(plan).model
    repair = heal(model, held, batches, wanted, settings.steps, settings.learning_rate)
    return held.put_into(full, full.zeros(), repair).numpy()
