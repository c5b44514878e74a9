"""The home of a device: enrolled, and with its proxy submodel in place."""

import json

from proxymoe.client.home import EnrolmentRecord, Home
from proxymoe.client.policy import Policy, policy_text
from proxymoe.common.adapter import adapter_layout
from proxymoe.common.assignment import Assignment, Blob, issue_assignment
from proxymoe.common.config import AdapterSettings, TrainSettings
from proxymoe.common.files import digest_of, write_json
from proxymoe.common.identity import new_device_key, new_signing_key, ssh_private_key, verifying_key

SIGNING_KEY = new_signing_key()
NOWHERE = "127.0.0.1:9"
"""Where nobody listens."""
SEED = 3


def enrolled(folder, coordinator=NOWHERE, rows=24, **sections):
    """A home whose policy opens every gate and names a folder with so many rows."""
    folder.mkdir(exist_ok=True)
    home = Home.create(folder / "home")
    key = new_device_key()
    home.write_private(home.key, key)
    home.write_private(home.ssh_key, ssh_private_key(key))
    home.write_private(home.authority, b"")
    data = folder / "data"
    data.mkdir(exist_ok=True)
    sums = [{"prompt": f"{i % 6}+1=", "completion": f"{i % 6 + 1}"} for i in range(rows)]
    (data / "rows.jsonl").write_text("\n".join(map(json.dumps, sums)))
    write_policy(home, data={"folder": data}, **sections)
    public_key = verifying_key(SIGNING_KEY)
    home.keep_enrolment(
        EnrolmentRecord(
            device="phone", coordinator=coordinator, blobs=coordinator, public_key=public_key
        )
    )
    return home


def write_policy(home, **sections):
    """A policy that trusts the coordinator and finds every gate open, but for what is named."""
    given = {
        "coordinator": {"public_key": verifying_key(SIGNING_KEY)},
        "resources": {"spare_memory_mb": 0, "spare_disk_mb": 0},
        "when": {"largest_load": 1e3, "only_charging": False, "only_unmetered": False},
        "privacy": {"smallest_cohort": 1},
    }
    policy = Policy.model_validate({**given, **sections})
    home.policy_file.write_text(policy_text(policy))


def settle(home, base, **changes):
    """Assigns a tiny submodel to the device and puts it in place; the assignment."""
    plan = base.base.keep_all()
    layout = adapter_layout(base.full.model, ("attention", "shared"), 4, SEED).held_under(plan)
    assignment = Assignment(
        run="run",
        device="phone",
        base=plan.base,
        plan=plan.digest,
        layout=layout.digest,
        adapter=AdapterSettings(rank=4),
        adapter_seed=SEED,
        manifest=Blob(digest="0" * 64, num_bytes=1),
        model_bytes=10**6,
        memory_bytes=10**7,
        train=TrainSettings(steps=4, batch_size=4, max_tokens=64, dtype="float32"),
        clip_norm=1.0,
        cohort_size=1,
        rounds=2,
    ).model_copy(update=changes)
    home.keep_assignment(issue_assignment(assignment, SIGNING_KEY))
    folder = base.base.materialise(plan, home.submodel(plan.digest))
    digests = {path.name: digest_of(path.read_bytes()) for path in folder.iterdir()}
    write_json(folder / "contents.json", digests)
    return assignment
