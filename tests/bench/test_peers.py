"""The peers draw the images that our service draws: one network, one solver, the same noise, in any batch."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from ditserve.bench.peers import model
from ditserve.bench.peers.bundle_pipeline import BundlePipeline
from ditserve.bench.peers.cap import Cap
from ditserve.bench.peers.graph import GraphTransformer
from ditserve.bench.peers.options import PeerOptions
from ditserve.bench.peers.pipeline import Pipeline
from ditserve.bench.peers.requests import PeerRequest
from ditserve.model.evaluation.front import OperatingPoint
from ditserve.model.evaluation.ladder import LadderInputs, draw_pictures
from ditserve.model.spec.bundle import Bundle
from ditserve.model.train.loaded_model import load_bundle
from ditserve.service.backends import Backend, load_backend, load_text_encoder
from tests.prompted_bundle import PROMPTS
from tests.service.tiny_bundle import MANIFEST

# diffusers' schedulers have NumPy copy tensors, which do not know how
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

REQUESTS = (
    PeerRequest({"label": 0}, 20, 2.0, 1),
    PeerRequest({"label": 1}, 4, 1.0, 2),
    PeerRequest({"label": 2}, 20, 1.0, 3),
    PeerRequest({"label": 2}, 4, 3.0, 4),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.write_weights(path, MANIFEST)
    return path


@pytest.fixture(scope="module")
def backend(folder: Path) -> Backend:
    return load_backend("torch", Bundle.open(folder / "imported"), threads=1)


def drawn(file: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.int16]]:
    return np.asarray(Image.open(io.BytesIO(file))).astype(np.int16)


def test_the_bundle_is_an_official_dit_with_the_other_s_ladder(folder: Path) -> None:
    manifest = Bundle.open(folder / "imported").manifest
    assert manifest.config.classes == MANIFEST.config.classes[:1]
    assert manifest.ladder == MANIFEST.ladder
    assert (manifest.diffusion.prediction, manifest.defaults.solver) == ("x0", "dpmpp-2m")


def test_a_mixed_batch_draws_what_each_draws_alone(folder: Path) -> None:
    pipeline = Pipeline(folder, threads=1)
    together = pipeline(REQUESTS)
    for request, file in zip(REQUESTS, together, strict=True):
        assert np.abs(drawn(file) - drawn(pipeline([request])[0])).max() <= 1


def test_diffusers_draws_what_our_engine_draws(folder: Path, backend: Backend) -> None:
    assert model.difference(folder, backend) <= model.TOLERANCE


def test_our_backend_stands_in_for_diffusers_network(folder: Path, backend: Backend) -> None:
    pipeline = Pipeline(folder, threads=1)
    expected = pipeline.draw(REQUESTS[:1], 20)
    pipeline.transformer = GraphTransformer(backend, pipeline.transformer.config)
    assert np.abs((pipeline.draw(REQUESTS[:1], 20) - expected).numpy()).max() <= model.TOLERANCE


def test_options_travel_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = PeerOptions("model", "bundle", False, 8000, 2, 4, 0.05, 8)
    options.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert PeerOptions.read() == options


@pytest.mark.anyio
async def test_beyond_the_cap_a_server_is_full_and_says_so() -> None:
    inside = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await inside.wait()
        await Response("done")(scope, receive, send)

    capped = Cap(app, cap=1)

    async def ask(method: str) -> int:
        statuses: list[int] = []

        async def send(message: Message) -> None:
            statuses.extend([message["status"]] if "status" in message else [])

        async def receive() -> Message:
            return {"type": "http.request"}

        await capped({"type": "http", "method": method, "headers": []}, receive, send)
        return statuses[0]

    first = asyncio.create_task(ask("POST"))
    await asyncio.sleep(0)
    assert await ask("POST") == 503
    question = asyncio.create_task(ask("GET"))
    await asyncio.sleep(0)
    inside.set()
    assert (await first, await question) == (200, 200)
    assert await ask("POST") == 200  # there is room again


@pytest.mark.parametrize("graphs", [False, True])
def test_a_bundle_of_texts_and_latents_is_drawn_as_our_sampler_draws_it(
    prompted_bundle: Path, graphs: bool
) -> None:
    bundle = Bundle.open(prompted_bundle)
    loaded, pipeline = load_bundle(bundle), BundlePipeline(bundle, threads=1, graphs=graphs)
    requests = [PeerRequest({"text": text}, 4, 2.0, seed) for seed, text in enumerate(PROMPTS)]
    encoder = load_text_encoder("minilm", 2)
    texts = torch.from_numpy(np.stack([encoder.encode(text) for text in PROMPTS]))
    nothing = torch.tensor([bundle.manifest.config.classes] * len(PROMPTS))
    defaults = loaded.manifest.defaults
    point = OperatingPoint(defaults.solver, 4, defaults.grid, (0.0, 1.0))
    expected = draw_pictures(loaded, LadderInputs(nothing, texts), point)
    assert np.abs(pipeline.draw(requests, 4) - expected.numpy()).max() <= model.TOLERANCE
    files = pipeline([*requests, PeerRequest({"label": 1}, 2, 1.0, 9)])
    assert [drawn(file).shape for file in files] == [(16, 16, 3)] * 4
    assert len(set(files)) == 4
