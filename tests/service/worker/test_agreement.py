"""Workers of one bundle compute in one precision: whoever comes first, together, later, or cannot."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
import yaml

from ditserve.model.spec.bundle import Bundle
from ditserve.service.backends import Backend, BackendUnavailable
from ditserve.service.fleet import LoadSnapshot, Network, WorkerState
from ditserve.service.queue.broker import Broker
from ditserve.service.telemetry import metrics
from ditserve.service.worker.agreement import load_agreed
from tests.conftest import wait_until
from tests.promql import Scrapes
from tests.service.conftest import FakeBackend
from tests.service.queue.servers import Server, serving

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).resolve().parents[3]
Connect = Callable[..., Awaitable[Broker]]


class Host:
    """A machine whose backend chooses `own` by itself, and has no graph of the precisions it `lacks`."""

    def __init__(self, own: str, *lacks: str) -> None:
        self.own, self.lacks = own, lacks
        self.opened: list[str] = []
        self.closed = 0

    def load(self, name: str, bundle: Bundle, precision: str = "auto", **options: Any) -> Backend:
        self.opened.append(precision)
        if precision in self.lacks:
            raise BackendUnavailable(f"no {precision} here")
        backend = FakeBackend()
        backend.precision = self.own if precision == "auto" else precision
        backend.close = self.close  # type: ignore[method-assign]
        return backend

    def close(self) -> None:
        self.closed += 1

    async def start(self, broker: Broker, bundle: Bundle, **options: Any) -> str:
        return (await load_agreed("onnx", bundle, options, broker, load=self.load)).precision


@pytest.fixture
def bundle() -> Bundle:
    return Bundle(Path("b"), FakeBackend().manifest)


async def test_two_that_start_at_once_agree(connect: Connect, bundle: Bundle) -> None:
    hosts = [Host(own) for own in ("int8", "fp32") * 4]
    brokers = [await connect() for _ in hosts]
    chosen = await asyncio.gather(
        *(host.start(broker, bundle) for host, broker in zip(hosts, brokers, strict=True))
    )
    assert len(set(chosen)) == 1
    for host in hosts:
        assert host.closed == host.opened.count("auto") - (host.own == chosen[0] and "auto" in host.opened)


async def test_who_comes_later_takes_the_choice_of_the_fleet_also_of_one_that_has_left(
    connect: Connect, bundle: Bundle
) -> None:
    assert await Host("int8").start(await connect(), bundle) == "int8"
    later = Host("fp32")
    assert await later.start(await connect(), bundle) == "int8"
    assert later.opened == ["int8"], "it measures nothing"


async def test_who_cannot_computes_in_its_own_and_says_so(connect: Connect, bundle: Bundle) -> None:
    broker = await connect()
    await Host("int8").start(broker, bundle)
    lame = Host("fp32", "int8")
    with structlog.testing.capture_logs() as logs:
        assert await lame.start(broker, bundle) == "fp32"
    (warning,) = [entry for entry in logs if entry["log_level"] == "warning"]
    assert (warning["theirs"], warning["reason"]) == ("int8", "no int8 here")
    assert await Host("fp32").start(broker, bundle) == "int8", "the fleet's choice stays"


async def test_other_versions_and_other_providers_choose_for_themselves(
    connect: Connect, bundle: Bundle
) -> None:
    broker = await connect()
    assert await Host("int8").start(broker, bundle) == "int8"
    other = Bundle(bundle.path, bundle.manifest.model_copy(update={"version": "2"}))
    assert await Host("fp32").start(broker, other) == "fp32"
    assert await Host("fp16").start(broker, bundle, providers=("CUDAExecutionProvider",)) == "fp16"


async def test_a_precision_that_is_asked_for_is_taken_and_binds_nobody(
    connect: Connect, bundle: Bundle
) -> None:
    broker = await connect()
    assert await Host("int8").start(broker, bundle, precision="fp32") == "fp32"
    assert await Host("int8").start(broker, bundle) == "int8"


async def test_a_choice_of_another_kind_in_redis_is_made_anew(connect: Connect) -> None:
    broker = await connect()
    await broker._client.lpush(broker.keys.agreed("x"), "1")
    assert await broker.agree("x", "") == ""
    assert await broker.agree("x", "fp32") == "fp32"
    assert await broker.agree("x", "int8") == "fp32"


async def test_while_redis_is_away_nobody_chooses_alone(server: Server, bundle: Bundle) -> None:
    broker = await Broker.connect(server.url, timeout_s=0.5)
    try:
        server.kill()
        starting = asyncio.create_task(Host("int8").start(broker, bundle))
        with structlog.testing.capture_logs() as logs:
            await wait_until(lambda: any(entry["event"] == "waiting for Redis" for entry in logs))
        assert not starting.done()
        server.start()
        assert await asyncio.wait_for(starting, 20) == "int8"
    finally:
        await broker.aclose()


async def test_workers_agree_while_redis_is_full(tmp_path: Path, bundle: Bundle) -> None:
    """They are the ones who drain it."""
    server = Server(tmp_path, "maxmemory 1", "maxmemory-policy noeviction")
    with serving(server):
        await wait_until(server.answers)
        broker = await Broker.connect(server.url)
        try:
            assert await Host("int8").start(broker, bundle) == "int8"
            assert await Host("fp32").start(broker, bundle) == "int8"
        finally:
            await broker.aclose()


def test_a_mixed_fleet_is_counted_version_by_version_and_alerted() -> None:
    def worker(bundle: str, precision: str) -> WorkerState:
        network = Network("onnx", precision)
        return WorkerState("w", ("m",), 1, 0.0, 0.1, 0.0, 0, 0, 0.0, 0.0, network=network, bundle=bundle)

    groups = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    (alert,) = (rule["expr"] for rule in rules if rule["alert"] == "FleetMixed")

    def mixed(*workers: WorkerState) -> bool:
        """Ask the alert, of two APIs that tell the same."""
        loads, scrapes = {"m": LoadSnapshot(0, 0, 0.0, workers, 0.0)}, Scrapes()
        text = metrics.exposition(loads, redis_up=True, shared=None).decode()
        for api in ("1", "2"):
            scrapes.add(text, 0.0, {"instance": api})
        return bool(scrapes.query(alert, 0.0))

    assert not mixed()
    assert not mixed(worker("1", "int8"), worker("1", "int8"))
    assert not mixed(worker("1", "int8"), worker("2", "fp32"))
    assert mixed(worker("1", "int8"), worker("1", "fp32"))
