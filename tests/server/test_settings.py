"""Settings are strict and read back as written; a run directory appears whole or not at all."""

import stat
import subprocess
import sys

import pytest

from proxymoe.common.certificates import check_device_certificate, sign_device, signing_request
from proxymoe.common.config import ExtractSettings, FederationSettings
from proxymoe.common.errors import ConfigError
from proxymoe.common.identity import new_device_key, verifying_key
from proxymoe.server.blobs import BlobLimits
from proxymoe.server.engine import Rules
from proxymoe.server.run_directory import RunDirectory
from proxymoe.server.settings import (
    BlobSettings,
    CoordinatorSettings,
    NetworkSettings,
    RuleSettings,
    SumSettings,
    load_settings,
    settings_text,
)
from tests.doors import NOW


def settings(**fields):
    return CoordinatorSettings(run="town", base_model="base", calibration="public", **fields)


CHANGED = settings(
    public_domains=('quo"te', "back\\slash", "del\x7fete", "ünï"),
    largest_budget_bytes=1 << 40,
    extract=ExtractSettings(mode="mean", budget_bytes=10**9),
    federation=FederationSettings(cohort_size=40, epsilon=3e-7),
    rules=RuleSettings(min_devices=8, quorum=0.9),
    network=NetworkSettings(names=("fleet.example.org", "::1"), plain_text=True),
    blobs=BlobSettings(bytes_per_second=1e6),
)


@pytest.mark.parametrize("written", [settings(), CHANGED], ids=["defaults", "changed"])
def test_settings_read_back_as_written(tmp_path, written):
    path = tmp_path / "coordinator.toml"
    path.write_text(settings_text(written), encoding="utf-8")
    assert load_settings(path) == written


def test_the_file_explains_every_setting_of_a_coordinator():
    text = settings_text(settings())
    for section in (NetworkSettings, RuleSettings, SumSettings, BlobSettings, CoordinatorSettings):
        for key, field in section.model_fields.items():
            if f"[{key}]" not in text:
                assert f"{key} = " in text
                assert (field.description or "nothing").split("\n")[0][:60] in text


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("run = ", "not TOML"),
        ("", "run: Field required; base_model: Field required"),
        ("sed = 1", "sed: unknown key"),
        ("[extract]\nrotate = 0.5", "extract.rotate is 0.5; .*: set it to 0"),
        ("[federation]\ncanary_every = 3", "canary_every is 3; .*: set it to 1"),
        (
            "[federation]\ncohort_size = 2\n[rules]\nmin_devices = 3",
            "cohort_size 2 is below rules.min_devices 3",
        ),
        ("[network]\nplain_text = true\nhost = '0.0.0.0'", "only loopback may do without TLS"),
        ("[network]\nnames = ['a b']", "'a b' is neither a host name nor an address"),
        ("[network]\nnames = []", "network.names"),
        ("[network]\ngateway_port = 9444", "must be distinct"),
        ("[network]\nblob_port = 0", "network.blob_port"),
        ("[rules]\nquorum = 0", "rules.quorum"),
        ("[rules]\nover_selection = 0.5", "rules.over_selection"),
        (
            "[sums]\nmasked = true\n[federation]\ncohort_size = 7",
            "cohort_size 7 is below sums.smallest_cohort 8; raise it, or set sums.masked to false",
        ),
        (
            "[sums]\nsmallest_class = 9\n[federation]\ncohort_size = 8",
            "cohort_size 8 is below sums.smallest_class 9; raise it, or set sums.masked to false",
        ),
        ("[privacy]\nmode = 'distributed'\nepsilon = 2.0", "privacy.mode distributed"),
        (
            "[sums]\nmasked = true\n[privacy]\nmode = 'central'\nepsilon = 2.0\nadaptive = true",
            "privacy.mode central",
        ),
        ("[sums]\nsmallest_class = 1", "sums.smallest_class"),
        ("[blobs]\nstreams = 0", "blobs.streams"),
        ("[train]\nlearning_rate = nan", "train.learning_rate"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path, text, refused):
    path = tmp_path / "coordinator.toml"
    required = "" if not text or "run" in text else "run='r'\nbase_model='b'\ncalibration='c'\n"
    path.write_text(required + text)
    with pytest.raises(ConfigError, match=f"{path}: .*{refused}"):
        load_settings(path)


def test_addresses_are_what_devices_connect_to():
    network = NetworkSettings(names=("::1", "fleet.example.org"), gateway_port=1, blob_port=2)
    assert (network.gateway_address, network.blob_address) == ("[::1]:1", "[::1]:2")
    assert NetworkSettings().gateway_address == "localhost:9443"


