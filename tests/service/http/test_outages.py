"""The API while its Redis loses data, hangs, is full, or cuts connections: a server of each test's own."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis

from ditserve.service.http import load_cache
from ditserve.service.queue import reads
from tests.conftest import wait_until
from tests.service.http.conftest import OpenStage, Serve, Stage
from tests.service.queue.servers import Server

pytestmark = pytest.mark.anyio

GENERATE = {"condition": {"label": "apple"}}


@pytest.fixture
def redis_url(server: Server) -> str:
    """Replace the server of the session, so that `stage` uses the test's own."""
    return server.url


@pytest.fixture
async def admin(server: Server) -> AsyncIterator[Redis]:
    async with Redis.from_url(server.url) as client:
        yield client


async def test_a_lost_job_is_told_on_every_way_within_seconds(
    open_stage: OpenStage, serve: Serve, admin: Redis
) -> None:
    stage = await open_stage(worker=False)
    await stage.worker.report()
    watched = (
        await stage.client.post("/generate", json=GENERATE, headers={"prefer": "respond-async"})
    ).json()
    keyed = {"idempotency-key": "again"}
    base = f"http://127.0.0.1:{await serve(stage)}"
    async with httpx.AsyncClient(base_url=base, timeout=10) as client:
        answers = asyncio.gather(
            client.post("/generate", json=GENERATE),
            client.post("/generate", json=GENERATE, headers=keyed),
            client.post("/v1/images/generations", json={"prompt": "apple"}),
            client.post("/v1/images/generations", json={"prompt": "apple", "stream": True}),
            client.get(watched["links"]["events"]),
        )

        async def queued() -> bool:
            return (await stage.broker.load()).queued_jobs == 5

        await wait_until(queued)
        await admin.flushall()
        await stage.worker.report()
        *whole, openai_stream, stream = await answers
        for method in ("GET", "DELETE"):
            whole.append(await client.request(method, watched["links"]["self"]))
        unknown = await client.get(f"/jobs/{'0' * 32}")
        assert (unknown.status_code, unknown.json()["code"]) == (404, "job-not-found")
        for answer in whole:
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            body = answer.json()
            assert body.get("error", body)["code"] == "job-lost"
        for answer in (openai_stream, stream):
            last = answer.text.strip().rpartition("\n\n")[2]
            assert last.startswith("event: error\n")
            assert '"code":"job-lost"' in last
        again = asyncio.create_task(client.post("/generate", json=GENERATE, headers=keyed))
        (claim,) = await wait_until(
            lambda: stage.broker.claim("stub", models=["fruits"], max_samples=1), every=0.05
        )
        await stage.broker.finish(claim.lease, stage.worker.result(claim))
        assert (await again).status_code == 200, "a replay of a lost job starts anew"


async def timed(stage: Stage, path: str) -> tuple[httpx.Response, float]:
    began = time.perf_counter()
    return await stage.client.get(path), time.perf_counter() - began


async def test_probes_and_metrics_do_not_wait_for_a_redis_that_hangs(stage: Stage, server: Server) -> None:
    await stage.worker.report(running_samples=3)
    assert (await stage.client.get("/startupz")).status_code == 200
    os.kill(server.process.pid, signal.SIGSTOP)
    paths = ("/livez", "/startupz", "/readyz", "/metrics", "/models")
    answers = {path: await timed(stage, path) for path in paths}
    statuses = {path: answer.status_code for path, (answer, _) in answers.items()}
    assert statuses == {"/livez": 200, "/startupz": 200, "/readyz": 503, "/metrics": 200, "/models": 200}
    # A loaded machine adds to the time, but a wait for Redis would be of three seconds.
    assert max(seconds for _, seconds in answers.values()) < 2
    checks = answers["/readyz"][0].json()["checks"]
    assert checks == {"accepting": True, "queue": False, "workers": True}
    families = text_string_to_metric_families(answers["/metrics"][0].text)
    values = {family.name: family.samples[0].value for family in families if family.samples}
    assert (values["dit_redis_up"], values["dit_running_samples"]) == (0, 3)
    os.kill(server.process.pid, signal.SIGCONT)
    assert (await stage.client.get("/readyz")).status_code == 200


async def test_with_full_memory_what_there_is_can_be_had_and_stopped(stage: Stage, admin: Redis) -> None:
    keyed: dict[str, Any] = {"json": GENERATE, "headers": {"idempotency-key": "k"}}
    first = await stage.client.post("/generate", **keyed)
    done = f"/jobs/{first.headers['x-job-id']}"
    stage.worker.hold = True
    held = await stage.queued()
    await admin.config_set("maxmemory", "1mb")
    assert (await stage.client.get(done)).json()["state"] == "done"
    assert (await stage.client.get(f"{done}/images/0")).status_code == 200
    assert (await stage.client.get(f"{done}/events")).text.count("event: done") == 1
    assert (await stage.client.post("/generate", **keyed)).headers["idempotency-replayed"] == "true"
    assert (await stage.client.delete(held)).json()["state"] == "cancelled"
    refused = await stage.client.post("/generate", json=GENERATE)
    assert (refused.status_code, refused.json()["code"]) == (503, "queue-unavailable")
    await admin.config_set("maxmemory", "0")


