"""Several models behind one API, and a new version of one in the address of the old."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from ditserve.service.errors import ModelReplaced, to_wire
from ditserve.service.http.app import create_app
from ditserve.service.http.context import Context
from ditserve.service.queue.broker import Broker
from ditserve.service.served_models import open_served_models
from ditserve.service.settings import Settings
from tests.conftest import close_books, wait_until
from tests.service.http.conftest import MANIFEST, StubWorker

pytestmark = pytest.mark.anyio
SWEETS = ["cake", "toffee"]


def write(folder: Path, name: str, labels: list[str] | None = None, **fields: Any) -> None:
    folder.mkdir(exist_ok=True)
    classes = labels or MANIFEST["factors"][0]["classes"]
    config = {**MANIFEST["config"], "classes": [len(classes), 2]}
    factors = [{"name": "label", "classes": classes}, MANIFEST["factors"][1]]
    manifest = {**MANIFEST, "name": name, "config": config, "factors": factors, **fields}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@dataclass
class Pair:
    """An API of the models in `folder`/fruits and `folder`/sweets, and a stub worker of each."""

    app: FastAPI
    client: httpx.AsyncClient
    workers: dict[str, StubWorker]
    folder: Path
    settings: Settings

    @property
    def context(self) -> Context:
        context: Context = self.app.state.context
        return context

    async def generate(self, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        return await self.client.post("/generate", json=body, headers=headers or {})

    async def report(self, name: str) -> None:
        """Report that the worker of a model has loaded the bundle that is in the folder now."""
        served = next(
            served for served in open_served_models(self.settings, verify=False) if served.name == name
        )
        await self.workers[name].report(bundle=served.digest)

    async def reload(self) -> None:
        before = self.context.models
        self.app.state.reload.set()
        await wait_until(lambda: self.context.models is not before)

    async def versions(self) -> list[tuple[str, str]]:
        models = (await self.client.get("/models")).json()["models"]
        return [(model["name"], model["version"]) for model in models]


@pytest.fixture
async def pair(tmp_path: Path, redis_url: str, namespace: str) -> AsyncIterator[Pair]:
    write(tmp_path / "fruits", "fruits")
    write(tmp_path / "sweets", "sweets", SWEETS)
    bundle = f"{tmp_path / 'fruits'},{tmp_path / 'sweets'}"
    options: dict[str, Any] = {"bundle": bundle, "redis_url": redis_url, "namespace": namespace}
    settings = Settings(**options)
    async with AsyncExitStack() as stack:
        workers = {}
        for served in open_served_models(settings, verify=True):
            stack.push_async_callback(close_books, redis_url, served.namespace)
            broker = await Broker.connect(redis_url, namespace=served.namespace)
            stack.push_async_callback(broker.aclose)
            workers[served.name] = StubWorker(broker, served.name)
        app = create_app(settings)
        await stack.enter_async_context(app.router.lifespan_context(app))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        client = await stack.enter_async_context(
            httpx.AsyncClient(transport=transport, base_url="http://localhost")
        )
        pair = Pair(app, client, workers, tmp_path, settings)
        tasks = [asyncio.create_task(worker.run()) for worker in workers.values()]
        for name in workers:
            await pair.report(name)
        yield pair
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_the_model_of_the_request_draws(pair: Pair) -> None:
    asked = {None: "fruits", "fruits": "fruits", "sweets": "sweets"}
    for given, name in asked.items():
        label = {"fruits": "lemon", "sweets": "toffee"}[name]
        answer = await pair.generate(model=given, condition={"label": label})
        assert (answer.status_code, answer.json()["model"]) == (200, name)
    assert [len(worker.claimed) for worker in pair.workers.values()] == [2, 1]
    assert (await pair.generate(model="sweets", condition={"label": "lemon"})).status_code == 422


async def test_openai_clients_choose_the_model_too(pair: Pair) -> None:
    listed = (await pair.client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["fruits", "sweets"]
    body = {"model": "sweets", "prompt": "some toffee, noto"}
    assert (await pair.client.post("/v1/images/generations", json=body)).status_code == 200
    assert pair.workers["sweets"].claimed[0].job.condition[0].labels == (1, 0)
    refused = await pair.client.post("/v1/images/generations", json={**body, "model": "dall-e-3"})
    assert refused.status_code == 404


async def test_an_unknown_model_is_answered_with_those_there_are(pair: Pair) -> None:
    answer = await pair.generate(model="vegetables")
    assert (answer.status_code, answer.json()["code"]) == (404, "model-not-found")
    assert "this service runs fruits, sweets" in answer.json()["detail"]


async def test_a_job_is_found_whichever_model_has_it(pair: Pair) -> None:
    for name in pair.workers:
        accepted = await pair.generate({"prefer": "respond-async"}, model=name)
        address = accepted.headers["location"]

        async def done(address: str = address) -> bool:
            return bool((await pair.client.get(address)).json()["state"] == "done")

        await wait_until(done)
        assert (await pair.client.get(f"{address}/images/0")).status_code == 200
        assert "event: done" in (await pair.client.get(f"{address}/events")).text
    pair.workers["sweets"].hold = True
    address = (await pair.generate({"prefer": "respond-async"}, model="sweets")).headers["location"]
    assert (await pair.client.delete(address)).json()["state"] == "cancelled"


async def test_ready_when_every_model_has_its_worker(pair: Pair) -> None:
    assert (await pair.client.get("/readyz")).status_code == 200
    await pair.workers["sweets"].broker.retire("stub")
    assert (await pair.client.get("/readyz")).json()["checks"]["workers"] is False
    text = (await pair.client.get("/metrics")).text
    assert 'dit_workers{model="fruits"} 1.0' in text
    assert 'dit_workers{model="sweets"} 0.0' in text


async def test_an_idempotency_key_is_of_one_model(pair: Pair) -> None:
    key = {"idempotency-key": "k"}
    ids = [(await pair.generate(key, model=name)).json()["id"] for name in ("fruits", "sweets", "sweets")]
    assert ids[0] != ids[1] == ids[2]


async def test_a_new_version_takes_the_place_of_the_old(pair: Pair) -> None:
    other = pair.context.models["fruits"]
    await pair.generate(model="sweets", condition={"label": "toffee"})
    write(pair.folder / "sweets", "sweets", ["fudge", *SWEETS], version="2.0")
    await pair.report("sweets")
    await pair.reload()
    assert await pair.versions() == [("fruits", "1.0"), ("sweets", "2.0")]
    assert (await pair.generate(model="sweets", condition={"label": "fudge"})).status_code == 200
    await pair.generate(model="sweets", condition={"label": "toffee"})
    old, new, again = (claim.job for claim in pair.workers["sweets"].claimed)
    assert [job.condition[0].labels[0] for job in (old, new, again)] == [1, 0, 2]
    assert old.vocabulary != new.vocabulary == again.vocabulary
    assert pair.context.models["fruits"] is other, "what has not changed is left alone"
    text = (await pair.client.get("/metrics")).text
    assert 'dit_build_info{model="sweets",model_version="2.0",version="0.1.0"} 1.0' in text
    assert 'dit_build_info{model="sweets",model_version="1.0",version="0.1.0"} 0.0' in text


async def test_what_cannot_be_opened_leaves_the_old_version(pair: Pair) -> None:
    before = pair.context.models
    (pair.folder / "sweets" / "manifest.json").write_text("{")
    write(pair.folder / "fruits", "vegetables")
    await pair.reload()
    assert pair.context.models == before
    assert (await pair.generate(model="sweets")).status_code == 200


async def test_what_no_worker_has_loaded_leaves_the_old_version(pair: Pair) -> None:
    write(pair.folder / "sweets", "sweets", SWEETS, version="2.0")
    await pair.reload()
    assert await pair.versions() == [("fruits", "1.0"), ("sweets", "1.0")]
    await pair.report("sweets")
    await pair.reload()
    assert await pair.versions() == [("fruits", "1.0"), ("sweets", "2.0")]


async def test_a_job_of_the_old_classes_is_answered_with_come_again_and_drawn_anew(pair: Pair) -> None:
    worker = pair.workers["sweets"]
    worker.fail_with = to_wire(ModelReplaced("The model was replaced.", retry_after=1.0))
    key = {"idempotency-key": "k"}
    answer = await pair.generate(key, model="sweets", condition={"label": "cake"})
    assert (answer.status_code, answer.json()["code"]) == (503, "model-replaced")
    assert answer.headers["retry-after"] == "1"
    worker.fail_with = None
    write(pair.folder / "sweets", "sweets", SWEETS[::-1], version="2.0")
    await pair.report("sweets")
    await pair.reload()
    answer = await pair.generate(key, model="sweets", condition={"label": "cake"})
    assert answer.status_code == 200
    assert worker.claimed[-1].job.condition[0].labels[0] == 1
