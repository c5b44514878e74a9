"""The rounds through Flower: the ServerApp and the ClientApp of a deployment, on Ray.

One virtual node per device; its actors open the same materialised submodels that devices get, so
a run ends in the same bits as in process. It costs seconds and hundreds of MB more, and shows
that the rounds hold over Flower's messages.
"""

import contextlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from importlib.util import find_spec
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read once, when flwr is imported

import psutil
import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from proxymoe.client.app import client_app
from proxymoe.client.personalize import Device
from proxymoe.common.errors import ConfigError, ProxyMoEError
from proxymoe.server.aggregate import Summation
from proxymoe.server.app import server_app
from proxymoe.server.journal import Journal
from proxymoe.server.round import Answer, Federation, Transport
from proxymoe.simulations.federate import Outcome, PlansOf, RoundDone, federate
from proxymoe.simulations.run import Federate
from proxymoe.simulations.site import Site
from proxymoe.simulations.worker import open_device

PATIENCE_SECONDS = 12 * 3600.0
"""Virtual devices may wait long for their turn, but they never leave."""
MESSAGE_STORE_BYTES = 256 << 20
"""Shared memory for messages under way; Ray would take a third of the machine's memory."""
ACTOR = "ray::ClientAppActor"
"""How the command line of an actor begins."""
ENVIRONMENT = {
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}
"""Environment of all that is started: nobody phones home; no comments on Ray's future, or on killed
actors (whose silence is logged); actors have one thread each, and nobody's priority over theirs."""


def flower_backend(site: Site) -> Federate:
    """A `Federate` that runs the rounds over Flower; it makes its own transport.

    Raises:
        ConfigError: Ray is not installed, or plans are to rotate.
    """
    if share := site.experiment.extract.rotate:
        raise ConfigError(
            f"extract.rotate = {share:g}: over Flower devices keep their plans; set it to 0, or "
            "simulate in process"
        )
    if find_spec("ray") is None:
        raise ConfigError("the Flower backend needs Ray: pip install 'proxymoe[simulation]'")

    def run(
        federation: Federation,
        _: Callable[[int], Transport],
        summation_of: Callable[[int], Summation],
        journal: Journal | None,
        done: RoundDone,
        _plans_of: PlansOf | None,
    ) -> Outcome:
        plans = {name: member.plan.digest for name, member in federation.members.items()}
        with virtual_nodes(site, plans) as transport:
            return federate(federation, lambda _: transport, summation_of, journal, done)

    return run


@contextlib.contextmanager
def virtual_nodes(site: Site, plans: Mapping[str, str]) -> Iterator[Transport]:
    """The transport of a ServerApp that is up while the block runs, with a node per device.

    Flower has a thread of its own and its ServerApp only lends its transport, so whatever the
    block raises, an interrupt included, takes its usual way. After the block, no process and no
    file of Flower or Ray is left.

    Args:
        site: where submodels and data are.
        plans: {device: digest of its plan}.

    Raises:
        ProxyMoEError: Flower or Ray did not start, or broke; the transport raises it too, and when
            a device is missing or does not answer.
    """
    lent, over = Future[Transport](), threading.Event()

    def lend(transport: Transport) -> None:
        lent.set_result(transport)
        over.wait()

    def pause(seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            ended.result(seconds)

    server = server_app(lend, len(plans), PATIENCE_SECONDS, PATIENCE_SECONDS, pause)
    client = client_app(partial(open_virtual_device, site, plans))
    with ThreadPoolExecutor(1, "flower") as executor:
        ended = executor.submit(_simulate, server, client, len(plans), site.experiment.workers)
        try:
            either: tuple[Future[Any], ...] = (lent, ended)
            wait(either, return_when=FIRST_COMPLETED)
            if ended.done():
                ended.result()
            yield Complete(lent.result(), sorted(plans))
        except BaseException:
            over.set()
            _kill_actors()
            raise
        over.set()


class Complete:
    """A transport on which nobody may be missing: every virtual device is there and answers.

    What a device cannot do, it refuses, and that is an answer. Silence means that its process died
    or could not open it; a result without it would not be the experiment's.
    """

    def __init__(self, transport: Transport, names: list[str]) -> None:
        self._transport = transport
        self._names = names

    def devices(self) -> list[str]:
        """All devices; ProxyMoEError if one is missing."""
        self._require(set(self._names), set(self._transport.devices()))
        return self._names

    def exchange(self, tasks: Mapping[str, bytes]) -> Iterator[Answer]:
        """See `server.round.Transport`; ProxyMoEError at the end if a reply is missing."""
        answered = set()
        for answer in self._transport.exchange(tasks):
            if answer is not None:
                answered.add(answer[0])
            yield answer
        self._require(set(tasks), answered)

    @staticmethod
    def _require(expected: set[str], found: set[str]) -> None:
        if missing := sorted(expected - found):
            raise ProxyMoEError(
                f"no answer from {', '.join(missing)} (the log says why), perhaps for want of "
                "memory; use fewer workers or smaller batches, then go on with --resume"
            )


def open_virtual_device(site: Site, plans: Mapping[str, str], context: Context) -> Device:
    """The device of a virtual node: of all devices by name, the one with its partition's number."""
    torch.set_num_threads(1)
    name = sorted(plans)[int(context.node_config["partition-id"])]
    return open_device(site, name, plans[name])


def _simulate(server: ServerApp, client: ClientApp, num_nodes: int, workers: int) -> None:
    """Runs both apps to the end of the ServerApp, on `workers` actors of one CPU each."""
    resources: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    with (
        tempfile.TemporaryDirectory(prefix="proxymoe-", ignore_cleanup_errors=True) as folder,
        _environment({**ENVIRONMENT, "FLWR_HOME": folder}),
    ):
        import ray  # noqa: PLC0415  optional; reads its environment when imported
        from flwr.simulation import run_simulation  # noqa: PLC0415  a second to load

        for noisy in ("flwr", "ray"):
            logging.getLogger(noisy).setLevel(logging.CRITICAL)  # we log or raise what matters
        try:
            ray.init(
                address="local",
                configure_logging=False,
                include_dashboard=False,
                log_to_driver=False,
                num_cpus=workers,
                object_store_memory=MESSAGE_STORE_BYTES,
                _temp_dir=folder,
            )
            # Deprecated in favour of `flwr run`; but that starts a server which outlives the run.
            run_simulation(server, client, num_nodes, backend_config=resources)
        except (OSError, RuntimeError, ValueError) as error:
            root: BaseException = error
            while root.__cause__ is not None:
                root = root.__cause__
            raise ProxyMoEError(
                f"Flower's simulation runtime stopped: {root}; run without --backend flower, or "
                "go on with --resume"
            ) from error
        finally:
            ray.shutdown()


def _kill_actors() -> None:
    """Kills this process's actors, so that nobody waits for what they still compute.

    Flower would shut Ray down under its threads that wait for an actor, and they would never wake.
    """
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(ACTOR):
                process.kill()


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """These variables are set within the block, and all are as before after it."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for added in set(os.environ) - set(before):
            del os.environ[added]
        os.environ.update(before)
