"""The canary: its drawing is compared with the bundle's golden image, through queue and worker."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prometheus_client import REGISTRY

from ditserve.model.spec.bundle import GOLDEN
from ditserve.service.errors import Overloaded
from ditserve.service.http.canary import SAME_DB, Canary, psnr
from tests.conftest import wait_until
from tests.service.http.conftest import MANIFEST, PNG, OpenStage, Stage

GOLD = {
    "condition": {"label": "lemon", "style": "noto"},
    "seed": 3,
    "steps": 12,
    "solver": "ddim",
    "grid": "trailing",
    "guidance_scale": 2.0,
}


@pytest.fixture
def bundle(bundle_path: Path, tmp_path: Path) -> Callable[[bytes], Path]:
    """A bundle with this golden image."""

    def make(image: bytes) -> Path:
        folder = Path(shutil.copytree(bundle_path, tmp_path / "golden"))
        files = {GOLDEN: {"sha256": sha256(image).hexdigest(), "bytes": len(image)}}
        (folder / "manifest.json").write_text(json.dumps({**MANIFEST, "golden": GOLD, "files": files}))
        (folder / GOLDEN).write_bytes(image)
        return folder

    return make


def canary(stage: Stage) -> Canary:
    canary: Canary | None = stage.app.state.context.default.canary
    assert canary
    return canary


def gray(level: int, side: int = 1) -> bytes:
    out = BytesIO()
    Image.new("RGB", (side, side), (level,) * 3).save(out, "png")
    return out.getvalue()


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.mark.anyio
async def test_the_golden_image_is_asked_for_as_it_was_drawn(
    open_stage: OpenStage, bundle: Callable[[bytes], Path]
) -> None:
    stage = await open_stage(bundle=bundle(PNG))
    before = metric("dit_canary_total", model="fruits", outcome="same")
    assert await canary(stage).draw() == SAME_DB
    job = stage.worker.claimed[0].job
    assert (job.condition[0].labels, job.seeds, job.steps, job.solver) == ((3, 0), (3,), 12, "ddim")
    assert (job.allow_degraded, job.priority, job.caller) == (False, "low", "canary")
    assert metric("dit_canary_total", model="fruits", outcome="same") == before + 1
    assert metric("dit_canary_psnr_db", model="fruits") == SAME_DB


@pytest.mark.anyio
@pytest.mark.parametrize("golden", [gray(200), gray(0, side=2)], ids=["other", "another-size"])
async def test_drift_is_seen(open_stage: OpenStage, bundle: Callable[[bytes], Path], golden: bytes) -> None:
    stage = await open_stage(bundle=bundle(golden))
    before = metric("dit_canary_total", model="fruits", outcome="drifted")
    assert await canary(stage).draw() < 10
    assert metric("dit_canary_total", model="fruits", outcome="drifted") == before + 1


@pytest.mark.anyio
async def test_draws_by_itself_and_survives_refusals(
    open_stage: OpenStage, bundle: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, refused = Canary.draw, metric("dit_canary_total", model="fruits", outcome="skipped")
    tried: list[int] = []

    async def first_refused(self: Canary) -> float:
        tried.append(1)
        if len(tried) == 1:
            raise Overloaded()
        return await draw(self)

    monkeypatch.setattr(Canary, "draw", first_refused)
    stage = await open_stage(bundle=bundle(PNG), canary_s=0.01)
    await wait_until(lambda: stage.worker.claimed)
    assert metric("dit_canary_total", model="fruits", outcome="skipped") == refused + 1


def test_likeness() -> None:
    black, almost = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 1, np.uint8)
    assert psnr(black, black) == SAME_DB
    # 10·log10(255²)
    assert psnr(black, almost) == pytest.approx(48.13, abs=0.01)
    assert psnr(black, np.full((4, 4, 3), 255, np.uint8)) == 0
