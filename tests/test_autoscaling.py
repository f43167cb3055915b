"""Autoscaling end to end: real overload of a real service, seen by the queries of KEDA and of the alert."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from ditserve.bench.load.cluster import Circumstances, running_cluster
from ditserve.bench.promises import HastyClient
from ditserve.service.launch.valkey import scratch_folder
from ditserve.service.settings import Settings
from tests.conftest import wait_until
from tests.deploy.files import ALERTS, manifest
from tests.promql import Scrapes

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).parent.parent
CLIENTS, STEPS, WITHIN_S = 8, 50, 2.0
SECONDS = 6.0
SCRAPED_EVERY_S = 0.5

# The queries as shipped, but over a shorter time, because the test is shorter.
TRIGGERS = manifest("ScaledObject", "worker")["spec"]["triggers"]
OFFERED, BACKLOG = (trigger["metadata"]["query"].replace("[1m]", f"[{SECONDS:.0f}s]") for trigger in TRIGGERS)
THRESHOLD = float(TRIGGERS[0]["metadata"]["threshold"])
(SATURATED,) = (
    rule["expr"].replace("[5m]", f"[{SECONDS:.0f}s]") for rule in ALERTS if rule["alert"] == "Saturated"
)


class Watched:
    """A service of one worker and two APIs, of which every half second all metrics are scraped."""

    def __init__(self, clients: list[httpx.AsyncClient]) -> None:
        self.clients, self.scrapes = clients, Scrapes()
        self._clock = asyncio.get_running_loop().time

    async def scrape(self) -> None:
        while True:
            for number, client in enumerate(self.clients):
                text = (await client.get("/metrics")).text
                target = {"namespace": "ditserve", "instance": f"api-{number}"}
                self.scrapes.add(text, self._clock(), target)
            await asyncio.sleep(SCRAPED_EVERY_S)

    def __call__(self, query: str) -> float:
        return self.scrapes.value(query, self._clock())

    def saturated(self) -> bool:
        return bool(self.scrapes.query(SATURATED, self._clock()))


@asynccontextmanager
async def watched() -> AsyncIterator[Watched]:
    settings = Settings.parse(
        [f"--bundle={ROOT / 'model/zoo/tiny'}", "--threads=1", "--log-level=warning", "--canary-s=0"]
    )
    with scratch_folder() as folder:
        async with running_cluster(
            Path(folder), settings, workers=1, durable=False, unlike={"api-1": Circumstances()}
        ) as cluster:
            clients = [httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) for url in cluster.urls]
            service = Watched(clients)
            scraping = asyncio.create_task(service.scrape())
            try:
                yield service
            finally:
                scraping.cancel()
                await asyncio.wait([scraping])
                for client in clients:
                    await client.aclose()


@asynccontextmanager
async def hasty_clients(service: Watched) -> AsyncIterator[list[HastyClient]]:
    """Give a client of each API."""
    with ExitStack() as stack:
        ports = [client.base_url.port or 80 for client in service.clients]
        yield [stack.enter_context(closing(HastyClient(port, STEPS))) for port in ports]


async def test_overload_is_seen_by_the_queries_and_so_is_its_end() -> None:
    async with watched() as service, hasty_clients(service) as hasty:
        can_per_s = await hasty[0].closed_loop(CLIENTS, SECONDS / 2)
        assert can_per_s > 0
        # On a slow machine no request would be answered in time, however few there are.
        within_s = max(WITHIN_S, CLIENTS / can_per_s)
        await below(service, lambda: service(OFFERED))

        async def offer(times: float) -> list[Any]:
            rate = times * can_per_s / len(hasty)
            loops = (client.open_loop(rate, SECONDS, within_s, returning=False) for client in hasty)
            return [outcome for outcomes in await asyncio.gather(*loops) for outcome in outcomes]

        calm = await offer(0.2)
        assert sum(outcome.status == 503 for outcome in calm) <= 0.1 * len(calm)
        assert service(OFFERED) < THRESHOLD, "a fifth of what it can do wants no more workers"
        assert not service.saturated()
        # The answers to the last requests come when the queries have begun to forget the first.
        offering, offered, saturated = asyncio.create_task(offer(3.0)), 0.0, False
        while not offering.done():
            await asyncio.sleep(SCRAPED_EVERY_S)
            offered, saturated = max(offered, service(OFFERED)), saturated or service.saturated()
        outcomes = offering.result()
        refused = sum(outcome.status == 503 for outcome in outcomes) / len(outcomes)
        fewer = sum(outcome.steps is not None and outcome.steps < STEPS for outcome in outcomes)
        assert refused + fewer / len(outcomes) > 0.4, "it was no overload"
        assert offered > 1.5, "three times as much as one worker can do"
        assert saturated
        await below(service, lambda: service(OFFERED))
        assert not service.saturated()


async def test_a_backlog_without_deadlines_is_seen_and_so_is_its_end() -> None:
    async with watched() as service:
        body = {"condition": {"label": 0}, "steps": 1000, "guidance_scale": 2.0, "n": 16}
        jobs = []
        for _ in range(40):
            answer = await service.clients[0].post(
                "/generate", json=body, headers={"prefer": "respond-async"}
            )
            assert answer.status_code == 202
            jobs.append(answer.headers["location"])
        await wait_until(lambda: service(BACKLOG) > THRESHOLD, timeout=120, every=0.1)
        for job in jobs:
            await service.clients[1].delete(job)
        await below(service, lambda: service(BACKLOG))


async def below(service: Watched, value: Callable[[], float]) -> None:
    """Wait until a query is below its threshold again."""
    await wait_until(lambda: value() < THRESHOLD, timeout=6 * SECONDS, every=0.2)
