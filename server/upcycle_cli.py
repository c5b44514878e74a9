"""`proxymoe-coordinator upcycle`: a dense checkpoint becomes a mixture of experts."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from proxymoe.server.recipe import ExpertKind, Recipe, RouterInit


def upcycle(
    dense: Annotated[
        Path, typer.Argument(metavar="DENSE", help="Folder of a Llama, or a GGUF file of one.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")
    ],
    text: Annotated[Path, typer.Option(help="Folder of public <domain>.jsonl files.")],
    experts: Annotated[int, typer.Option(help="Routed experts per layer.")] = 16,
    top_k: Annotated[int, typer.Option(help="Experts that a token is sent to.")] = 4,
    expert: Annotated[ExpertKind, typer.Option(help="What it is made of.")] = ExpertKind.SPLIT,
    router: Annotated[RouterInit, typer.Option(help="How it begins.")] = RouterInit.HIDDEN,
    shared: Annotated[
        float, typer.Option(help="Of split: share of the neurons that every token uses.")
    ] = 1 / 3,
    noise: Annotated[
        float, typer.Option(help="Of copy: noise on each expert, in standard deviations.")
    ] = 0.0,
    heal: Annotated[
        bool, typer.Option(help="Of split: fit routers and outputs to the dense model.")
    ] = True,
    tokens: Annotated[int, typer.Option(min=1, help="How much of the text is read.")] = 16384,
    check_tokens: Annotated[
        int, typer.Option(min=0, help="Then measure both models on so much of the text's rest.")
    ] = 4096,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
) -> None:
    """Makes a mixture of experts out of a dense model, with public text; takes minutes."""
    recipe = Recipe(experts, top_k, expert, router, shared, noise, heal)
    # Importing torch takes seconds; a typing error should not cost them.
    import numpy as np  # noqa: PLC0415

    from proxymoe.server.dense import open_dense, public_text  # noqa: PLC0415
    from proxymoe.server.upcycled import losses  # noqa: PLC0415
    from proxymoe.server.upcycled import upcycle as write  # noqa: PLC0415

    console = Console(soft_wrap=True, highlight=False)
    opened = open_dense(dense)
    examples = public_text(text, opened.tokenizer, tokens)
    rest = public_text(text, opened.tokenizer, tokens + check_tokens)[len(examples) :]
    with Progress(console=console) as bar:
        task = bar.add_task("layers", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if not console.is_terminal:
                console.print(f"layers: {done} of {total}")

        write(opened, examples, recipe, np.random.default_rng(seed), target, progress)
    console.print(f"{target}: {experts} experts per layer, {top_k} for each token")
    if rest:
        before, after = losses(opened, target, rest)
        console.print(f"loss on text not read so far: dense {before:.3f}, mixture {after:.3f} nats")
