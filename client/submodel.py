"""★ The proxy submodel on this device: built from blobs, opened for training, rows as its tokens.

All model code of the client begins here, and costs a process some 200 MB. Processes that only
supervise, check or fetch do not import this file: `client/proxy.py` has its jobs done in a
process of their own. Nothing here touches the network.
"""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from proxymoe.client.gates import readable_files
from proxymoe.client.home import Home
from proxymoe.client.inventory import assigned
from proxymoe.client.mixture import mixture_of
from proxymoe.client.personalize import Device
from proxymoe.client.store import Store
from proxymoe.common.adapter import adapter_layout
from proxymoe.common.assignment import Assignment
from proxymoe.common.domains import load_table
from proxymoe.common.errors import LayoutMismatch, ProtocolError, ProxyMoEError
from proxymoe.common.files import write_bytes, write_json
from proxymoe.common.manifest import COMPANIONS, Manifest, materialise
from proxymoe.common.model import TABLES_FILE, compute_dtype, load
from proxymoe.common.text import Examples, TooLong, read_rows, tokenise

Pair = tuple[bytes, bytes]


def answer(job: Pair) -> Pair:
    """Does the job that (name, arguments as JSON) asks for, with an outcome that is bytes, too.

    It is (b"", result), or the kind of a ProxyMoEError and its words.
    """
    name, arguments = job
    try:
        return b"", JOBS[name.decode()](**json.loads(arguments))
    except ProxyMoEError as error:
        return type(error).__name__.encode(), str(error).encode()
    except OSError as error:  # a full disk above all
        told = f"{error.filename}: {error.strerror}; make room there, then try again"
        return ProxyMoEError.__name__.encode(), told.encode()


def build(store: str, manifest: str, folder: str) -> bytes:
    """Writes the submodel of a manifest, a digest like all it names, from the blobs in a store.

    Raises:
        IntegrityError: a blob is damaged.
        ProtocolError: the manifest is none, or names files that are not its business.
        StoreError: a blob is not there.
    """
    blobs = Store(Path(store), quota_bytes=0)  # it is only read
    found = _manifest(blobs, manifest)
    materialise(
        found,
        Path(folder),
        lambda piece: blobs.path(piece.digest).read_bytes(),
        lambda name: blobs.path(found.companions[name]).read_bytes(),
    )
    return b""


def weigh(home: str, table: str) -> bytes:
    """The domain mixture of the rows that may be read, exact and private, as JSON; their number.

    The tokenizer comes from the blobs of the manifest, so no submodel needs to be here.

    Raises:
        DataError, ConfigError: the data or the policy cannot be used; see `examples_of`.
        StoreError: the table, or a companion of the manifest, is not there.
    """
    place = Home(Path(home))
    assignment, blobs = assigned(place), Store(place.store_folder, quota_bytes=0)
    manifest = _manifest(blobs, assignment.manifest.digest)
    with TemporaryDirectory() as folder:
        for name, digest in manifest.companions.items():
            write_bytes(Path(folder) / name, blobs.path(digest).read_bytes())
        write_json(Path(folder) / "config.json", manifest.config)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    examples = examples_of(place, assignment, tokenizer).examples
    weights = mixture_of(load_table(blobs.path(table)), [example.tokens for example in examples])
    return json.dumps([weights, len(examples)]).encode()


def open_device(home: Home) -> Device:
    """This device, ready to answer training tasks: submodel, adapter layout, private examples.

    Raises:
        ConfigError: nothing is assigned, or the policy cannot be read.
        DataError: the data that the policy names cannot be used.
        CheckpointError: the submodel is not here, or damaged; fetch it again.
        LayoutMismatch: the adapter of the assignment does not fit this version of ProxyMoE.
    """
    assignment = assigned(home)
    dtype = compute_dtype(assignment.train.dtype)
    loaded = load(home.submodel(assignment.plan), dtype)
    adapter = assignment.adapter
    layout = adapter_layout(
        loaded.model, adapter.targets, adapter.rank, assignment.adapter_seed
    ).held_under(loaded.plan)
    if (loaded.plan.digest, layout.digest) != (assignment.plan, assignment.layout):
        raise LayoutMismatch(
            f"the adapter here has layout {layout.digest[:12]} on plan {loaded.plan.digest[:12]}, "
            f"assigned was {assignment.layout[:12]} on {assignment.plan[:12]}; update the older "
            "side of ProxyMoE, and join again"
        )
    examples = examples_of(home, assignment, loaded.tokenizer).examples
    return Device(assignment.device, loaded, layout, examples)


def examples_of(home: Home, assignment: Assignment, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """All rows that the policy lets us read, file by file, as the assignment wants them cut.

    Raises:
        DataError: no folder is allowed, a file cannot be read, or a row is of no known kind.
        ConfigError: the policy cannot be read.
    """
    rows = [row for path in readable_files(home.policy().data) for row in read_rows(path)]
    train = assignment.train
    return tokenise(rows, tokenizer, train.max_tokens, TooLong(train.too_long))


def _manifest(blobs: Store, digest: str) -> Manifest:
    """The manifest in a store. It may name files that we know, and no code."""
    try:
        manifest = Manifest.model_validate_json(blobs.path(digest).read_bytes())
    except ValidationError:
        raise ProtocolError(
            "manifest: of another version of ProxyMoE; update the older side"
        ) from None
    if unknown := sorted(manifest.companions.keys() - {*COMPANIONS, TABLES_FILE}):
        raise ProtocolError(f"manifest: names a file {unknown[0][:80]!r} that no submodel has")
    if "auto_map" in manifest.config:
        raise ProtocolError("manifest: its model wants code of its own; none is taken from outside")
    return manifest


JOBS: dict[str, Callable[..., bytes]] = {"build": build, "weigh": weigh}
