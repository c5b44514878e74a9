"""Virtual devices compute what real ones compute."""

import dataclasses
import signal
from typing import Any

import numpy as np
import pytest
import torch

from proxymoe.common.config import ExtractSettings, FederationSettings
from proxymoe.common.errors import ConfigError, DataError, PlanError
from proxymoe.common.messages import TrainReply, TrainTask, decode, encode
from proxymoe.common.model import load
from proxymoe.common.plan import Plan
from proxymoe.server.journal import Journal
from proxymoe.server.profile import Profile, load_profile
from proxymoe.server.round import Federation, FederationState, Member, RoundReport
from proxymoe.simulations import public, worker
from proxymoe.simulations.faults.cohort import plain
from proxymoe.simulations.federate import federate
from proxymoe.simulations.site import asset, device_examples, virtual_devices
from proxymoe.simulations.worker import Worker
from proxymoe.simulations.world import World
from tests.tiny import logits
from tests.worlds import tiny_site

MODES: dict[str, dict[str, Any]] = {
    "drop": {"mode": "drop"},
    "mean": {"mode": "mean"},
    "affine": {"mode": "affine"},
    "sliced": {"router": "sliced"},
    "merged": {"mode": "msmoe"},
    "merged, sliced": {"mode": "hcsmoe", "router": "sliced"},
    "merged, summed": {"mode": "ptse", "router": "summed"},
    "all": {"kept_fraction": 1.0},
    "int8": {"experts": "int8"},
    "all in int4": {"experts": "int4", "kept_fraction": 1.0},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny world whose one worker is this process."""
    root = tmp_path_factory.mktemp("world")
    site, base = tiny_site(root)
    worker._worker = Worker(site)
    public.profile("math", root / "profile")
    public.relate("math", root / "relations")
    profile = load_profile(root / "profile", base.digest, root / "relations")
    yield World(site, base, profile)
    worker._worker = None


@pytest.fixture(autouse=True)
def interrupts():
    """Workers ignore interrupts; the tests' own process must not."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def cut(world: World, **fields) -> Plan:
    return world.cut(world.site.devices[0], ExtractSettings(**fields), seed=0).plan


@pytest.mark.parametrize("mode", MODES)
def test_mounted_and_materialised_submodels_compute_the_same_bits(world, mode):
    plan = cut(world, **MODES[mode])
    materialised = load(world.site.submodels / plan.digest, torch.float32)
    mounted = worker.here().mounted(plan)
    assert mounted.plan == materialised.plan == plan
    assert mounted.model.dtype == materialised.model.dtype
    assert torch.equal(logits(mounted.model), logits(materialised.model))


def test_mounting_one_plan_leaves_no_trace_in_the_next(world):
    here = worker.here()
    before = logits(here.mounted(None).model)
    for mode in MODES.values():
        logits(here.mounted(cut(world, **mode)).model)
    assert torch.equal(logits(here.mounted(None).model), before)


@pytest.mark.parametrize("mode", MODES)
def test_a_virtual_device_answers_with_the_bits_of_one_in_its_own_process(world, mode):
    plan = cut(world, **MODES[mode])
    layout = world.site.layout.held_under(plan)
    task = TrainTask(
        run="run",
        round=1,
        device="kitchen",
        base=plan.base,
        plan=plan.digest,
        layout=layout.digest,
        train=world.site.experiment.train,
        clip_norm=1.0,
        seed=7,
    )
    content = encode(task, layout.zeros().numpy())
    virtual, update = decode(worker.answer("kitchen", plan, content))
    real, same = decode(worker.answer_alone(world.site, "kitchen", plan, content))
    assert isinstance(virtual, TrainReply)
    assert isinstance(real, TrainReply)
    assert virtual.last_loss == real.last_loss
    assert np.array_equal(update, same)
    assert np.abs(update).max() > 0


def test_local_tuning_returns_the_full_layout_and_leaves_other_blocks_alone(world):
    plan, full = cut(world), world.site.layout
    begin = torch.randn(full.size, generator=torch.Generator().manual_seed(0)).mul(0.01).numpy()
    settings = world.site.experiment.train
    tuned = worker.tune_locally("kitchen", plan, begin, settings, seed=1)
    again = worker.tune_locally("kitchen", plan, begin, settings, seed=1)
    assert tuned.vector.shape == (full.size,)
    assert np.array_equal(tuned.vector, again.vector)
    assert not np.array_equal(tuned.vector, begin)


def test_a_zero_adapter_evaluates_like_none(world):
    zeros = world.site.layout.zeros().numpy()
    for plan in (None, cut(world)):
        assert worker.evaluate("garden", plan, zeros) == worker.evaluate("garden", plan, None)
    assert worker.public_loss(zeros, 3, 48) == worker.public_loss(None, 3, 48)
    assert set(worker.public_loss(None, 3, 48)) == {"math"}


def test_the_canary_hears_what_the_public_loss_hears(world):
    zeros, rows = world.site.layout.zeros().numpy(), 3
    noise = np.random.default_rng(0).standard_normal(zeros.size).astype(np.float32)
    for vector in (None, zeros, 0.1 * noise):
        (expected,) = worker.public_loss(vector, rows, 48).values()
        assert worker.canary_loss(vector, rows, 48) == pytest.approx(expected, rel=1e-5)


def test_answers_can_be_ranked_among_everyones(world):
    own = worker.evaluate("kitchen", None, None, "own")
    everyone = worker.evaluate("kitchen", None, None, "all")
    assert own == everyone  # both devices answer a or b
    assert 0.0 <= own.accuracy <= 1.0


def test_a_plan_for_another_base_model_is_refused(world):
    plan = cut(world).model_copy(update={"base": "ab" * 32})
    with pytest.raises(PlanError, match="plan for base model abababababab, the site has"):
        worker.answer("kitchen", plan, b"")


def test_a_device_of_unknown_domain_gets_the_uniform_mixture(world):
    assert "kitchen" not in world.profile.domains
    uniform = Profile(world.base.digest, world.profile.domains, world.profile.num_tokens)
    assert uniform.uniform() == {"math": 1.0}
    assert cut(world) == cut(world)


def test_test_rows_are_a_fixed_draw(world):
    here, site = worker.here(), world.site
    few = site.experiment.model_copy(
        update={"evaluate": site.experiment.evaluate.model_copy(update={"max_items": 3})}
    )
    drawn = device_examples(site.devices[0], "test", here.full.tokenizer, few)
    assert len(drawn.examples) == 3
    assert drawn == device_examples(site.devices[0], "test", here.full.tokenizer, few)
    assert set(drawn.examples) < set(here.examples("kitchen", "test"))


def test_rows_that_are_too_long_are_counted_for_the_owner(world, monkeypatch):
    assert worker.row_counts("kitchen")["truncated"] == 0
    used = worker.row_counts("kitchen")["used"]
    site = world.site
    for how, expected in (("truncate", (used, used, 0)), ("drop", None)):
        train = site.experiment.train.model_copy(update={"max_tokens": 8, "too_long": how})
        short = dataclasses.replace(
            site, experiment=site.experiment.model_copy(update={"train": train})
        )
        monkeypatch.setattr(worker, "_worker", worker.Worker(short))
        if expected is None:
            with pytest.raises(DataError, match=r"none of .* rows fits into 8 tokens"):
                worker.row_counts("kitchen")
        else:
            assert tuple(worker.row_counts("kitchen").values()) == expected


def test_missing_assets_and_devices_are_named(world, tmp_path):
    with pytest.raises(ConfigError, match="no-model: no such file or folder"):
        asset("no-model")
    groups = world.site.experiment.devices
    with pytest.raises(ConfigError, match=r"device 'attic': .*has no train\.jsonl"):
        virtual_devices((groups[0].model_copy(update={"names": ("attic",)}),))


class Turning:
    """Devices in this process whose plans are those of one round."""

    def __init__(self, plans) -> None:
        self.plans = plans

    def devices(self) -> list[str]:
        """See `server.round.Transport`."""
        return list(self.plans)

    def exchange(self, tasks):
        """See `server.round.Transport`."""
        for name, task in tasks.items():
            yield name, worker.answer(name, self.plans[name], task)


def test_plans_rotate_from_round_to_round_and_a_stop_does_not_change_how(world, tmp_path):
    settings = ExtractSettings(kept_fraction=0.5)
    plans = {d.name: world.cut(d, settings, seed=0).plan for d in world.site.devices}
    plans_of = world.rotation(plans, share=0.5, seed=0, materialised_rounds=1)
    assert len({plans_of(number)["kitchen"].digest for number in range(1, 9)}) > 1
    assert plans_of(3) == plans_of(3)
    first = plans_of(1)["garden"]
    assert load(world.site.submodels / first.digest, torch.float32).plan == first

    def rounds(count: int, journal: Journal | None) -> FederationState:
        layout = world.site.layout
        federation = Federation(
            run="turning",
            base=world.base.digest,
            seed=0,
            layout=layout,
            members={n: Member(plan, layout.held_under(plan)) for n, plan in plans.items()},
            train=world.site.experiment.train,
            settings=FederationSettings(rounds=count, final_rate=1.0),
            canary=lambda _: 0.0,
            canary_limit=1.0,
        )
        transport_of = lambda number: Turning(plans_of(number))  # noqa: E731
        done = reports.append
        return federate(federation, transport_of, plain(federation), journal, done, plans_of).state

    reports: list[RoundReport] = []
    whole = rounds(4, None)
    assert all(report.num_updates == 2 and not report.refused for report in reports)
    rounds(2, Journal(tmp_path))
    assert torch.equal(rounds(4, Journal(tmp_path)).adapter, whole.adapter)
