"""A service does not depend on its log: whatever becomes of stdout and stderr, it serves and heals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.launch.test_supervisor import ROOT, killed, offspring, one
from tests.service.queue.servers import free_port

pytestmark = pytest.mark.anyio
WaitUntil = Callable[..., Awaitable[Any]]
Process = subprocess.Popen[bytes]
# A machine whose locale knows ASCII alone.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


class Client:
    """A client of a service, and the service's process."""

    def __init__(self, process: Process, http: httpx.AsyncClient) -> None:
        self.process, self._http = process, http

    async def ready(self) -> bool:
        with suppress(httpx.TransportError):
            return (await self._http.get("/readyz")).status_code == 200
        return False

    async def draws(self) -> bool:
        answer = await self._http.post("/generate", json={"steps": 1, "previews": 0})
        return answer.status_code == 200

    @property
    def worker(self) -> int:
        return one(offspring(self.process.pid), "-m ditserve.service worker")


def start(port: int, redirection: str, stderr: int | None, environment: dict[str, str]) -> Process:
    """Start the service in a shell that redirects its output."""
    command = [sys.executable, "-m", "service", "--bundle=model/zoo/tiny", f"--port={port}", "--canary-s=0"]
    return subprocess.Popen(
        ["/bin/sh", "-c", f'exec "$@" {redirection}', "service", *command],
        cwd=ROOT,
        env={**os.environ, "DIT_THREADS": "1", "DIT_LOG_LEVEL": "debug", **environment},
        stderr=stderr,
    )


@asynccontextmanager
async def logging_to(
    redirection: str, wait_until: WaitUntil, *, environment: dict[str, str], stderr: int | None = None
) -> AsyncIterator[Client]:
    """Run the service: it must come up, draw before and after the block, and end with status 0."""
    port = free_port()
    process = start(port, redirection, stderr, environment)
    with killed(process):
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False
        ) as http:
            client = Client(process, http)
            await wait_until(client.ready, timeout=120, every=0.1)
            assert await client.draws()
            yield client
            assert await client.draws()
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
@pytest.mark.parametrize(
    ("redirection", "environment"),
    [
        (">&- 2>&- <&-", {}),
        (">/dev/full 2>/dev/full", {"PYTHONIOENCODING": "ascii"}),
    ],
    ids=["closed", "full disk"],
)
async def test_it_serves_without_a_log(
    redirection: str, environment: dict[str, str], wait_until: WaitUntil
) -> None:
    async with logging_to(redirection, wait_until, environment=environment):
        pass


async def test_a_reader_that_stands_still_and_then_leaves(wait_until: WaitUntil) -> None:
    read, write = os.pipe()
    # A pipe holds 64 KiB. This one is almost full.
    os.write(write, b"\n" * 60_000)
    try:
        async with logging_to(">&2", wait_until, environment=ASCII, stderr=write) as client:
            os.close(write)
            for _ in range(20):
                assert await client.draws()
            os.close(read)
            for _ in range(20):
                assert await client.draws()
            worker = client.worker
            os.kill(worker, signal.SIGKILL)
            assert await client.draws(), "a new worker took its place"
            assert client.worker != worker
    finally:
        for descriptor in (read, write):
            with suppress(OSError):
                os.close(descriptor)
