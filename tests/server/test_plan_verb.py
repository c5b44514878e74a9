"""`proxymoe-coordinator plan`: sizes are read, plans explained, and proved by running them."""

import json

import pytest
from typer.testing import CliRunner

from proxymoe.common.errors import ConfigError
from proxymoe.server import plan_verb
from proxymoe.server.cli import app
from proxymoe.server.plan_verb import parse_mixture, parse_size
from proxymoe.server.run_directory import RunDirectory
from tests.doors import NOW
from tests.server.test_planner import settings_like
from tests.worlds import tiny_site


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    site, _ = tiny_site(root)
    return RunDirectory.create(root / "run", settings_like(site.experiment), NOW)


@pytest.fixture
def call(run):
    def invoke(*options):
        result = CliRunner().invoke(app, ["plan", str(run.path), *options])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result.exit_code, result.output

    return invoke


@pytest.mark.parametrize(
    ("text", "size"),
    [("900MB", 900 * 10**6), ("1.5GiB", 3 << 29), ("2 gb", 2 * 10**9), ("4096", 4096)],
)
def test_a_size_is_read_in_decimal_and_binary_units(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "many", "-5MB", "0", "3 apples", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match=r"no size; write it as 900MB, 1\.5GiB or in bytes"):
        parse_size(text)


def test_a_mixture_has_a_weight_for_each_domain():
    assert parse_mixture(["math=3", "code"], {"math", "code"}) == {"math": 3.0, "code": 1.0}


@pytest.mark.parametrize("part", ["poetry", "math=-1", "math=x", "math=inf", "math=nan"])
def test_what_is_no_part_of_a_mixture_is_refused(part):
    with pytest.raises(ConfigError, match=r"NAME=WEIGHT.*domains are \['math'\]"):
        parse_mixture([part], {"math"})


def test_a_plan_is_explained_to_people_and_to_programs(call):
    code, said = call("--explain", "--budget", "1GB", "--domain", "math")
    assert code == 0, said
    for words in ("16 of 16 experts (bf16)", "runtime dominates", "would save", "budget_bytes = "):
        assert words in said
    code, said = call("--budget", "1GB", "--json", "--experts", "int4", "--max-tokens", "16")
    found = json.loads(said)
    assert (found["experts"], found["max_tokens"], found["budget"]) == ("int4", 16, 10**9)
    assert sum(found["terms"].values()) == found["predicted"] <= found["budget"]
    assert found["dominant"] == "runtime"
    assert found["measured"] is None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--budget", "1MB"), "is below the smallest peak of tuning"),
        (("--budget", "much"), "no size"),
        (("--domain", "poetry"), "the public domains are ['math']"),
    ],
)
def test_what_cannot_be_planned_is_one_line(call, options, told):
    code, said = call(*options)
    assert code == 1
    assert told in " ".join(said.split())


@pytest.mark.slow
def test_a_prediction_is_proved_by_a_run(call, run):
    assert call()[0] == 0  # makes what follows from the base model
    before = set(run.cache.iterdir())
    code, said = call("--prove", "--json", "--experts", "int8")
    assert code == 0, said
    found = json.loads(said)
    assert found["measured"]["peak"] > found["measured"]["file_backed"] > 0
    assert set(run.cache.iterdir()) == before


def test_a_rehearsal_that_fails_says_why(call, monkeypatch):
    monkeypatch.setattr(plan_verb, "REHEARSAL", "proxymoe.client.no_such_module")
    code, said = call("--prove")
    assert code == 1
    assert "ended without a measurement" in said
