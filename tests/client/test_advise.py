"""A device advises its owner by what it finds out; only requests for public tables leave."""

import dataclasses
import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from proxymoe.client import cli, submodel
from proxymoe.client.advise import LEAST_GAIN, Advice, advice, advise
from proxymoe.client.entries import Kind
from proxymoe.client.home import ReleasedMixture
from proxymoe.client.policy import Privacy, Resources
from proxymoe.client.proxy import PolicyRefused, apply
from proxymoe.client.retry import TransferError
from proxymoe.common.allocation import covered_energy
from proxymoe.common.assignment import Application
from proxymoe.common.config import Allocation
from proxymoe.common.domains import domain_table, table_bytes
from proxymoe.common.errors import CheckpointError, ConfigError, DataError, ProtocolError
from proxymoe.common.expert_table import ExpertTable, expert_table_bytes
from proxymoe.common.plan import LayerPlan, Plan
from tests.assigner import Assigner, easy_policy, enrolled_home, set_policy
from tests.tiny import VOCABULARY
from tests.worlds import tiny_site, write_rows

HERE = submodel.answer
"""Does jobs in this process, which has model code anyway."""
DOMAINS = ("digits", "letters")
STRICT = Privacy(smallest_cohort=2, mixture_may_leave=False)


def expert_table_of(num_experts, cost, **changes):
    """Digits need the last experts of every layer, letters the first."""
    energy = {
        at: np.stack([np.arange(1, count + 1) ** 2, np.arange(count, 0, -1) ** 2])
        for at, count in num_experts.items()
    }
    proper = {
        "domains": DOMAINS,
        "energy": {at: rows.astype(np.float32) for at, rows in energy.items()},
        "expert_bytes": cost,
        "allocation": Allocation.GLOBAL,
        "floor": 0.25,
        "is_exact": True,
    }
    return ExpertTable(**{**proper, **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_site(tmp_path_factory.mktemp("world"))[1]


@pytest.fixture
def assigner(base, tmp_path):
    folder = tmp_path / "blobs"
    folder.mkdir()
    with Assigner(base, folder).serving() as assigner:
        yield assigner


@pytest.fixture
def home(assigner, tmp_path):
    """A device whose data is digits and whose submodel is for letters; no mixture may leave."""
    rows = [{"text": f"{i:05d} {i * 7:05d}"} for i in range(150)]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    policy = easy_policy(tmp_path / "data", privacy=STRICT)
    home = enrolled_home(tmp_path / "home", policy, assigner.port)
    assign(assigner)
    apply(home, Application())
    return home


def assign(assigner, **changes):
    """From now on, the submodel of the first two experts, and tables."""
    counts = {domain: [0] * VOCABULARY for domain in DOMAINS}
    for domain, letters in (("digits", "0123456789 "), ("letters", "abcdefghijklm ")):
        for letter in letters:
            counts[domain][ord(letter) - 28] = 50
    experts = expert_table_of(assigner.base.num_experts, assigner.base.expert_bytes)
    proper = {
        "table": assigner.add(table_bytes(domain_table(counts))),
        "experts": assigner.add(expert_table_bytes(experts)),
    }
    return assigner.assign(0, 1, **{**proper, **changes})


def entries(home):
    return [record.entry for record in reversed(home.ledger().newest())]


# Ranking


@st.composite
def settings_of(draw):
    """A table of two layers, a plan by its rule for one domain, and a mixture."""
    table = expert_table_of(
        {0: 8, 2: 8},
        {0: 10, 2: 10},
        allocation=draw(st.sampled_from(Allocation)),
        floor=draw(st.floats(0, 1)),
    )
    kept = table.keep(table.mix({draw(st.sampled_from(DOMAINS)): 1.0}), draw(st.integers(20, 160)))
    weight = draw(st.floats(0, 1))
    return table, plan_of(kept), {"digits": weight, "letters": 1 - weight}


def plan_of(kept, count=8):
    layers = {
        at: LayerPlan(num_experts=count, kept=tuple(sorted(experts)))
        for at, experts in kept.items()
    }
    return Plan(base="ab" * 32, layers=layers)


@given(settings_of())
def test_the_best_covers_no_less_than_what_is_here_and_than_any_domains(given):
    table, plan, mixture = given
    found = advice(table, mixture, plan, mixture)
    assert found.covered == covered_energy(table.mix(mixture), plan.kept)
    assert found.best == found.by_mixture
    assert found.best >= max(found.covered, found.by_domain) - 1e-9
    assert found.by_domain >= found.covered - 1e-9, "it was cut for one of them"
    assert found.nearest[0][1] == max(mixture.values())


def test_a_device_that_has_the_best_submodel_has_nothing_to_do():
    table = expert_table_of({0: 8}, {0: 10})
    mixture = {"digits": 1.0, "letters": 0.0}
    found = advice(table, mixture, plan_of({0: [6, 7]}), mixture)
    assert found.covered == found.best == found.by_domain
    assert (found.domain, found.remedy) == ("digits", None)


GOOD = Advice((("a", 1.0),), 0.5, 0.9, "a", 0.8, None, is_exact=True)


@pytest.mark.parametrize(
    ("by_domain", "by_mixture", "remedy"),
    [
        (0.5, None, None),
        (0.5 + LEAST_GAIN / 2, 0.5 + LEAST_GAIN / 2, None),
        (0.8, None, "--domain a"),
        (0.8, 0.7, "--domain a"),
        (0.8, 0.8 + LEAST_GAIN / 2, "--domain a"),
        (0.8, 0.85, "--mixture"),
        (0.5 + LEAST_GAIN / 2, 0.5 + 1.2 * LEAST_GAIN, "--mixture"),
    ],
)
def test_the_remedy_is_what_tells_least_and_is_worth_a_download(by_domain, by_mixture, remedy):
    found = dataclasses.replace(GOOD, by_domain=by_domain, by_mixture=by_mixture)
    assert found.remedy == remedy


def test_a_table_that_does_not_fit_the_plan_or_the_mixture_is_refused():
    table, even = expert_table_of({0: 8}, {0: 10}), {"digits": 0.5, "letters": 0.5}
    for plan in (plan_of({0: [1]}, count=9), plan_of({1: [1]}), plan_of({0: [1], 1: [1]})):
        with pytest.raises(ProtocolError, match="of another base model than the plan"):
            advice(table, even, plan)
    with pytest.raises(ProtocolError, match="of other domains than the domain table"):
        advice(table, {"digits": 1.0}, plan_of({0: [1]}))


# On the device


def test_a_device_finds_out_what_suits_its_data_and_no_mixture_leaves(assigner, home):
    found = advise(home, work=HERE)
    assert found.nearest[0][0] == found.domain == "digits"
    assert found.covered < found.by_domain <= found.best
    assert (found.by_mixture, found.remedy) == (None, "--domain digits")
    assert assigner.applications == [Application()]
    assert {entry.kind for entry in entries(home)} == {Kind.REQUEST}
    assert home.mixture() is None
    assert home.usage(time.time()).epsilon == 0
    held = home.assignment()
    assert {held.table.digest, held.experts.digest} <= set(assigner.fetched)
    assert not set(assigner.fetched) & {piece.digest for piece in assigner.base.pieces}

    again = len(assigner.fetched)
    assert advise(home, work=HERE) == found
    assert len(assigner.fetched) == again, "tables that are here are not fetched again"


def test_the_share_is_what_the_exact_mixture_says(assigner, home):
    found, held = advise(home, work=HERE), home.assignment()
    weights, _ = json.loads(submodel.weigh(str(home.path), held.table.digest))
    table = expert_table_of(assigner.base.num_experts, assigner.base.expert_bytes)
    assert found == advice(table, weights, assigner.plan(0, 1))


def test_where_a_mixture_may_leave_it_is_weighed_like_the_others(home, tmp_path):
    set_policy(home, easy_policy(tmp_path / "data"))
    found = advise(home, work=HERE)
    assert found.by_mixture == found.best
    write_rows(tmp_path / "data" / "train.jsonl", [{"text": "12345"}] * 9)
    assert advise(home, work=HERE).by_mixture is None, "too few rows for the noise"
    assert home.mixture() is None


def test_a_mixture_that_was_released_before_is_what_would_be_told(home, tmp_path):
    set_policy(home, easy_policy(tmp_path / "data"))
    letters = {"digits": 0.0, "letters": 1.0}
    table = home.assignment().table.digest
    home.keep_mixture(ReleasedMixture(table=table, mixture=letters, epsilon=1.0, delta=1e-5))
    found = advise(home, work=HERE)
    assert found.by_mixture == pytest.approx(found.covered), "the submodel here is for letters"
    assert found.remedy == "--domain digits"


def test_a_mixture_that_costs_too_much_is_no_remedy(home, tmp_path):
    privacy = Privacy(smallest_cohort=2, mixture_may_leave=True, largest_epsilon=0.5)
    set_policy(home, easy_policy(tmp_path / "data", privacy=privacy))
    assert advise(home, work=HERE).by_mixture is None


def test_what_may_not_be_fetched_is_not(assigner, home, tmp_path):
    resources = Resources(spare_memory_mb=0, spare_disk_mb=0, network_mb_per_month=0)
    set_policy(home, easy_policy(tmp_path / "data", privacy=STRICT, resources=resources))
    with pytest.raises(PolicyRefused, match=r"resources\.network_mb_per_month"):
        advise(home, work=HERE)
    assert assigner.fetched == []


def test_a_table_from_the_coordinator_that_is_none_is_refused(assigner, home):
    assign(assigner, experts=assigner.add(b"no table"))
    apply(home, Application())
    with pytest.raises(CheckpointError, match="not a safetensors table"):
        advise(home, work=HERE)


@pytest.mark.parametrize("lacking", ["table", "experts"])
def test_a_coordinator_without_tables_cannot_be_compared_with(assigner, home, lacking):
    assign(assigner, **{lacking: None})
    apply(home, Application())
    with pytest.raises(ConfigError, match=r"shipped no tables .* `join --refresh` here"):
        advise(home, work=HERE)


def test_what_is_missing_is_named_before_anything_is_fetched(assigner, home, tmp_path):
    set_policy(home, easy_policy(None))
    with pytest.raises(DataError, match=r"data\.folder"):
        advise(home, work=HERE)
    set_policy(home, easy_policy(tmp_path / "data"))
    home.assignment_file.unlink()
    with pytest.raises(ConfigError, match="no plan is assigned to this device; join first"):
        advise(home, work=HERE)
    assert assigner.fetched == []


def test_data_without_rows_is_nothing_to_compare(home, tmp_path):
    write_rows(tmp_path / "data" / "train.jsonl", [])
    with pytest.raises(DataError, match="no rows; give at least one JSON object per line"):
        advise(home, work=HERE)


# What the owner sees


def say(home, *words, code=0):
    done = CliRunner().invoke(cli.app, ["advise", "--home", str(home.path), *words])
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def test_the_owner_is_told_what_to_do_in_a_process_without_model_code(home):
    told = say(home)
    assert "Your data is most like digits (" in told
    assert "Say `proxymoe-device join --refresh --domain digits` for one" in told


def test_programs_are_told_the_same(home, monkeypatch):
    monkeypatch.setattr(cli, "advise_owner", lambda home: GOOD)
    found = json.loads(say(home, "--json"))
    assert found == {
        "nearest": {"a": 1.0},
        "covered": 0.5,
        "best": 0.9,
        "domain": "a",
        "by_domain": 0.8,
        "by_mixture": None,
        "is_exact": True,
        "remedy": "--domain a",
    }


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"by_domain": 0.5, "best": 0.5}, "No other submodel that you can ask for is worth"),
        ({}, "none may leave this device: the policy"),
        ({"by_mixture": 0.9}, "Say `proxymoe-device join --refresh --mixture` for one that covers"),
        ({"is_exact": False}, "take that as an estimate"),
    ],
)
def test_every_case_has_its_sentence(home, monkeypatch, changes, told):
    found = dataclasses.replace(GOOD, **changes)
    monkeypatch.setattr(cli, "advise_owner", lambda home: found)
    assert told in say(home)


def test_a_mistake_is_one_line(home):
    home.assignment_file.unlink()
    assert say(home, code=1).startswith("error: ")
    assert len(say(home, code=1).splitlines()) == 1
    with home.alone():
        assert "a second client" in say(type(home)(home.path), code=1)


def test_a_coordinator_that_is_away_is_an_error_to_try_again_after(home):
    home.keep_enrolment(home.enrolled().model_copy(update={"blobs": "127.0.0.1:1"}))
    before = len(entries(home))
    with pytest.raises(TransferError, match="is away"):
        advise(home, work=HERE)
    assert len(entries(home)) == before
