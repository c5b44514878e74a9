"""A coordinator's promise: priced before, on record before it is spent, and kept."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from proxymoe.common.config import FederationSettings
from proxymoe.common.errors import ConfigError
from proxymoe.common.privacy import CLIP_STEPS, Mode
from proxymoe.common.privacy_settings import PrivacySettings
from proxymoe.server import audit, cli, planner, promise, tables
from proxymoe.server.engine import RoundEngine, Rules
from proxymoe.server.promise import noise_of, promised, summations, thought_about
from proxymoe.server.settings import CoordinatorSettings
from proxymoe.server.spending import exposures
from proxymoe.server.store import Phase, RoundStore
from proxymoe.simulations.faults.cohort import InMemory, small_federation

CENTRAL = PrivacySettings(mode=Mode.CENTRAL, epsilon=8.0, delta=1e-3)


def settings_of(federation, privacy):
    return CoordinatorSettings(
        run="run",
        base_model="base",
        calibration="text",
        federation=FederationSettings(**federation.settings.model_dump()),
        privacy=privacy,
    )


def engine_of(folder, federation, privacy):
    store = RoundStore(folder, federation.run, federation.layout.size)
    settings = settings_of(federation, privacy)
    federation = replace(federation, noise=noise_of(settings))
    made = summations(settings, federation, store)
    return store, RoundEngine(federation, store, InMemory(), made, Rules(quorum=1.0))


def test_rounds_with_noise_spend_what_was_promised_and_say_so(tmp_path):
    federation = small_federation()
    store, engine = engine_of(tmp_path, federation, CENTRAL)
    first = engine.run()
    spent = exposures(store.database)
    price = promised(
        settings_of(federation, CENTRAL), CENTRAL, federation.layout, federation.members
    )
    assert price.participations == 4
    assert 7.9 < price.epsilon <= 8.0
    assert set(spent) == {"a", "b", "c"}
    each = 4 * price.noise_multiplier**-2
    assert [e.inverse_squares for e in spent.values()] == pytest.approx([each] * 3)
    entries = [e.body for e in audit.entries(store.database) if e.event == "privacy"]
    assert [entry["round"] for entry in entries] == [1, 2, 3, 4]
    # Its noise comes from the operating system: no two runs are the same.
    _, other = engine_of(tmp_path / "again", federation, CENTRAL)
    assert not torch.equal(first.adapter, other.run().adapter)


def test_without_a_promise_nothing_is_on_record(tmp_path):
    store, engine = engine_of(tmp_path, small_federation(), PrivacySettings())
    engine.run()
    assert exposures(store.database) == {}


def test_a_round_beyond_the_promise_is_abandoned_and_shows_nothing(tmp_path):
    federation = small_federation(rounds=2)
    store, engine = engine_of(tmp_path, federation, CENTRAL)
    before = engine.run()
    store.close()
    # An operator who lets the run go on for longer cannot take back the noise that was too little.
    longer = small_federation(rounds=4)
    store, engine = engine_of(tmp_path, longer, CENTRAL)
    after = engine.run()
    ended = [now.phase for now in store.rounds()]
    assert ended == [Phase.COMMITTED] * 2 + [Phase.ABANDONED] * 2
    assert "promised" in (store.rounds()[2].reason or "")
    assert torch.equal(after.adapter, before.adapter)


def test_blocks_that_few_hold_are_noisier():
    federation = small_federation()
    settings = settings_of(federation, CENTRAL)
    alone = promised(settings, CENTRAL, federation.layout, {})
    held = promised(settings, CENTRAL, federation.layout, federation.members)
    one = {"a": federation.members["a"]}
    single = promised(settings, CENTRAL, federation.layout, one)
    assert held.noise_to_signal > alone.noise_to_signal / 3
    assert single.devices_needed >= 1
    assert held.epsilon == alone.epsilon


def test_the_table_names_the_price_and_what_would_help():
    federation = small_federation()
    settings = settings_of(federation, CENTRAL)
    found = [
        promised(settings, each, federation.layout, {}, {"tiny": 1, "small": 50})
        for each in [*thought_about(CENTRAL, [2.0, 1e3], 1e-5), PrivacySettings()]
    ]
    assert [each.epsilon for each in found[:2]] == [
        pytest.approx(2, 2e-3),
        pytest.approx(1e3, 2e-3),
    ]
    assert math.isinf(found[2].epsilon)
    table = tables.price_table(found)
    assert table.row_count == 3
    lines = "\n".join(tables.advice(found, federation.layout.size))
    assert "epsilon 2: with this cohort an adapter may have" in lines
    assert f"this one has {federation.layout.size:,}" in lines
    fields = tables.price_fields(found[2])
    assert fields["epsilon"] is None
    assert fields["mode"] == "clip_only"


@pytest.mark.parametrize(("epsilon", "delta"), [(-1.0, None), (1.0, 2.0), (math.nan, None)])
def test_promises_that_mean_nothing_are_refused(epsilon, delta):
    with pytest.raises(ConfigError, match="--epsilon and --delta"):
        thought_about(PrivacySettings(), [epsilon], delta)


@pytest.mark.parametrize("mode", ["distributed", "local"])
def test_noise_that_devices_do_not_add_yet_is_refused(mode):
    with pytest.raises(ValueError, match=rf"privacy.mode {mode}, .* modes are clip_only, central"):
        settings_of(small_federation(), PrivacySettings(mode=mode, epsilon=1.0))
    with pytest.raises(ValueError, match=r"adaptive True: cohorts are dealt here"):
        settings_of(small_federation(), PrivacySettings(adaptive=True))


def test_the_command_line_prices_promises_for_any_cohort(monkeypatch):
    federation = small_federation(rounds=10)

    class Small:
        """A planner without a base model: the layout and the devices are what matters here."""

        layout, base = federation.layout, None

        def members(self):
            return federation.members

    monkeypatch.setattr(planner, "Planner", lambda _: Small())
    monkeypatch.setattr(promise, "smaller", lambda *_: {"tiny": 1})
    settings = settings_of(federation, PrivacySettings())
    monkeypatch.setattr(cli, "_run", lambda _: SimpleNamespace(settings=settings))

    def asked(*options):
        result = CliRunner().invoke(cli.app, ["privacy", "D", *options])
        assert result.exit_code == 0, result.output
        return result.output

    (own,) = json.loads(asked("--json"))
    assert (own["mode"], own["epsilon"], own["noise_multiplier"]) == ("clip_only", None, 0.0)
    few, many = (
        json.loads(asked("--epsilon", "2", "--epsilon", "8", "--devices", str(n), "--json"))
        for n in (3, 3000)
    )
    for one, other in zip(few, many, strict=True):
        assert one["epsilon"] == other["epsilon"]
        assert one["noise_to_signal"] == pytest.approx(1000 * other["noise_to_signal"], rel=1e-3)
    told = " ".join(asked("--epsilon", "2", "--delta", "0.5").split())
    assert "would allow to give one away whole" in told
    assert "useful would be" in told


def test_tasks_tell_the_noise_that_was_priced():
    federation = small_federation()
    openly = settings_of(federation, CENTRAL)
    noise = noise_of(openly)
    assert noise is not None
    price = promised(openly, CENTRAL, federation.layout, federation.members)
    assert (noise.mode, noise.delta) == (Mode.CENTRAL, 1e-3)
    assert noise.noise_multiplier == price.noise_multiplier
    assert noise.tolerated_dropouts == CENTRAL.tolerated_dropouts
    assert noise_of(settings_of(federation, PrivacySettings())) is None
    fixed = PrivacySettings(mode=Mode.CENTRAL, noise_multiplier=3.0)
    found = noise_of(settings_of(federation, fixed))
    assert found is not None
    assert found.noise_multiplier == 3.0


def test_under_masks_a_third_may_drop_out_and_words_hold_the_noise():
    federation = small_federation()
    shared = PrivacySettings(mode=Mode.DISTRIBUTED, epsilon=8.0, delta=1e-3)
    masked = CoordinatorSettings.model_validate(
        settings_of(federation, PrivacySettings()).model_dump()
        | {"sums": {"masked": True}, "privacy": shared}
    )
    noise = noise_of(masked)
    assert noise is not None
    assert noise.tolerated_dropouts == 1 / 3
    assert noise.clip_steps < CLIP_STEPS
    price = promised(masked, shared, federation.layout, {}, cohort=9)
    with_less = promised(settings_of(federation, CENTRAL), shared, federation.layout, {}, cohort=9)
    assert price.noise > with_less.noise, "more shares may be missing, so each is larger"


def test_a_release_under_masks_is_on_record_once_per_attempt(tmp_path):
    settings = settings_of(small_federation(), CENTRAL)
    federation = replace(small_federation(), noise=noise_of(settings))
    store = RoundStore(tmp_path, federation.run, federation.layout.size)
    spend = promise.spending(settings, federation, store)
    spend(1, 2, ["b", "a"])
    assert federation.noise is not None
    z = federation.noise.noise_multiplier
    assert {name: e.inverse_squares for name, e in exposures(store.database).items()} == {
        "a": z**-2,
        "b": z**-2,
    }
    spend(1, 2, ["a", "b"])
    assert exposures(store.database)["a"].inverse_squares == z**-2
