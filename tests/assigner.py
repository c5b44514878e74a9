"""A coordinator's blob service on loopback that also assigns plans; nothing here is a mock."""

import contextlib
import time
from pathlib import Path

import grpc

from proxymoe.client.home import EnrolmentRecord, Home
from proxymoe.client.policy import Coordinator, Data, Policy, Privacy, Resources, When, policy_text
from proxymoe.common.adapter import adapter_layout
from proxymoe.common.assignment import (
    APPLY,
    Assignment,
    Blob,
    issue_assignment,
    parse_application,
)
from proxymoe.common.certificates import (
    new_authority,
    new_server_certificate,
    sign_device,
    signing_request,
)
from proxymoe.common.config import AdapterSettings, TrainSettings
from proxymoe.common.files import digest_of
from proxymoe.common.identity import (
    new_device_key,
    new_signing_key,
    ssh_private_key,
    verifying_key,
)
from proxymoe.common.plan import LayerPlan, Plan
from proxymoe.server.base import BaseCheckpoint
from proxymoe.server.blobs import BlobLimits, BlobPlace, BlobService, serve_blobs

SEED = 5
ADAPTER = AdapterSettings(rank=4)
TRAIN = TrainSettings(dtype="float32", max_tokens=48, steps=3, batch_size=2)
SIGNING = new_signing_key()
PUBLIC_KEY = verifying_key(SIGNING)
AUTHORITY = new_authority(time.time())
SERVER = new_server_certificate(AUTHORITY, ["127.0.0.1"], time.time())


def easy_policy(data: Path | None = None, **sections) -> Policy:
    """A policy under which a busy test machine may be used; `sections` take the place of its."""
    proper = {
        "coordinator": Coordinator(public_key=PUBLIC_KEY),
        "data": Data(folder=data, pattern="**/train.jsonl"),
        "resources": Resources(spare_memory_mb=0, spare_disk_mb=0),
        "when": When(
            largest_load=1000.0,
            only_charging=False,
            battery_floor_percent=0,
            only_unmetered=False,
        ),
        "privacy": Privacy(smallest_cohort=2, mixture_may_leave=True),
    }
    return Policy(**{**proper, **sections})


def set_policy(home: Home, policy: Policy) -> None:
    """Makes this the policy of a home."""
    home.write_private(home.policy_file, policy_text(policy).encode())


def enrolled_home(path: Path, policy: Policy, port: int = 1, device: str = "kitchen") -> Home:
    """The home of a device that was enrolled, with real keys and certificates."""
    home, key, now = Home.create(path), new_device_key(), time.time()
    certificate = sign_device(AUTHORITY, device, signing_request(device, key), now).certificate
    for target, content in (
        (home.key, key),
        (home.ssh_key, ssh_private_key(key)),
        (home.certificate, certificate),
        (home.authority, AUTHORITY.certificate),
    ):
        home.write_private(target, content)
    set_policy(home, policy)
    blobs = f"127.0.0.1:{port}"
    record = EnrolmentRecord(
        device=device, coordinator="127.0.0.1:9", blobs=blobs, public_key=PUBLIC_KEY
    )
    home.keep_enrolment(record)
    return home


class Assigner:
    """Assigns plans on one base model, and serves their blobs out of its files."""

    def __init__(self, base: BaseCheckpoint, folder: Path) -> None:
        self.base = base
        self.layout = adapter_layout(base.skeleton, ADAPTER.targets, ADAPTER.rank, SEED)
        self.places: dict[str, BlobPlace] = {}
        self.fetched: list[str] = []
        """Digests that were asked for, in order."""
        self.applications: list[object] = []
        self.failing: list[tuple[grpc.StatusCode, str]] = []
        """With what the next applications fail."""
        self.port = 0
        self._folder = folder
        self._answer = b""
        ranges = base.checkpoint.ranges
        for piece in base.pieces:
            place = ranges[piece.source]
            path = base.folder / place.file
            self.places[piece.digest] = BlobPlace(path, place.offset, place.num_bytes)

    def plan(self, *kept: int) -> Plan:
        """The plan that keeps these experts in every layer."""
        layers = {
            at: LayerPlan(num_experts=count, kept=kept)
            for at, count in self.base.num_experts.items()
        }
        return Plan(base=self.base.digest, layers=layers)

    def add(self, content: bytes) -> Blob:
        """Serves these bytes, too."""
        path = self._folder / digest_of(content)
        path.write_bytes(content)
        self.places[path.name] = BlobPlace(path, 0, len(content))
        return Blob(digest=path.name, num_bytes=len(content))

    def assign(self, *kept: int, device: str = "kitchen", **changes) -> Assignment:
        """From now on, the answer to every application: the submodel with these experts."""
        plan = self.plan(*kept)
        manifest = self.base.manifest(plan)
        companions = {}
        for name in manifest.companions:
            blob = self.add((self.base.folder / name).read_bytes())
            companions[blob.digest] = blob.num_bytes
        proper = {
            "run": "run",
            "device": device,
            "base": self.base.digest,
            "plan": plan.digest,
            "layout": self.layout.held_under(plan).digest,
            "adapter": ADAPTER,
            "adapter_seed": SEED,
            "manifest": self.add(manifest.model_dump_json().encode()),
            "companions": companions,
            "model_bytes": manifest.num_bytes,
            "memory_bytes": 50_000_000,
            "train": TRAIN,
            "clip_norm": 10.0,
            "cohort_size": 2,
            "rounds": 2,
        }
        assignment = Assignment(**{**proper, **changes})
        self._answer = issue_assignment(assignment, SIGNING)
        return assignment

    @contextlib.contextmanager
    def serving(self, identity=SERVER):
        """Serves on a free port of loopback while the block runs."""
        service = BlobService(self.places, self._allowed, BlobLimits(chunk_bytes=16 << 10))
        files = identity.certificate, identity.key, AUTHORITY.certificate
        server, self.port = serve_blobs(service, "127.0.0.1:0", *files)
        method = grpc.unary_unary_rpc_method_handler(self._apply)
        package, _, name = APPLY.strip("/").rpartition("/")
        handler = grpc.method_handlers_generic_handler(package, {name: method})
        server.add_generic_rpc_handlers((handler,))
        try:
            yield self
        finally:
            server.stop(None).wait()

    def _apply(self, content, context):
        self.applications.append(parse_application(content))
        if self.failing:
            context.abort(*self.failing.pop(0))
        return self._answer

    def _allowed(self, device, digest):
        self.fetched.append(digest)
        return device == "kitchen"