async def test_a_replica_is_not_ready_for_work_and_tells_where_jobs_stand(stage: Stage, admin: Redis) -> None:
    stage.worker.hold = True
    address = await stage.queued()
    assert (await stage.client.get("/readyz")).status_code == 200
    await admin.execute_command("REPLICAOF", "127.0.0.1", "1")
    refused = await stage.client.get("/readyz")
    assert (refused.status_code, refused.json()["checks"]["queue"]) == (503, False)
    status = await stage.client.get(address)
    assert (status.status_code, status.json()["eta_s"]) == (200, None)
    await admin.execute_command("REPLICAOF", "NO", "ONE")
    assert (await stage.client.get("/readyz")).status_code == 200


@asynccontextmanager
async def watched(client: httpx.AsyncClient, door: str) -> AsyncIterator[AsyncIterator[str]]:
    """Give the chunks of a stream that follows a new job, from either door."""
    if door == "/generate":
        job = await client.post(door, json=GENERATE, headers={"prefer": "respond-async"})
        stream = client.stream("GET", job.json()["links"]["events"])
    else:
        stream = client.stream("POST", door, json={"prompt": "apple", "stream": True})
    async with stream as response:
        yield response.aiter_text()


DOORS = ["/generate", "/v1/images/generations"]


@pytest.mark.parametrize("door", DOORS)
async def test_a_stream_rides_out_an_outage(
    door: str, stage: Stage, serve: Serve, server: Server, admin: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The outage is longer than one read of events waits for Redis.
    monkeypatch.setattr(reads, "GRACE_S", 0.1)
    monkeypatch.setattr(reads, "BLOCK_MS", 100)
    stage.worker.hold = True
    base = f"http://127.0.0.1:{await serve(stage)}"
    async with httpx.AsyncClient(base_url=base, timeout=20) as client, watched(client, door) as chunks:
        (claim,) = await wait_until(lambda: stage.worker.claimed)
        os.kill(server.process.pid, signal.SIGSTOP)
        await asyncio.sleep(1.5)
        os.kill(server.process.pid, signal.SIGCONT)
        await admin.client_kill_filter(_type="normal", skipme=True)
        await stage.broker.finish(claim.lease, stage.worker.result(claim))
        text = "".join([chunk async for chunk in chunks])
    assert "event: error" not in text
    assert ("event: done" in text) or ("image_generation.completed" in text)


@pytest.mark.parametrize("door", DOORS)
async def test_a_stream_ends_with_a_long_outage_and_a_job_of_nobody_is_cancelled(
    door: str, stage: Stage, serve: Serve, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "GRACE_S", 0.1)
    monkeypatch.setattr(reads, "BLOCK_MS", 100)
    monkeypatch.setattr(reads.Reads, "outage_s", 0.5)
    stage.worker.hold = True
    base = f"http://127.0.0.1:{await serve(stage)}"
    async with httpx.AsyncClient(base_url=base, timeout=20) as client, watched(client, door) as chunks:
        (claim,) = await wait_until(lambda: stage.worker.claimed)
        os.kill(server.process.pid, signal.SIGSTOP)
        text = "".join([chunk async for chunk in chunks])
        os.kill(server.process.pid, signal.SIGCONT)
    assert '"code":"queue-unavailable"' in text

    async def state() -> str:
        status = await stage.broker.status(claim.job.id)
        assert status is not None
        return status.state

    if door == "/generate":
        assert await state() == "running", "leaving its events does not cancel a job"
        return

    async def cancelled() -> bool:
        return await state() == "cancelled"

    await wait_until(cancelled)


async def test_a_request_that_redis_took_after_its_answer_was_lost_does_not_run(
    stage: Stage, server: Server, admin: Redis
) -> None:
    stage.worker.hold = True
    await stage.generate({"prefer": "respond-async"}, **GENERATE)
    await wait_until(lambda: stage.worker.claimed)
    load = stage.app.state.context.default.submissions.load
    os.kill(server.process.pid, signal.SIGSTOP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_cache, "LOAD_FRESH_S", 60.0)
        refused = await stage.generate({"prefer": "respond-async"}, **GENERATE)
    assert load.last() is not None
    os.kill(server.process.pid, signal.SIGCONT)
    assert (refused.status_code, refused.json()["code"]) == (503, "queue-unavailable")

    async def one_unfinished() -> bool:
        counts: Any = await admin.hvals(stage.broker.keys.unfinished)
        return [int(count) for count in counts] == [1]

    await wait_until(lambda: len(stage.worker.claimed) == 2)
    await wait_until(one_unfinished)


async def test_a_stream_ends_with_an_error_when_redis_lets_nobody_in(
    open_stage: OpenStage, serve: Serve, admin: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads.Reads, "outage_s", 0.5)
    stage = await open_stage(worker=False)
    await stage.worker.report()
    job = (await stage.client.post("/generate", json=GENERATE, headers={"prefer": "respond-async"})).json()
    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{await serve(stage)}", timeout=20) as client,
        client.stream("GET", job["links"]["events"]) as response,
    ):
        chunks = response.aiter_text()
        assert "event: queued" in await anext(chunks)
        await admin.config_set("requirepass", "secret")
        await admin.client_kill_filter(_type="normal", skipme=True)
        rest = "".join([chunk async for chunk in chunks])
    assert "event: error" in rest
    assert '"code":"queue-unavailable"' in rest
    await admin.config_set("requirepass", "")


async def test_a_fault_of_this_code_ends_a_stream_with_an_error(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def events(job_id: str, after: str) -> AsyncIterator[Any]:
        raise RuntimeError("/secret/path")
        yield

    address = await stage.queued()
    monkeypatch.setattr(stage.broker, "events", events)
    text = (await stage.client.get(f"{address}/events")).text
    assert text.startswith("event: error\n")
    assert '"code":"internal-error"' in text
    assert "secret" not in text
