"""The device disposes: what a policy says is what holds, and every objection names its cure."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxymoe.client.policy import (
    Coordinator,
    Data,
    Policy,
    Privacy,
    Request,
    Resources,
    Training,
    Usage,
    When,
    judge,
    load_policy,
    nearest_key,
    parse_policy,
    policy_text,
)
from proxymoe.common.errors import ConfigError

KEY = "ab" * 32
OPEN = Policy(
    coordinator=Coordinator(public_key=KEY),
    data=Data(folder=Path("/data")),
    privacy=Privacy(mixture_may_leave=True),
)
MODEST = {
    "network_bytes": 2_000_000_000,
    "memory_bytes": 2_000_000_000,
    "disk_bytes": 5_000_000_000,
    "seconds": 7200.0,
    "rank": 64,
    "steps": 200,
    "cohort_size": 8,
    "clip_norm": 30.0,
    "epsilon": 8.0,
    "delta": 1e-5,
    "mixture": True,
}
"""As much as the default policy allows."""
AMOUNTS = st.floats(allow_nan=False, allow_infinity=False, min_value=0)
COUNTS = st.integers(0, 10**12)
policies = st.builds(
    Policy,
    coordinator=st.builds(
        Coordinator, public_key=st.none() | st.text("0123456789abcdef", min_size=64, max_size=64)
    ),
    data=st.builds(
        Data,
        folder=st.none() | st.text(min_size=1).map(lambda name: Path("/", name)),
        pattern=st.sampled_from(["*.jsonl", "**/*", 'a"\\b*.json', "ü\t\x7f?"]),
    ),
    resources=st.builds(Resources, memory_mb=COUNTS, disk_mb=COUNTS, seconds_per_day=COUNTS),
    when=st.builds(
        When,
        window=st.sampled_from(["22:00-06:00", "00:00-24:00", "09:30-09:31"]),
        largest_load=AMOUNTS.filter(bool),
        only_charging=st.booleans(),
    ),
    privacy=st.builds(Privacy, largest_epsilon=AMOUNTS, noise_required=st.booleans()),
    training=st.builds(Training, largest_rank=st.integers(1, 10**6)),
)


def keys(policy, **asked):
    return {objection.key for objection in judge(policy, Request(**{"coordinator": KEY, **asked}))}


@given(policies)
def test_the_file_of_a_policy_gives_the_same_policy_back(policy):
    assert parse_policy(policy_text(policy)) == policy


def test_the_file_of_the_default_policy_explains_every_key():
    text = policy_text(Policy())
    assert parse_policy(text) == parse_policy("") == Policy()
    lines = text.splitlines()
    for name, section in Policy():
        assert f"[{name}]" in lines
        for key in type(section).model_fields:
            (at,) = (i for i, line in enumerate(lines) if line.lstrip("# ").startswith(f"{key} = "))
            assert lines[at - 1].startswith("# "), key
    assert max(map(len, lines)) <= 100


def test_a_default_policy_trusts_nobody_reads_nothing_and_tells_nothing():
    assert keys(Policy(), steps=1, cohort_size=8, clip_norm=1.0) == {
        "coordinator.public_key",
        "data.folder",
    }
    assert keys(Policy(), mixture=True, epsilon=1.0, delta=1e-5) == {
        "coordinator.public_key",
        "data.folder",
        "privacy.mixture_may_leave",
    }


def test_what_stays_within_the_limits_is_allowed_exactly_up_to_them():
    assert keys(OPEN, **MODEST) == set()
    assert keys(OPEN) == set()


@pytest.mark.parametrize(
    ("asked", "key", "words"),
    [
        (
            {"coordinator": "cd" * 32},
            "coordinator.public_key",
            "by cdcdcdcdcdcdcdcd…, allowed: abab",
        ),
        (
            {"memory_bytes": 2_000_000_001},
            "resources.memory_mb",
            "2,000.000001 MB, allowed: up to 2",
        ),
        ({"memory_bytes": -1}, "resources.memory_mb", "asked: -0.000001 MB"),
        ({"disk_bytes": 10**400}, "resources.disk_mb", "allowed: up to 5,000 MB"),
        ({"network_bytes": 10**10}, "resources.network_mb_per_month", "asked: 10,000 MB, allowed"),
        ({"seconds": 7200.5}, "resources.seconds_per_day", "7,200.5 s, allowed: up to 7,200 s"),
        ({"seconds": math.nan}, "resources.seconds_per_day", "nan s"),
        ({"rank": 65}, "training.largest_rank", "rank 65, allowed: up to rank 64"),
        ({"steps": 1000}, "training.largest_steps", "1,000 steps, allowed: up to 200 steps"),
        ({"steps": -1}, "training.largest_steps", "asked: -1 steps"),
        ({"cohort_size": 7}, "privacy.smallest_cohort", "a cohort of 7, allowed: at least"),
        ({"clip_norm": 31.0}, "privacy.largest_clip_norm", "clip norm 31, allowed: up to"),
        ({"clip_norm": math.inf}, "privacy.largest_clip_norm", "clip norm inf"),
        ({"clip_norm": math.nan}, "privacy.largest_clip_norm", "clip norm nan"),
        ({"clip_norm": 0.001}, "privacy.smallest_clip_norm", "0.001, allowed: at least clip"),
        ({"epsilon": 8.5}, "privacy.largest_epsilon", "epsilon 8.5, allowed: up to epsilon 8"),
        ({"epsilon": math.nan}, "privacy.largest_epsilon", "epsilon nan"),
        ({"delta": 0.5}, "privacy.largest_delta", "delta 0.5, allowed: up to delta 1e-05"),
    ],
)
def test_every_demand_beyond_the_policy_is_refused_with_value_limit_and_key(asked, key, words):
    (objection,) = judge(OPEN, Request(**{"coordinator": KEY, **MODEST, **asked}))
    assert objection.key == key
    assert words in str(objection)
    assert str(objection).endswith(f"to allow it, change {key}")


def test_an_update_is_refused_unless_cohort_and_clip_norm_are_promised():
    assert keys(OPEN, steps=1) == {"privacy.smallest_cohort", "privacy.largest_clip_norm"}


def test_a_mixture_without_noise_is_refused_whatever_the_policy():
    assert keys(OPEN, mixture=True) == {"privacy.largest_epsilon", "privacy.largest_delta"}


def test_updates_may_be_sent_without_noise_unless_the_owner_wants_it():
    promised = {"steps": 1, "cohort_size": 8, "clip_norm": 1.0}
    strict = OPEN.model_copy(update={"privacy": Privacy(noise_required=True)})
    assert keys(OPEN, **promised) == set()
    assert keys(strict, **promised) == {"privacy.noise_required"}
    assert keys(strict, **promised, epsilon=1.0, delta=1e-6) == set()


@pytest.mark.parametrize(
    ("used", "asked", "key", "words"),
    [
        (Usage(network_bytes=1), MODEST, "resources.network_mb_per_month", "after 0.000001 MB"),
        (Usage(seconds=0.5), MODEST, "resources.seconds_per_day", "7,200 s after 0.5 s"),
        (Usage(epsilon=0.25), MODEST, "privacy.largest_epsilon", "epsilon 8 after epsilon 0.25"),
    ],
)
def test_budgets_are_for_everything_together(used, asked, key, words):
    (objection,) = judge(OPEN, Request(coordinator=KEY, **asked), used)
    assert objection.key == key
    assert words in objection.asked


@given(
    asked=st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(("network_bytes", "memory_bytes", "disk_bytes"), st.integers()),
            **dict.fromkeys(("rank", "steps", "cohort_size"), st.integers()),
            **dict.fromkeys(("seconds", "clip_norm", "epsilon", "delta"), st.floats()),
            "mixture": st.booleans(),
        },
    ),
    policy=policies,
)
def test_a_larger_policy_never_objects_more_and_nothing_asked_makes_judging_fail(asked, policy):
    before = keys(policy, **asked)
    wider = policy.model_copy(
        update={
            "training": Training(largest_rank=10**9, largest_steps=10**9),
            "privacy": policy.privacy.model_copy(update={"smallest_cohort": 1}),
        }
    )
    assert keys(wider, **asked) <= before
    assert "coordinator.public_key" in before or policy.coordinator.public_key == KEY


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[training]\nlargest_step = 3", "training.largest_step: unknown key; the nearest is "),
        ("[training]\nsteps = 3", r"training.steps: unknown key; .* training.largest_steps"),
        ("memory_mb = 3", r"memory_mb: unknown key; the nearest is resources.memory_mb"),
        ("[privacy]\nepsilon = 3", r"the nearest is privacy.largest_epsilon"),
        ("[privacy]\nlargest_epsilon = inf", "privacy.largest_epsilon: .*finite"),
        ("[privacy]\nsmallest_cohort = 0", "privacy.smallest_cohort: .*greater than or equal to 1"),
        ("[privacy]\nsmallest_cohort = 2.5", "privacy.smallest_cohort: "),
        ("[privacy]\nmixture_may_leave = 1", "privacy.mixture_may_leave: .*boolean"),
        ("[resources]\nmemory_mb = '2 GB'", "resources.memory_mb: .*integer"),
        ("[when]\nwindow = '22-06'", 'when.window: a window is written like "22:00-06:00"'),
        ("[when]\nwindow = '06:00-06:00'", "when.window: .*the whole day"),
        ("[when]\nwindow = '24:00-06:00'", "when.window"),
        ("[when]\nwindow = '22:00-24:30'", "when.window"),
        ("[when]\nwindow = 7", "when.window"),
        ("[when]\nbattery_floor_percent = 101", "when.battery_floor_percent: "),
        ("[data]\nfolder = '~/private'", "data.folder: .*absolute path, without ~"),
        ("[data]\nfolder = 3", "data.folder"),
        ("[data]\npattern = '../*'", "data.pattern: a file pattern within the folder"),
        ("[data]\npattern = '/etc/*'", "data.pattern"),
        ("[data]\npattern = ''", "data.pattern"),
        ("[data]\nfolder = ''", "data.folder"),
        ("[coordinator]\npublic_key = 'AB'", "coordinator.public_key: "),
        ("data = 3", "data: "),
        ("[data", "not TOML"),
    ],
)
def test_a_policy_that_says_something_else_is_refused_by_name(text, reason):
    with pytest.raises(ConfigError, match=reason):
        parse_policy(text)


def test_every_mistake_in_a_policy_is_told_at_once_and_with_the_file(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text("[when]\nlargest_load = -1\nidle = true\n")
    with pytest.raises(ConfigError, match=r"policy\.toml: when\.largest_load: .*; when\.idle: "):
        load_policy(path)


def test_a_policy_file_is_read_and_frozen(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(policy_text(OPEN), encoding="utf-8")
    policy = load_policy(path)
    assert policy == OPEN
    with pytest.raises(ValueError, match="frozen"):
        policy.privacy.largest_epsilon = 99.0  # type: ignore[misc]


def test_a_policy_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.toml: cannot be read \(No such file"):
        load_policy(tmp_path / "gone.toml")
    (tmp_path / "latin.toml").write_bytes(b'[data]\nfolder = "/caf\xe9"')
    with pytest.raises(ConfigError, match=r"latin\.toml: "):
        load_policy(tmp_path / "latin.toml")


@given(st.sampled_from([f"{name}.{key}" for name, section in Policy() for key, _ in section]))
def test_a_known_key_is_nearest_to_itself(key):
    assert nearest_key(key) == key
