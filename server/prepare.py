"""What follows from base model and public text alone, made once and kept in the cache.

The base model's index, the full model in its fused form, its profile, and the tables that are
shipped to devices. Text, order and arithmetic are those of a simulation, and so are the bits of
the profile.
"""

import fcntl
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from proxymoe.common.domains import count_tokens, domain_table, save_table
from proxymoe.common.errors import ConfigError
from proxymoe.common.expert_table import save_expert_table
from proxymoe.common.files import canonical_json, digest_of
from proxymoe.common.model import LoadedModel, compute_dtype, load
from proxymoe.common.text import Batch, Example, read_rows, tokenise
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.extract import expert_table
from proxymoe.server.modes import MODES
from proxymoe.server.profile import (
    COLUMNS,
    Profile,
    head,
    load_profile,
    profile_domain,
    require_tokens,
    save_domain,
)
from proxymoe.server.reading import read_whole
from proxymoe.server.relations import relate_domain, save_relations
from proxymoe.server.run_directory import RunDirectory
from proxymoe.server.settings import CoordinatorSettings
from proxymoe.server.streamed import Streamed

WHOLE = 0.5
"""Share of the free memory that the weights of a model may take to be loaded whole."""
Stage = Callable[[str, int, int], None]
"""Progress: told what is going on, how much is done, and of how much."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a coordinator starts from."""

    base: BaseCheckpoint
    full: Path
    """Folder of the full model, materialised."""
    profile: Profile
    table: Path | None
    """The domain table; None with a single public domain, of which no mixture can be told."""
    experts: Path | None
    """The expert table, wherever there is a domain table."""


