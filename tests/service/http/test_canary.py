"""The canary: its drawing is compared with the bundle's golden image, through queue and worker."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from io import BytesIO
from math import ceil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prometheus_client import REGISTRY

from ditserve.model.spec.bundle import GOLDEN
from ditserve.model.spec.errors import BundleError
from ditserve.service.errors import Overloaded
from ditserve.service.http.app import create_app
from ditserve.service.http.canary import SAME_DB, SHARE, Canary, next_tick, psnr, ticks_between
from ditserve.service.settings import Settings
from tests.conftest import ManualClock, wait_until
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
    assert await canary(stage).draw("now") == SAME_DB
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
    assert await canary(stage).draw("now") < 10
    assert metric("dit_canary_total", model="fruits", outcome="drifted") == before + 1


@pytest.mark.anyio
async def test_draws_by_itself_and_survives_refusals(
    open_stage: OpenStage, bundle: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, refused = Canary.draw, metric("dit_canary_total", model="fruits", outcome="skipped")
    tried: list[int] = []

    async def first_refused(self: Canary, key: str) -> float:
        tried.append(1)
        if len(tried) == 1:
            raise Overloaded()
        return await draw(self, key)

    monkeypatch.setattr(Canary, "draw", first_refused)
    stage = await open_stage(bundle=bundle(PNG), canary_s=0.01)
    await wait_until(lambda: stage.worker.claimed)
    assert metric("dit_canary_total", model="fruits", outcome="skipped") == refused + 1


@pytest.mark.anyio
async def test_processes_share_a_drawing(open_stage: OpenStage, bundle: Callable[[bytes], Path]) -> None:
    stage = await open_stage(bundle=bundle(PNG))
    for _ in range(3):
        await canary(stage).watch(tick=64, every_s=300.0)
    await canary(stage).watch(tick=65, every_s=300.0)
    assert len(stage.worker.claimed) == 2


@pytest.mark.anyio
async def test_drawings_of_a_slow_model_are_rare(
    open_stage: OpenStage, bundle: Callable[[bytes], Path]
) -> None:
    stage = await open_stage(bundle=bundle(PNG))
    # A guided step takes 6 s, so the 12 of the golden image take 72 s: every 32nd of 300 s is below 1 %.
    await stage.worker.report(step_per_row_s=3.0)
    for tick in range(64, 128):
        await canary(stage).watch(tick, every_s=300.0)
    assert len(stage.worker.claimed) == 2
    skipped = metric("dit_canary_total", model="fruits", outcome="skipped")
    await stage.broker.retire("stub")
    await canary(stage).watch(128, every_s=300.0)
    assert metric("dit_canary_total", model="fruits", outcome="skipped") == skipped + 1
    assert len(stage.worker.claimed) == 2


@pytest.mark.parametrize(("drawing_s", "ticks"), [(0.0, 1), (3.0, 1), (3.1, 2), (10.0, 4), (20.0, 8)])
def test_a_drawing_takes_at_most_its_share(drawing_s: float, ticks: int) -> None:
    assert ticks_between(drawing_s, every_s=300.0) == ticks
    assert drawing_s <= SHARE * 300.0 * ticks


@pytest.mark.anyio
async def test_ticks_are_those_of_the_clock_of_the_queue(clock: ManualClock) -> None:
    async def ticking() -> int:
        waiting = asyncio.create_task(next_tick(clock, 0.05))
        await asyncio.sleep(0)
        clock.now = ceil(clock.now / 0.05 + 0.01) * 0.05
        return await waiting

    assert await ticking() == await ticking() - 1


def test_likeness() -> None:
    black, almost = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 1, np.uint8)
    assert psnr(black, black) == SAME_DB
    # 10·log10(255²)
    assert psnr(black, almost) == pytest.approx(48.13, abs=0.01)
    assert psnr(black, np.full((4, 4, 3), 255, np.uint8)) == 0


@pytest.mark.parametrize("image", [b"", b"no image", PNG[:20]], ids=range(3))
def test_a_golden_image_that_is_none_is_refused_at_the_start(
    bundle: Callable[[bytes], Path], image: bytes
) -> None:
    with pytest.raises(BundleError, match=r"golden\.png is no image .*: export the bundle again"):
        create_app(Settings.parse([f"--bundle={bundle(image)}"]))
