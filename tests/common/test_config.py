"""An experiment file is strict: what it says is what runs, and nonsense is named."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

import proxymoe.simulations.site as site
from proxymoe.common.config import DeviceSettings
from proxymoe.common.errors import ConfigError
from proxymoe.common.experiment import Experiment, load_experiment

MINIMAL = """
name = "trial"
[[devices]]
data = "clinc150"
names = ["home", "work"]
"""
SHIPPED = sorted((site.ASSETS.parent / "experiments").glob("*.toml"))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "trial.toml"
    path.write_text(MINIMAL)
    return path


def append(file, text):
    """Top-level keys go before the device table."""
    file.write_text(text + MINIMAL if "[" not in text else MINIMAL + text)
    return file


def test_a_minimal_file_has_the_defaults(file):
    found = load_experiment(file)
    assert found == Experiment(
        name="trial", devices=(DeviceSettings(data="clinc150", names=("home", "work")),)
    )
    assert found.base_model == "tiny-moe"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_experiment_loads_and_its_data_exists(path):
    experiment = load_experiment(path)
    assert site.virtual_devices(experiment.devices)
    assert site.asset(experiment.base_model).is_dir()
    for domain in experiment.evaluate.public_domains:
        assert (site.asset(experiment.calibration) / f"{domain}.jsonl").exists()


def test_there_are_shipped_experiments():
    assert "default" in {path.stem for path in SHIPPED}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("speed = 3\n", "speed: Extra inputs are not permitted"),
        ("[train]\nstep = 3\n", r"train\.step: Extra inputs"),
        ("[train]\nsteps = 0\n", r"train\.steps: .*greater than or equal to 1"),
        ("[train]\nlearning_rate = nan\n", r"train\.learning_rate"),
        ("[train]\nlearning_rate = inf\n", r"train\.learning_rate"),
        ('[train]\noptimizer = "adam"\n', r"train\.optimizer: .*'adamw' or 'sgd'"),
        ("[extract]\nkept_fraction = 1.5\n", r"extract\.kept_fraction: .*less than or equal to 1"),
        ("[extract]\nbudget_bytes = -1\n", r"extract\.budget_bytes"),
        ('[extract]\nmode = "luck"\n', r"extract\.mode: .*'drop'"),
        ("[extract]\nrotate = 1.5\n", r"extract\.rotate: .*less than or equal to 1"),
        ('[extract]\nrotate = 0.5\nmode = "mean"\n', "extract: .*only 'drop' .* can rotate"),
        ('[extract]\nrotate = 0.5\nrouter = "sliced"\n', "extract: .*only 'drop' .* can rotate"),
        (
            '[[compare.federated_modes]]\nmode = "mean"\nrotate = 0.5\n',
            r"compare\.federated_modes\.0: .*can rotate",
        ),
        (
            '[[compare.modes]]\nmode = "drop"\nrotate = 0.5\n',
            "compare: .*rotate-0.5 is for federated_modes",
        ),
        ('[adapter]\ntargets = ["router"]\n', r"adapter\.targets\.0"),
        ("[federation]\nclip_norm = 0\n", r"federation\.clip_norm: .*greater than 0"),
        ("[federation]\ncohort_size = 2\nfewest_holders = 3\n", "federation: .*no block would"),
        ("[federation]\nmomentum = 1.0\n", r"federation\.momentum: .*less than 1"),
        ("[[devices]]\ndata = 'x'\nnames = ['home']\n", "device names must be distinct"),
        ("[[devices]]\ndata = 'x'\nnames = []\n", r"devices\.1\.names"),
        ("seed = -1\n", "seed"),
        ("base_model = 3\n", "base_model"),
    ],
)
def test_an_unknown_key_or_bad_value_is_refused_by_its_path(file, text, named):
    with pytest.raises(ConfigError, match=rf"trial\.toml: .*{named}"):
        load_experiment(append(file, text))


def test_every_mistake_is_told_at_once(file):
    append(file, "[train]\nsteps = 0\nspeed = 1\n")
    with pytest.raises(ConfigError, match=r"train\.steps: .*; train\.speed: "):
        load_experiment(file)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("name = ", "not TOML"),
        ("", r"name: Field required; devices: Field required"),
        ('name = "A B"\n[[devices]]\ndata="x"\nnames=["a"]', "name: .*pattern"),
    ],
)
def test_a_file_that_is_no_experiment_is_refused(file, content, reason):
    file.write_text(content)
    with pytest.raises(ConfigError, match=reason):
        load_experiment(file)


def test_a_missing_file_and_one_in_another_encoding_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.toml: cannot be read \(No such file"):
        load_experiment(tmp_path / "gone.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"')
    with pytest.raises(ConfigError, match=r"latin\.toml: "):
        load_experiment(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=7", lambda e: e.train.steps == 7),
        ("train.learning_rate=1e-4", lambda e: e.train.learning_rate == 1e-4),
        ("extract.mode=mean", lambda e: e.extract.mode == "mean"),
        ('extract.mode="mean"', lambda e: e.extract.mode == "mean"),
        ("adapter.targets=['experts']", lambda e: e.adapter.targets == ("experts",)),
        ("evaluate.proxies=false", lambda e: e.evaluate.proxies is False),
        ("name=other", lambda e: e.name == "other"),
        (" seed =5", lambda e: e.seed == 5),
    ],
)
def test_an_override_replaces_one_value(file, override, value):
    assert value(load_experiment(file, (override,)))


def test_the_last_override_wins(file):
    assert load_experiment(file, ("seed=1", "seed=2")).seed == 2


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.steps", r"--set train\.steps: write section\.key=value"),
        ("train.step=7", r"train\.step: Extra inputs"),
        ("train.steps=many", r"train\.steps: .*valid integer"),
        ("name.first=x", "name is no section"),
        ("devices.data=x", "devices is no section"),
    ],
)
def test_a_bad_override_is_refused(file, override, reason):
    with pytest.raises(ConfigError, match=reason):
        load_experiment(file, (override,))


@given(st.integers(0, 3), st.integers(0, 3))
def test_settings_have_one_digest(one, other):
    devices = (DeviceSettings(data="x", names=("a",)),)
    first, second = (Experiment(name="x", devices=devices, seed=seed) for seed in (one, other))
    assert (first.digest == second.digest) == (first == second)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_resolved_experiment_validates_to_itself(path):
    experiment = load_experiment(path)
    assert Experiment.model_validate_json(experiment.model_dump_json()) == experiment
    assert tomllib.loads(path.read_text())["name"] == experiment.name