def test_rules_and_limits_are_those_of_engine_and_blob_service():
    assert Rules(**dict(RuleSettings())) == Rules()
    assert BlobSettings().limits() == BlobLimits()
    assert BlobSettings(streams=3).limits() == BlobLimits(streams=3)


def test_reading_settings_does_not_import_torch():
    code = "import sys, proxymoe.server.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_directory_has_working_keys_that_nobody_else_can_read(tmp_path):
    run = RunDirectory.create(tmp_path / "run", settings(), NOW)
    assert run.settings == settings()
    request = signing_request("phone", new_device_key())
    certificate = sign_device(run.authority, "phone", request, NOW)
    check_device_certificate(certificate.certificate, run.ca_certificate.read_bytes(), NOW)
    assert len(verifying_key(run.signing_key)) == 64
    assert len(run.superexec_secret.read_bytes()) == 64
    assert b"CERTIFICATE" in run.server_certificate.read_bytes()
    assert stat.S_IMODE(run.keys.stat().st_mode) == 0o700
    assert len(list(run.keys.iterdir())) == 6
    for file in run.keys.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert run.flower.is_dir()
    assert run.cache.is_dir()
    assert run.log.is_dir()


def test_an_empty_folder_becomes_a_run_directory_and_any_other_does_not(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    run = RunDirectory.create(empty, settings(), NOW)
    key = run.signing_key
    with pytest.raises(ConfigError, match="not an empty folder; make the run directory elsewhere"):
        RunDirectory.create(empty, settings(), NOW)
    assert run.signing_key == key
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="not an empty folder"):
        RunDirectory.create(tmp_path / "file", settings(), NOW)


def test_an_init_that_was_killed_can_be_repeated(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("proxymoe.server.run_directory.settings_text", killed)
        with pytest.raises(KeyboardInterrupt):
            RunDirectory.create(tmp_path / "run", settings(), NOW)
    assert not (tmp_path / "run").exists()
    assert RunDirectory.create(tmp_path / "run", settings(), NOW).settings == settings()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_folders_are_taken_from_the_run_directory_unless_absolute(tmp_path):
    (tmp_path / "run" / "base").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    run = RunDirectory(tmp_path / "run")
    fields = settings().model_dump() | {"calibration": tmp_path / "elsewhere"}
    run.settings_file.write_text(settings_text(CoordinatorSettings(**fields)))
    assert run.base_model == tmp_path / "run" / "base"
    assert run.calibration == tmp_path / "elsewhere"


def test_what_is_missing_is_named_with_what_to_do(tmp_path):
    run = RunDirectory(tmp_path)
    with pytest.raises(ConfigError, match="make a run directory with `proxymoe-coordinator init`"):
        _ = run.settings
    with pytest.raises(ConfigError, match=r"signing\.key: cannot be read .*restore it"):
        _ = run.signing_key
    with pytest.raises(ConfigError, match=r"ca\.pem"):
        _ = run.authority
    run.settings_file.write_text(settings_text(settings()))
    with pytest.raises(ConfigError, match="base_model base: no such folder"):
        _ = run.base_model


def test_the_store_is_this_runs(tmp_path):
    run = RunDirectory.create(tmp_path / "run", settings(), NOW)
    run.store(12).close()
    assert (run.path / "state.db").exists()
    with pytest.raises(ConfigError, match="size"):
        run.store(13)


@pytest.mark.parametrize(
    ("fields", "masked", "fewest"),
    [
        ({}, False, 1),
        ({"rules": {"min_devices": 7}}, False, 7),
        ({"rules": {"min_devices": 8}}, True, 8),
        ({"federation": {"cohort_size": 8}}, True, 8),
        ({"federation": {"cohort_size": 8}, "sums": {"masked": False}}, False, 1),
        ({"federation": {"cohort_size": 8}, "sums": {"smallest_cohort": 9}}, False, 1),
        ({"sums": {"masked": True, "smallest_cohort": 3}}, True, 3),
        ({"rules": {"min_devices": 9}, "privacy": {"mode": "local", "epsilon": 2.0}}, True, 9),
    ],
)
def test_sums_are_masked_where_rounds_are_large_enough(fields, masked, fewest):
    found = CoordinatorSettings.model_validate(
        {"run": "town", "base_model": "base", "calibration": "public", **fields}
    )
    assert found.masked is masked
    assert found.round_rules.min_devices == fewest