def prepare(run: RunDirectory, stage: Stage = lambda *_: None) -> Prepared:
    """Makes what is missing of it. Interrupted, it goes on later with the domain where it was.

    One process works at a time; others wait, and then find it done.

    Args:
        run: where base model, public text and cache are.
        stage: told of the stages "index", "profile", and "profile of <domain>" in percent.

    Raises:
        ConfigError: a folder that the settings name is missing, or has no text for the canary.
        CheckpointError, UnsupportedModel: the base model cannot be used.
        DataError: a public text cannot be used.
    """
    texts = public_texts(run)
    run.cache.mkdir(parents=True, exist_ok=True)
    with (run.cache / "prepare.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        base = BaseCheckpoint(run.base_model, run.cache, _by_percent(stage, "index"))
        full = base.materialised_full(run.cache)
        key = _recipe(base.digest, run.settings, texts)
        profile = _profile(run, base, full, texts, run.cache / f"profile-{key}", stage)
        table = experts = None
        if len(texts) > 1:
            table = run.cache / f"table-{key}.safetensors"
            if not table.exists():
                save_table(table, domain_table(_token_counts(run, base, full, texts)))
            extract = run.settings.extract
            rule = digest_of(canonical_json([key, extract.model_dump(mode="json")]))[:24]
            experts = run.cache / f"experts-{rule}.safetensors"
            if not experts.exists():
                save_expert_table(experts, expert_table(base, profile, extract))
    return Prepared(base, full, profile, table, experts)


def public_texts(run: RunDirectory) -> list[Path]:
    """The files of public text, one per domain, sorted.

    Raises:
        ConfigError: the folder is missing, or lacks a domain that the canary reads.
    """
    texts, wanted = sorted(run.calibration.glob("*.jsonl")), run.settings.public_domains
    if missing := sorted({*wanted} - {path.stem for path in texts}):
        raise ConfigError(
            f"public_domains {missing}: no such <domain>.jsonl in {run.calibration}; "
            f"there are {[path.stem for path in texts]}"
        )
    return texts


def _recipe(base: str, settings: CoordinatorSettings, texts: Sequence[Path]) -> str:
    """Names what profile and table depend on."""
    contents = [[path.stem, digest_of(path.read_bytes())] for path in texts]
    train = settings.train
    how = [settings.calibration_tokens, train.max_tokens, train.dtype, *COLUMNS]
    return digest_of(canonical_json([base, how, contents]))[:24]


def _profile(
    run: RunDirectory,
    base: BaseCheckpoint,
    full: Path,
    texts: Sequence[Path],
    folder: Path,
    stage: Stage,
) -> Profile:
    """The base model's profile in `folder`; domains that are there already are kept.

    Relations of experts are in a folder beside it, if the mode looks at them.
    """
    settings, relations = run.settings, None
    if MODES[settings.extract.mode].relations:
        relations = folder.with_name(folder.name.replace("profile-", "relations-"))
    todo = _missing(texts, folder)
    unrelated = [] if relations is None else _missing(texts, relations)
    stage("profile", len(texts) - len(todo), len(texts))
    if not todo and not unrelated:
        return load_profile(folder, base.digest, relations)
    torch.set_num_threads(settings.threads)
    model, read = _model(base, full, compute_dtype(settings.train.dtype))
    for done, (path, file) in enumerate(todo, start=len(texts) - len(todo) + 1):
        examples = _examples(path, model.tokenizer, settings)
        require_tokens(path.stem, examples, settings.calibration_tokens, model)
        told = partial(read, progress=_by_percent(stage, f"profile of {path.stem}"))
        found, num_tokens = profile_domain(model, examples, settings.calibration_tokens, read=told)
        save_domain(file, base.digest, found, num_tokens)
        stage("profile", done, len(texts))
    for done, (path, file) in enumerate(unrelated, start=len(texts) - len(unrelated) + 1):
        seen = head(_examples(path, model.tokenizer, settings), settings.calibration_tokens)
        told = partial(read, progress=_by_percent(stage, f"relations in {path.stem}"))
        save_relations(file, *relate_domain(model, seen, told))
        stage("relations of experts", done, len(texts))
    return load_profile(folder, base.digest, relations)


def _missing(texts: Sequence[Path], folder: Path) -> list[tuple[Path, Path]]:
    """(text, file that is to be made of it) of the texts of which the folder has none yet."""
    files = [(path, folder / f"{path.stem}.safetensors") for path in texts]
    return [(path, file) for path, file in files if not file.exists()]


def _model(
    base: BaseCheckpoint, full: Path, dtype: torch.dtype
) -> tuple[LoadedModel, Callable[..., Iterator[Batch]]]:
    """The full model and how to run it: whole where it fits, else one layer at a time.

    It makes no difference to the bits.
    """
    weights = sum(math.prod(piece.shape) for piece in base.pieces) * dtype.itemsize
    if weights <= WHOLE * psutil.virtual_memory().available:
        return load(full, dtype), read_whole
    streamed = Streamed(base, dtype)
    return streamed.loaded, streamed.read


def _by_percent(stage: Stage, what: str) -> Callable[[int, int], None]:
    """Tells of a stage when another hundredth of it is done, and not for every little step."""
    last = -1

    def tell(done: int, total: int) -> None:
        nonlocal last
        percent = 100 * done // max(1, total)
        if percent != last:
            last = percent
            stage(what, percent, 100)

    return tell


def _token_counts(
    run: RunDirectory, base: BaseCheckpoint, full: Path, texts: Sequence[Path]
) -> dict[str, NDArray[np.int64]]:
    """{domain: (V,) how often each token of the vocabulary occurs}."""
    tokenizer = AutoTokenizer.from_pretrained(full, local_files_only=True)
    vocab_size = base.config.get_text_config().vocab_size
    return {
        path.stem: count_tokens(
            (example.tokens for example in _examples(path, tokenizer, run.settings)), vocab_size
        )
        for path in texts
    }


def _examples(
    path: Path, tokenizer: PreTrainedTokenizerBase, settings: CoordinatorSettings
) -> tuple[Example, ...]:
    return tokenise(read_rows(path), tokenizer, settings.train.max_tokens).examples
