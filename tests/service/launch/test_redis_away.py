"""Every role started while Redis is away: it lives, says what it waits for, and serves once that is there."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from ditserve.service.fleet import Starting
from ditserve.service.queue.broker import Broker
from tests.conftest import wait_until
from tests.service.launch.test_supervisor import killed, service
from tests.service.queue.servers import Server, free_port, serving

pytestmark = pytest.mark.anyio
TINY = "--bundle=model/zoo/tiny"
GENERATE = {"condition": {"label": 0}, "steps": 2}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """A server that is away."""
    server = Server(tmp_path)
    server.kill()
    with serving(server):
        yield server


@contextmanager
def started(*words: str, log: Path, server: Server) -> Iterator[subprocess.Popen[str]]:
    """Start a role against the server that is away."""
    log.touch()
    process = service(*words, TINY, log=log, REDIS_URL=server.url, DIT_CANARY_S="0")
    with killed(process):
        yield process


async def asked(client: httpx.AsyncClient, path: str) -> httpx.Response | None:
    try:
        return await client.get(path)
    except httpx.TransportError:
        return None


async def test_an_api_lives_and_says_that_it_waits(server: Server, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    base = f"http://127.0.0.1:{port}"
    with started("api", f"--port={port}", "--ready-workers=0", log=log, server=server) as process:
        async with httpx.AsyncClient(base_url=base, timeout=10, trust_env=False) as client:
            await wait_until(lambda: asked(client, "/livez"), timeout=120, every=0.1)
            assert (await client.get("/livez")).status_code == 200
            ready = await client.get("/readyz")
            assert (ready.status_code, ready.json()["checks"]["queue"]) == (503, False)
            assert ready.json()["reasons"]["queue"] == "Redis cannot be reached."
            assert (await client.get("/startupz")).status_code == 503
            assert "dit_redis_up 0.0" in (await client.get("/metrics")).text
            refused = await client.post("/generate", json=GENERATE)
            assert (refused.status_code, refused.json()["code"]) == (503, "queue-unavailable")
            assert "retry-after" in refused.headers
            assert "waiting for Redis" in log.read_text()
            server.start()

            async def is_ready() -> bool:
                return (await client.get("/readyz")).status_code == 200

            await wait_until(is_ready, timeout=120, every=0.1)
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 0
        assert "Traceback" not in log.read_text()


async def test_an_api_of_a_namespace_that_is_anothers_ends_once_redis_says_so(
    server: Server, tmp_path: Path
) -> None:
    """The worker of the other model reports for as long as an API waits for one that was killed."""
    port, log = free_port(), tmp_path / "log"
    with started("api", f"--port={port}", log=log, server=server) as process:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            await wait_until(lambda: asked(client, "/livez"), timeout=120, every=0.1)
        server.start()
        await wait_until(server.answers)
        broker = await Broker.connect(server.url)
        try:

            async def reported() -> bool:
                await broker.report(Starting("w", "another", "warming up"))
                return process.poll() is not None

            await wait_until(reported, timeout=120, every=0.5)
        finally:
            await broker.aclose()
        assert process.returncode == 2
        assert "--namespace: dit is in use by workers of another; give tiny another" in log.read_text()
        assert "Traceback" not in log.read_text()


async def test_a_worker_waits_and_can_be_told_to_stop_meanwhile(server: Server, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started("worker", log=log, server=server) as impatient:
        await wait_until(lambda: "waiting for Redis" in log.read_text(), timeout=120, every=0.1)
        impatient.send_signal(signal.SIGTERM)
        assert impatient.wait() == 0
    with started("worker", log=log, server=server) as worker:
        await wait_until(lambda: log.read_text().count("waiting for Redis") == 2, timeout=120, every=0.1)
        server.start()
        await wait_until(server.answers)
        broker = await Broker.connect(server.url)
        try:

            async def is_there() -> bool:
                return bool((await broker.load()).workers)

            await wait_until(is_there, timeout=120, every=0.1)
        finally:
            await broker.aclose()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0
        assert "Traceback" not in log.read_text()


async def test_all_in_one_waits_as_its_parts_do(server: Server, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    with started(f"--port={port}", log=log, server=server) as process:
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False
        ) as client:
            await wait_until(lambda: asked(client, "/livez"), timeout=120, every=0.1)
            assert (await client.get("/readyz")).json()["reasons"]["queue"] == "Redis cannot be reached."
            server.start()
            assert process.stdout is not None
            assert " is ready on http" in process.stdout.readline()
            assert (await client.post("/generate", json=GENERATE)).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        assert "Traceback" not in log.read_text()
