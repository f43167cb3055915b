"""Several models in one service of real processes, and bundles replaced while it works."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from ditserve.model.spec.bundle import write_manifest
from ditserve.model.spec.manifest import Manifest
from ditserve.service.queue.broker import Broker
from tests.service.launch.test_supervisor import Running, gone, service, serving
from tests.service.tiny_adapters import write_adapter
from tests.service.tiny_bundle import MANIFEST, write_bundle

pytestmark = pytest.mark.anyio
WaitUntil = Callable[..., Awaitable[Any]]
FLAGS = ("--canary-s=0", "--drain-s=5", "--backend=onnx")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install onnxruntime")
    folder = tmp_path_factory.mktemp("tiny")
    write_bundle(folder, weights=False)
    return folder


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """Give a function that copies the tiny bundle to a folder, with other fields in its manifest."""

    def make(folder: str, **fields: Any) -> Path:
        path = Path(shutil.copytree(tiny, tmp_path / folder))
        change(path, **fields)
        return path

    return make


def change(folder: Path, **fields: Any) -> None:
    write_manifest(folder, Manifest.model_validate({**MANIFEST.model_dump(), **fields}))


def drawn(answer: httpx.Response) -> list[bytes]:
    """Return the pixels of its images; the files also hold the classes' names."""
    files = [base64.b64decode(image["b64"]) for image in answer.json()["images"]]
    return [Image.open(io.BytesIO(file)).tobytes() for file in files]


def workers(running: Running) -> set[int]:
    family = running.family.items()
    return {
        pid for pid, line in family if line.endswith("-m ditserve.service worker") and "/bin/sh" not in line
    }


