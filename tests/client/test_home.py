import stat
import subprocess
import sys
import threading
from datetime import UTC, datetime

import pytest

from proxymoe.client.entries import Entry, Kind
from proxymoe.client.home import DAYS_KEPT, OURS, EnrolmentRecord, Home, ReleasedMixture
from proxymoe.client.policy import Coordinator, Policy, Resources, policy_text
from proxymoe.common.assignment import Assignment, Blob, issue_assignment
from proxymoe.common.config import AdapterSettings, TrainSettings
from proxymoe.common.errors import ConfigError, IntegrityError, ProtocolError
from proxymoe.common.identity import new_signing_key, verifying_key

SIGNING = new_signing_key()
RECORD = EnrolmentRecord(
    device="phone",
    coordinator="127.0.0.1:9443",
    blobs="127.0.0.1:9444",
    public_key=verifying_key(SIGNING),
)
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()
DAY = 86_400.0


def assigned(**changes) -> bytes:
    proper = {
        "run": "run",
        "device": "phone",
        "base": "a" * 64,
        "plan": "b" * 64,
        "layout": "c" * 64,
        "adapter": AdapterSettings(),
        "adapter_seed": 0,
        "manifest": Blob(digest="d" * 64, num_bytes=10),
        "model_bytes": 1000,
        "memory_bytes": 5000,
        "train": TrainSettings(),
        "clip_norm": 1.0,
        "cohort_size": 4,
        "rounds": 2,
    }
    return issue_assignment(Assignment(**{**proper, **changes}), SIGNING)


@pytest.fixture
def home(tmp_path):
    home = Home.create(tmp_path / "home")
    home.keep_enrolment(RECORD)
    policy = Policy(coordinator=Coordinator(public_key=RECORD.public_key))
    home.write_private(home.policy_file, policy_text(policy).encode())
    return home


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_only_the_owner_may_look_into_a_home(home):
    assert {mode(path) for path in (home.path, home.identity, home.log)} == {0o700}
    home.write_private(home.key, b"secret")
    assert mode(home.key) == mode(home.ledger_file) == mode(home.enrolment_file) == 0o600


def test_an_open_folder_is_closed_and_made_a_home_once(tmp_path):
    tmp_path.chmod(0o755)
    Home.create(tmp_path).ledger().write(
        Entry(kind=Kind.REQUEST, receiver="c", num_bytes=1, digest="0" * 64)
    )
    assert mode(tmp_path) == 0o700
    assert Home.create(tmp_path).ledger().totals().num_entries == 1


def test_a_folder_with_other_things_is_no_home(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"not the home of a device, and not empty \(thesis.txt"):
        Home.create(tmp_path)
    with pytest.raises(ConfigError, match="nothing was removed"):
        Home(tmp_path).wipe()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ConfigError, match="a file"):
        Home.create(tmp_path / "thesis.txt")


def test_an_owner_may_write_the_policy_first(tmp_path):
    (tmp_path / "policy.toml").write_text("[resources]\ndisk_mb = 7\n")
    assert Home.create(tmp_path).policy().resources.disk_mb == 7


def test_a_ledger_that_went_missing_is_not_made_anew(home):
    home.ledger_file.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        home.ledger()
    with pytest.raises(ConfigError, match="wipe what is left"):
        Home.create(home.path)


def test_before_enrolment_nothing_is_known(tmp_path):
    home = Home.create(tmp_path)
    assert [home.enrolment(), home.assignment(), home.mixture()] == [None] * 3
    for ask in (home.enrolled, home.policy):
        with pytest.raises(ConfigError):
            ask()


def test_what_is_kept_is_read_back(home):
    assert Home(home.path).enrolment() == RECORD
    kept = home.keep_assignment(assigned())
    assert Home(home.path).assignment() == kept
    mixture = ReleasedMixture(table="0" * 64, mixture={"a": 0.1, "b": 0.9}, epsilon=1.0, delta=1e-5)
    home.keep_mixture(mixture)
    assert home.mixture() == mixture


@pytest.mark.parametrize("content", [b"", b"{}", b'{"device": "../x"}', b"\xff"])
def test_a_damaged_record_is_named(home, content):
    home.enrolment_file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"enrolment.json: damaged"):
        home.enrolment()


def test_an_assignment_is_the_coordinators_and_ours(home):
    home.keep_assignment(assigned())
    content = home.assignment_file.read_bytes()
    for bad in (content[:-1], content[1:], assigned(device="tablet")):
        with pytest.raises(ProtocolError):
            home.keep_assignment(bad)
    assert home.assignment_file.read_bytes() == content
    home.assignment_file.write_bytes(content.replace(b"run", b"nur"))
    with pytest.raises(ProtocolError, match="not signed"):
        home.assignment()


