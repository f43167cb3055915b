"""Callbacks by real API processes with wrong clocks: one is killed while it calls, another calls again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis
from standardwebhooks import Webhook

from ditserve.service.jobs import JobResult
from ditserve.service.queue.broker import Broker
from tests.conftest import wait_until
from tests.service.callbacks.conftest import HANG, SECRETS, Receiver
from tests.service.callbacks.conftest import receiver as receiver  # a fixture
from tests.service.queue.servers import free_port
from tests.service.tiny_bundle import write_bundle
from tests.test_clock_skew import FAKED, LIBRARIES

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not LIBRARIES, reason="libfaketime is not here: apt-get install faketime"),
]
Start = Callable[..., str]


@pytest.fixture
def start(tmp_path: Path, redis_url: str, namespace: str, receiver: Receiver) -> Iterator[Start]:
    """Start an API process whose clock is `ahead` of others; return its address."""
    bundle, processes = tmp_path / "bundle", []
    bundle.mkdir()
    write_bundle(bundle, weights=False)

    def start_(ahead: str) -> str:
        port = free_port()
        flags = [f"--bundle={bundle}", f"--port={port}", f"--namespace={namespace}", "--canary-s=0"]
        flags += [f"--callback-allow={receiver.url}", "--callback-networks=127.0.0.1"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DIT_")}
        environment |= {
            "REDIS_URL": redis_url,
            "DIT_CALLBACK_SECRET": SECRETS,
            "http_proxy": "http://127.0.0.1:9",
        }
        environment |= {"LD_PRELOAD": LIBRARIES[0], "FAKETIME": ahead, **FAKED}
        command = [sys.executable, "-m", "ditserve.service", "api", *flags]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
        return f"http://127.0.0.1:{port}"

    start_.processes = processes  # type: ignore[attr-defined]
    yield start_
    for process in processes:
        process.kill()
        process.wait()


async def answers(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/livez")).status_code == 200
    except httpx.TransportError:
        return False


async def test_a_process_that_is_killed_while_it_calls_loses_nothing(
    start: Start,
    connect: Callable[..., Awaitable[Broker]],
    redis_url: str,
    receiver: Receiver,
    make_result: Callable[..., JobResult],
) -> None:
    receiver.answers = [HANG]
    broker = await connect()
    async with httpx.AsyncClient(base_url=start("+2h"), trust_env=False) as first:
        await wait_until(lambda: answers(first), timeout=120)
        headers = {"prefer": "respond-async"}
        job = (await first.post("/generate", json={"callback_url": receiver.url}, headers=headers)).json()
    assert job["callback"]["state"] == "waiting"
    (claim,) = await broker.claim("w1", models=[job["model"]], max_samples=4)
    assert await broker.finish(claim.lease, make_result())
    await wait_until(lambda: receiver.posts)
    (process,) = start.processes  # type: ignore[attr-defined]
    process.kill()
    process.wait()
    async with httpx.AsyncClient(base_url=start("-2h"), trust_env=False) as second:
        await wait_until(lambda: answers(second), timeout=120)
        # The lease of the dead process ends.
        async with Redis.from_url(redis_url) as client:
            assert await client.zadd(broker.keys.callbacks, {job["id"]: 0}, ch=True, xx=True) == 1

        async def delivered() -> Any:
            callback = (await second.get(job["links"]["self"])).json()["callback"]
            return callback if callback["state"] == "delivered" else None

        assert (await wait_until(delivered))["attempts"] == 2
    assert [sent.job["state"] for sent in receiver.posts] == ["done", "done"]
    assert len({sent.headers["webhook-id"] for sent in receiver.posts}) == 1
    for sent in receiver.posts:
        # A receiver takes a message whose time is its own, give or take five minutes.
        Webhook(SECRETS.split(",")[0]).verify(sent.body, sent.headers)