class Client:
    def __init__(self, running: Running) -> None:
        self._http = httpx.AsyncClient(
            base_url=running.url.removesuffix("/generate"), timeout=120, trust_env=False
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def draw(
        self, model: str | None = None, label: str = "a", adapters: Sequence[dict[str, Any]] = ()
    ) -> httpx.Response:
        body = {"model": model, "condition": {"label": label}, "steps": 20, "seed": 1}
        return await self._http.post("/generate", json={**body, "adapters": list(adapters)})

    async def adapters(self) -> list[tuple[str, str]]:
        """Return the name and version of the adapters of the first model."""
        model = (await self._http.get("/models")).json()["models"][0]
        return [(adapter["name"], adapter["version"]) for adapter in model["adapters"] or ()]

    async def versions(self) -> dict[str, str]:
        models = (await self._http.get("/models")).json()["models"]
        return {model["name"]: model["version"] for model in models}

    async def draw_while(self, going_on: asyncio.Event) -> list[int]:
        """Request both models again and again until the event; return the statuses."""
        statuses = []
        while not going_on.is_set():
            statuses += [(await self.draw(model)).status_code for model in (None, "Round")]
        return statuses


async def test_two_models_are_served_and_one_is_replaced_under_load(
    bundle: Callable[..., Path], tmp_path: Path, wait_until: WaitUntil
) -> None:
    flat, old, new = bundle("flat"), bundle("old", name="Round"), bundle("new", name="Round", version="2")
    link = tmp_path / "round"
    link.symlink_to(old)
    async with serving(f"--bundle={flat},{link}", *FLAGS) as running, Client(running) as client:
        assert running.greeting.startswith("tiny 1, Round 1 are ready on http")
        before = workers(running)
        assert len(before) == 2
        replaced = asyncio.Event()
        load = [asyncio.create_task(client.draw_while(replaced)) for _ in range(4)]
        link.unlink()
        link.symlink_to(new)
        running.process.send_signal(signal.SIGHUP)

        async def swapped() -> bool:
            return await client.versions() == {"tiny": "1", "Round": "2"} and len(workers(running)) == 2

        await wait_until(swapped, timeout=120, every=0.05)
        replaced.set()
        statuses = [status for task in load for status in await task]
        assert set(statuses) == {200}
        assert len(workers(running) & before) == 1, "the model that did not change keeps its worker"
        everyone = set(running.family)
        running.process.send_signal(signal.SIGINT)
        _, errors = running.process.communicate()
        assert running.process.returncode == 0
        assert "Traceback" not in errors
        await gone(wait_until, everyone)


async def test_what_cannot_replace_a_bundle_leaves_it_at_work(
    bundle: Callable[..., Path], tmp_path: Path, wait_until: WaitUntil
) -> None:
    folder, log = bundle("round", name="Round"), tmp_path / "log"
    log.touch()
    async with serving(f"--bundle={folder}", *FLAGS, log=log) as running, Client(running) as client:
        before = workers(running)

        async def refused(reason: str) -> None:
            running.process.send_signal(signal.SIGHUP)
            await wait_until(lambda: reason in log.read_text(), timeout=120, every=0.05)
            assert (await client.draw()).status_code == 200
            await wait_until(lambda: workers(running) == before, timeout=120, every=0.05)

        graph = folder / "backbone.onnx"
        whole = graph.read_bytes()
        graph.write_bytes(whole[:-1])
        await refused(f"{graph} differs from the hash")
        change(folder, name="Round", version="2")
        await refused("a worker of the new one ended before it was ready")
        assert await client.versions() == {"Round": "1"}
        graph.write_bytes(whole)
        classes = ("b", "a", "c", "d", "e")
        label, style = MANIFEST.factors
        change(
            folder, name="Round", version="3", factors=(label.model_copy(update={"classes": classes}), style)
        )
        old = drawn(await client.draw(label="a"))
        running.process.send_signal(signal.SIGHUP)

        async def swapped() -> bool:
            return await client.versions() == {"Round": "3"} and not before & workers(running)

        await wait_until(swapped, timeout=120, every=0.05)
        assert drawn(await client.draw(label="b")) == old, "the same class, by its new name"


async def test_adapters_are_drawn_with_and_replaced_while_it_works(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    pytest.importorskip("torch", reason="adapters need torch: pip install 'ditserve[torch]'")
    folder, log = tmp_path / "bundle", tmp_path / "log"
    folder.mkdir()
    write_bundle(folder, weights=True)
    write_adapter(folder, "noir", seed=1)
    log.touch()
    flags = (f"--bundle={folder}", "--backend=torch", "--canary-s=0", "--drain-s=5", "--reuse-s=600")
    async with serving(*flags, log=log) as running, Client(running) as client:
        assert [name for name, _ in await client.adapters()] == ["noir"]
        plain, noir, none = await asyncio.gather(
            client.draw(), client.draw(adapters=[{"name": "noir"}]), client.draw(adapters=[])
        )
        assert drawn(plain) == drawn(none) != drawn(noir)
        again = await client.draw(adapters=[{"name": "noir"}])
        assert (again.headers["x-cache"], drawn(again)) == ("hit", drawn(noir))
        file = Image.open(io.BytesIO(base64.b64decode(noir.json()["images"][0]["b64"])))
        assert json.loads(file.info["adapters"]) == [{"name": "noir", "scale": 1.0}]
        assert (await client.draw(adapters=[{"name": "round"}])).status_code == 422

        broken = write_adapter(folder, "round", rank=600)
        running.process.send_signal(signal.SIGHUP)
        await wait_until(lambda: "ended before it was ready" in log.read_text(), timeout=120, every=0.05)
        assert f"error: {broken}: blocks.0.attn.qkv has rank 600" in log.read_text()
        assert drawn(await client.draw(adapters=[{"name": "noir"}])) == drawn(noir)

        write_adapter(folder, "round", seed=2)
        write_adapter(folder, "noir", seed=3)
        running.process.send_signal(signal.SIGHUP)

        async def swapped() -> bool:
            return [name for name, _ in await client.adapters()] == ["noir", "round"]

        await wait_until(swapped, timeout=120, every=0.05)
        assert drawn(await client.draw(adapters=[{"name": "noir"}])) != drawn(noir)
        assert drawn(await client.draw()) == drawn(plain)


async def test_a_worker_is_told_which_of_several_bundles_is_whose(bundle: Callable[..., Path]) -> None:
    flat, other = bundle("flat"), bundle("other", name="other")
    process = service("worker", f"--bundle={flat},{other}", REDIS_URL="redis://127.0.0.1:1")
    _, errors = process.communicate()
    assert process.returncode == 2
    assert f"--bundle {other} --namespace dit-other" in errors
    assert errors.count("\n") == 1


async def test_a_worker_by_itself_begins_anew_on_a_signal_and_is_never_killed_by_it(
    bundle: Callable[..., Path], tmp_path: Path, redis_url: str, namespace: str, wait_until: WaitUntil
) -> None:
    """Under the same process id; a bundle that did not change, or cannot be used, leaves it at work."""
    folder, log = bundle("round", name="Round"), tmp_path / "log"
    flags = ["worker", f"--bundle={folder}", f"--namespace={namespace}", "--backend=onnx", "--drain-s=5"]
    process = service(*flags, log=log, REDIS_URL=redis_url, DIT_LOG_LEVEL="info", DIT_LOG_FORMAT="json")
    broker = await Broker.connect(redis_url, namespace=namespace)
    try:

        async def served() -> str:
            return "".join(worker.bundle for worker in (await broker.load()).workers)

        old = await wait_until(served, timeout=120, every=0.05)
        process.send_signal(signal.SIGHUP)
        await wait_until(lambda: "bundle unchanged" in log.read_text(), timeout=120, every=0.05)
        graph = folder / "backbone.onnx"
        whole = graph.read_bytes()
        graph.write_bytes(whole[:-1])
        process.send_signal(signal.SIGHUP)
        await wait_until(lambda: "the old one serves on" in log.read_text(), timeout=120, every=0.05)
        assert await served() == old
        graph.write_bytes(whole)
        change(folder, name="Round", version="2")
        process.send_signal(signal.SIGHUP)
        # Signals while it begins anew neither kill it nor are they lost.
        await wait_until(lambda: "draining" in log.read_text(), timeout=120, every=0.01)

        async def anew() -> bool:
            process.send_signal(signal.SIGHUP)
            return await served() not in ("", old)

        await wait_until(anew, timeout=120, every=0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.communicate()
        await broker.aclose()
