"""The API on a stage: a tiny bundle, the real broker, and a worker that finishes jobs without a model."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from ditserve.model.spec.manifest import Manifest
from ditserve.service.fleet import WorkerState
from ditserve.service.formats import CONTENT_TYPES
from ditserve.service.http import load_cache
from ditserve.service.http.api import configured
from ditserve.service.http.app import create_app
from ditserve.service.identity import bundle_digest
from ditserve.service.jobs import Claim, Image, JobResult, Progress
from ditserve.service.queue.broker import Broker
from ditserve.service.queue.listener import Listener
from ditserve.service.queue.queue_client import QueueClient
from ditserve.service.queue.quota import Quota
from ditserve.service.settings import Settings
from tests.conftest import wait_until

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360606060000000050001a5f6454000"
    "00000049454e44ae426082"
)

MANIFEST: dict[str, Any] = {
    "schema_version": 1,
    "name": "fruits",
    "version": "1.0",
    "description": "A tiny model for tests.",
    "config": {
        "image_size": [16, 16],
        "patch_size": 4,
        "in_channels": 3,
        "hidden_size": 8,
        "depth": 1,
        "num_heads": 1,
        "classes": [4, 2],
        "learn_sigma": False,
    },
    "diffusion": {"schedule": "linear", "prediction": "x0", "timesteps": 100},
    "factors": [
        {"name": "label", "classes": ["apple", "red apple", "strawberry", "lemon"]},
        {"name": "style", "classes": ["noto", "twemoji"]},
    ],
    "embedding_size": 8,
    "state": [],
    "defaults": {
        "steps": 20,
        "solver": "ddim",
        "grid": "trailing",
        "guidance_scale": 2.0,
        "guidance_interval": [0.0, 1.0],
    },
    "ladder": [
        {"name": "full", "solver": "ddim", "steps": 20, "grid": "trailing", "rows": 40, "quality": 0.0},
        {"name": "half", "solver": "dpmpp-2m", "steps": 10, "grid": "uniform-t", "rows": 20, "quality": 0.1},
        {"name": "floor", "solver": "dpmpp-2m", "steps": 5, "grid": "uniform-t", "rows": 10, "quality": 0.5},
    ],
    "licence": "Apache-2.0",
    "attribution": ["Nobody"],
}


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle")
    (path / "manifest.json").write_text(json.dumps(MANIFEST))
    return path


@pytest.fixture(autouse=True)
def _load_always_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_cache, "LOAD_FRESH_S", -1.0)


@dataclass
class StubWorker:
    """Claims jobs and finishes them with one-pixel images.

    `hold` keeps the jobs running; `fail_with` is the error that ends them instead. The last step of a job was
    `delivery_s` seconds before its result; None: the worker does not say.
    """

    broker: Broker
    model: str = "fruits"
    hold: bool = False
    fail_with: dict[str, Any] | None = None
    delivery_s: float | None = None
    claimed: list[Claim] = field(default_factory=list)

    async def run(self) -> None:
        while True:
            await self.broker.work.wait(5)
            for claim in await self.broker.claim("stub", models=[self.model], max_samples=64):
                self.claimed.append(claim)
                await self._work(claim)

    async def report(self, **changes: Any) -> None:
        """Publish the state of a fast and idle worker, with `changes`."""
        figures: dict[str, Any] = {"max_rows": 8, "step_fixed_s": 0.0, "step_per_row_s": 0.0001}
        figures |= {"decode_s": 0.0, "running_samples": 0, "backlog_rows": 0}
        figures |= {"last_step_age_s": 0.0, "updated_at": 2.0**40}  # it is never late
        await self.broker.report(WorkerState(worker="stub", models=(self.model,), **{**figures, **changes}))

    async def _work(self, claim: Claim) -> None:
        job, lease = claim.job, claim.lease
        for step in range(job.previews, job.steps, job.previews or job.steps):
            progress = {"sample": 0, "step": step, "steps": job.steps}
            data = {**progress, "image": PNG, "content_type": "image/png"}
            await self.broker.progress(Progress(lease, "preview", data))
        if self.fail_with is not None:
            await self.broker.fail(lease, self.fail_with)
        elif not self.hold:
            result = self.result(claim)
            if self.delivery_s is not None:
                result = replace(result, denoised_at=self.broker.clock() - self.delivery_s)
            await self.broker.finish(lease, result)

    @staticmethod
    def result(claim: Claim) -> JobResult:
        job = claim.job
        return JobResult(
            images=tuple(Image(PNG, seed, CONTENT_TYPES[job.format]) for seed in job.seeds),
            steps_requested=job.steps,
            steps_used=job.admitted.walked if job.admitted else job.steps,
            solver=(job.admitted or job).solver,
            rung=job.admitted.name if job.admitted else "full",
            degraded=job.rung is not None,
            reason=job.reason,
            timings_ms={"queue": 1.25, "denoise": 20.0},
            attempt=claim.lease.attempt,
            worker="stub",
            bundle=bundle_digest(Manifest.model_validate(MANIFEST)),
        )


@dataclass
class Stage:
    """An API in this process with its client, its broker and its stub worker."""

    app: FastAPI
    client: httpx.AsyncClient
    broker: Broker
    worker: StubWorker
    settings: Settings

    async def generate(self, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        return await self.client.post("/generate", json=body, headers=headers or {})

    async def queued(self, **body: Any) -> str:
        """Queue a job that nobody waits for, and return its address."""
        response = await self.generate({"prefer": "respond-async"}, **body)
        assert response.status_code == 202
        return response.headers["location"]


OpenStage = Callable[..., Awaitable[Stage]]


@pytest.fixture
async def open_stage(
    connect: Callable[..., Awaitable[Broker]], bundle_path: Path, redis_url: str
) -> AsyncIterator[OpenStage]:
    """Open an API in this process on the real broker. Keywords are settings; `worker=False` adds none."""
    async with AsyncExitStack() as stack:

        async def open_(*, worker: bool = True, **options: Any) -> Stage:
            settings = Settings(**{"bundle": bundle_path, "allowed_hosts": "test,x", **options})
            broker = await connect(queue_limit=settings.queue_limit)
            stub = StubWorker(await connect())

            @asynccontextmanager
            async def opener(_: Settings) -> AsyncIterator[QueueClient]:
                listener = Listener(broker)
                quota = Quota(redis_url, namespace=broker.keys.namespace)
                try:
                    yield QueueClient(broker, listener, quota)
                finally:
                    await quota.aclose()
                    await listener.aclose()

            app = create_app(settings, opener=opener)
            await stack.enter_async_context(app.router.lifespan_context(app))
            if worker:
                await stub.report()
                stack.push_async_callback(_ended, asyncio.create_task(stub.run()))
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            client = await stack.enter_async_context(
                httpx.AsyncClient(transport=transport, base_url="http://test")
            )
            return Stage(app, client, broker, stub, settings)

        yield open_


@pytest.fixture
async def stage(open_stage: OpenStage) -> Stage:
    return await open_stage()


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


Serve = Callable[..., Awaitable[int]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Serve a stage on a real socket of this machine, in this event loop; return the port.

    Keywords are options of uvicorn.
    """
    async with AsyncExitStack() as stack:

        async def serve_(stage: Stage, **options: Any) -> int:
            config = configured(stage.app, stage.settings)
            for name, value in options.items():
                setattr(config, name, value)
            config.lifespan = "off"
            server = uvicorn.Server(config)
            listening = socket.create_server(("127.0.0.1", 0))
            port: int = listening.getsockname()[1]
            task = asyncio.create_task(server.serve(sockets=[listening]))

            async def stop() -> None:
                server.should_exit = True
                await asyncio.wait_for(task, 60)

            stack.push_async_callback(stop)
            await wait_until(lambda: server.started)
            return port

        yield serve_


Browse = Callable[..., AbstractAsyncContextManager[Any]]


@pytest.fixture(scope="module")
async def browse() -> AsyncIterator[Browse]:
    """Open addresses, each in a window of its own of one Chromium, whose start takes longer than most tests.

    A window shares no storage with another. Its console may show answers of status `refusal`, no other fault.
    """
    playwright = pytest.importorskip("playwright.async_api", reason="needs: pip install playwright")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("needs a browser: apt-get install chromium")
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])

        @asynccontextmanager
        async def open_window(url: str, *, refusal: str = "422") -> AsyncIterator[Any]:
            faults: list[str] = []
            window = await browser.new_context()
            page = await window.new_page()
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
            await page.goto(url)
            yield page
            await window.close()
            assert [fault for fault in faults if refusal not in fault] == []

        yield open_window
        await browser.close()