def test_training_time_is_counted_by_day_and_bytes_by_month(home):
    home.add_seconds(10.0, NOON)
    home.add_seconds(5.0, NOON + 60)
    home.add_seconds(1.0, NOON + DAY)
    assert home.usage(NOON).seconds == 15.0
    assert home.usage(NOON + DAY).seconds == 1.0
    assert home.usage(NOON + 2 * DAY).seconds == 0.0
    entry = Entry(
        kind=Kind.REQUEST,
        receiver="c",
        num_bytes=3,
        digest="0" * 64,
        fetched_bytes=40,
        epsilon=0.5,
        delta=1e-6,
    )
    number = home.ledger().write(entry)
    now = home.ledger().newest()[0].time.timestamp()
    assert number
    assert (home.usage(now).network_bytes, home.usage(now).epsilon) == (43, 0.5)
    later = home.usage(now + 40 * DAY)
    assert (later.network_bytes, later.epsilon) == (0, 0.5)


def test_a_clock_that_jumps_forgets_no_day_that_counts(home):
    for day in (0, 400, 0, -400, 0):
        home.add_seconds(1.0, NOON + day * DAY)
    assert home.usage(NOON).seconds == 3.0
    for day in range(1, 3 * DAYS_KEPT):
        home.add_seconds(1.0, NOON + day * DAY)
    assert home.usage(NOON + day * DAY).seconds == 1.0
    assert home.usage(NOON).seconds == 0.0


def test_several_may_count_at_once(home):
    threads = [
        threading.Thread(target=lambda: [home.add_seconds(1.0, NOON) for _ in range(5)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert home.usage(NOON).seconds == 20.0


def test_the_largest_peak_is_kept_until_the_plan_changes(home):
    home.keep_assignment(assigned())
    home.submodel("b" * 64).mkdir(parents=True)
    for peak in (5, 9, 7):
        home.note_peak(peak)
    home.keep_assignment(assigned(rounds=3))
    assert home.peak() == 9
    home.keep_assignment(assigned(plan="e" * 64))
    assert home.peak() == 0


def test_the_store_has_what_the_policy_leaves_of_the_disk(home):
    policy = Policy(resources=Resources(disk_mb=1))
    home.write_private(home.policy_file, policy_text(policy).encode())
    folder = home.submodel("b" * 64)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(300_000))
    assert home.store().quota_bytes == 700_000
    assert home.store(reserved_bytes=600_000).quota_bytes == 100_000
    assert home.store(reserved_bytes=10**9).quota_bytes == 0


def test_a_home_has_one_client_at_a_time(home):
    with home.alone(), home.alone():
        with pytest.raises(ConfigError, match="a second client"):
            Home(home.path).alone().__enter__()
        with pytest.raises(ConfigError, match="a second client"):
            Home(home.path).wipe()
    with Home(home.path).alone():
        pass


def test_another_process_is_a_second_client_too_and_a_dead_one_is_none(home):
    hold = (
        "import sys, time; from pathlib import Path; from proxymoe.client.home import Home\n"
        "with Home(Path(sys.argv[1])).alone(): print('here', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", hold, str(home.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"here\n"
        with pytest.raises(ConfigError, match="a second client"), home.alone():
            pass
        other.kill()
    with home.alone():
        pass


def test_wipe_removes_all_that_is_ours_and_nothing_else(home):
    for name in OURS:
        path = home.path / name
        if name in ("store", "submodels"):
            path.mkdir()
    (home.store_folder / "blob").write_bytes(b"weights")
    home.wipe()
    assert not home.path.exists()


def test_wipe_leaves_what_others_put_there_and_follows_no_link(home, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "diary.jsonl").write_text("private")
    home.adapters.rmdir()
    home.adapters.symlink_to(data)
    (home.path / "notes.txt").write_text("mine")
    home.wipe()
    assert [path.name for path in home.path.iterdir()] == ["notes.txt"]
    assert (data / "diary.jsonl").exists()


def test_a_wipe_that_was_cut_short_is_asked_for_again(home, monkeypatch):
    seen = []

    def cut_short(path):
        seen.append(path)
        raise OSError("power")

    home.write_private(home.key, b"secret")
    with monkeypatch.context() as patch:
        patch.setattr("proxymoe.client.home.sync_folder", cut_short)
        with pytest.raises(OSError, match="power"):
            home.wipe()
    assert not home.key.exists()  # keys go first
    assert home.ledger_file.exists()
    home.wipe()
    assert not home.path.exists()


def test_processes_that_only_watch_import_no_model_code():
    code = """if True:
        import sys
        import proxymoe.client.guard, proxymoe.client.home
        assert not {"torch", "transformers", "grpc", "httpx", "flwr"} & set(sys.modules)
        import proxymoe.client.enrol, proxymoe.client.proxy
        assert not {"torch", "transformers", "flwr"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)
