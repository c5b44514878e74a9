"""`proxymoe-coordinator plan`: the submodel that fits a budget, why no more fits, and the proof.

With `--prove` the submodel is built and tuned for a few steps, in a process that does what a
device's job process does, and the prediction stands beside what that process took.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.table import Table

from proxymoe.common.errors import ConfigError, DataError
from proxymoe.common.plan import Precision
from proxymoe.server.told import console, run_at, told

if TYPE_CHECKING:
    from proxymoe.common.budget import Budget
    from proxymoe.common.measure import Measured
    from proxymoe.server.extract import Extraction
    from proxymoe.server.fit import Fit
    from proxymoe.server.run_directory import RunDirectory

MB = 1e6
REHEARSAL = "proxymoe.client.rehearse"
"""Run by name: server code imports none of the client's."""


def plan(
    directory: Annotated[Path, typer.Argument(metavar="D", help="The run directory.")],
    budget: Annotated[
        str | None, typer.Option(help="Peak of tuning on the device: 900MB, 1.5GiB, bytes.")
    ] = None,
    explain: Annotated[bool, typer.Option(help="What the peak consists of, what helps.")] = False,
    experts: Annotated[Precision | None, typer.Option(help="How experts are held.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows of a step.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=8, help="Tokens of a row.")] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(help="Public domain, as NAME or NAME=WEIGHT; repeated, a mixture of them."),
    ] = None,
    prove: Annotated[bool, typer.Option(help="Build it, tune it a little, measure.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Plans a submodel for a device's memory, and says what takes it."""
    with told():
        peak = None if budget is None else parse_size(budget)
        run = run_at(directory)
        from proxymoe.server.fit import Fit  # noqa: PLC0415  imports torch
        from proxymoe.server.prepare import prepare  # noqa: PLC0415

        asked = {"batch_size": batch_size, "max_tokens": max_tokens}
        settings = run.settings
        cutting = {} if experts is None else {"experts": experts}
        prepared = prepare(run)
        fit = Fit(
            prepared.base,
            prepared.profile,
            settings.extract.model_copy(update=cutting),
            settings.adapter,
            settings.train.model_copy(update={k: v for k, v in asked.items() if v is not None}),
            [settings.seed],
        )
        mixture = parse_mixture(domain or [], fit.profile.domains) or fit.profile.uniform()
        started = time.perf_counter()
        if peak is None:
            cut = fit.cut(mixture)
            predicted = fit.predicted(cut.plan, mixture)
        else:
            cut, predicted = fit.largest(mixture, peak)
        seconds = time.perf_counter() - started
        helps = fit.remedies(cut.plan, mixture) if explain else []
        proof = measure(run, fit, cut, mixture) if prove else None
        if as_json:
            fields = plan_fields(fit, cut, predicted, seconds, peak)
            measured = None if proof is None else proof.model_dump()
            typer.echo(json.dumps(fields | {"helps": helps, "measured": measured}, indent=1))
        else:
            _show(fit, cut, predicted, seconds, helps if explain else None, proof)
        if proof is not None and peak is not None and proof.peak > peak:
            over = f"{proof.peak / MB:,.1f} MB, the budget is {peak / MB:,.1f} MB"
            raise ConfigError(f"measured: {over}; plan with a smaller one")


def parse_size(text: str) -> int:
    """Bytes of a size such as 900MB (10⁶) or 1.5GiB (2³⁰); ConfigError for anything else."""
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if size <= 0:
        raise ConfigError(f"--budget {text}: no size; write it as 900MB, 1.5GiB or in bytes")
    return size


def parse_mixture(parts: list[str], domains: Any) -> dict[str, float]:
    """The mixture of NAME=WEIGHT, weight 1 if there is none; ConfigError for unknown domains."""
    mixture = {}
    for part in parts:
        name, _, weight = part.partition("=")
        try:
            mixture[name] = float(weight or 1.0)
        except ValueError:
            mixture[name] = -1.0
        if name not in domains or not 0 <= mixture[name] < float("inf"):
            raise ConfigError(
                f"--domain {part}: write it as NAME or NAME=WEIGHT with a weight of at least 0; "
                f"the public domains are {sorted(domains)}"
            )
    return mixture


def measure(
    run: "RunDirectory", fit: "Fit", cut: "Extraction", mixture: dict[str, float]
) -> "Measured":
    """What tuning this submodel takes on this machine, in a process of its own.

    Raises:
        DataError: the process could not do it; with its last words.
    """
    from proxymoe.common.checkpoint import write_tensors  # noqa: PLC0415  imports torch
    from proxymoe.common.measure import Measured  # noqa: PLC0415
    from proxymoe.common.model import TABLES_FILE  # noqa: PLC0415

    main = max(mixture, key=lambda name: mixture[name])
    with tempfile.TemporaryDirectory(prefix="proof-", dir=run.cache) as folder:
        if cut.tables:
            write_tensors(Path(folder) / TABLES_FILE, cut.tables)
        fit.base.materialise(cut.plan, Path(folder))
        asked = {
            "folder": folder,
            "text": str(run.calibration.absolute() / f"{main}.jsonl"),
            "adapter": fit.adapter.model_dump(mode="json"),
            "train": fit.train.model_dump(mode="json"),
        }
        done = subprocess.run(  # noqa: S603  the command is a constant
            [sys.executable, "-P", "-m", REHEARSAL],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise DataError(f"the rehearsal ended without a measurement: {last}")
    return Measured.model_validate_json(done.stdout)


def plan_fields(
    fit: "Fit", cut: "Extraction", predicted: "Budget", seconds: float, peak: int | None
) -> dict[str, Any]:
    """A plan and its predicted peak as plain data; sizes in bytes."""
    return {
        "plan": cut.plan.digest,
        "kept": cut.plan.num_kept,
        "num_experts": sum(fit.base.num_experts.values()),
        "experts": cut.plan.experts.value,
        "batch_size": fit.train.batch_size,
        "max_tokens": fit.train.max_tokens,
        "budget": peak,
        "weights": cut.num_bytes,
        "predicted": predicted.peak,
        "terms": {part.value: size for part, size in predicted.terms.items()},
        "dominant": predicted.dominant.value,
        "seconds": seconds,
    }


def _show(
    fit: "Fit",
    cut: "Extraction",
    predicted: "Budget",
    seconds: float,
    helps: list[tuple[str, int]] | None,
    proof: "Measured | None",
) -> None:
    found = plan_fields(fit, cut, predicted, seconds, None)
    console.print(
        f"plan {found['plan'][:12]}: {found['kept']} of {found['num_experts']} experts "
        f"({found['experts']}), {cut.num_bytes / MB:,.1f} MB of weights; predicted peak of tuning "
        f"{predicted.peak / MB:,.1f} MB; made in {seconds:.2f} s"
    )
    if helps is not None:
        console.print(_term_table(predicted))
        console.print(f"{predicted.dominant.value} dominates. With the same kept experts:")
        for told_of, saved in helps:
            console.print(f"  {told_of} would save {saved / MB:,.1f} MB")
    if proof is not None:
        shared = f"{proof.own_file_backed / MB:,.1f} MB where shared pages count in part"
        console.print(
            f"measured peak {proof.peak / MB:,.1f} MB; predicted is "
            f"{predicted.peak / proof.peak:.0%} of it. {proof.anonymous / MB:,.1f} MB are "
            f"anonymous, {proof.file_backed / MB:,.1f} MB mapped files ({shared})"
        )
    console.print(
        f"for devices to get it: budget_bytes = {cut.num_bytes} in \\[extract] of the settings"
    )


def _term_table(predicted: "Budget") -> Table:
    table = Table("part of the peak", "MB", "share", title="predicted", title_justify="left")
    for part, size in predicted.terms.items():
        table.add_row(part.value, f"{size / MB:,.1f}", f"{predicted.share(part):.1%}")
    table.add_row("peak", f"{predicted.peak / MB:,.1f}", "", style="bold")
    return table
