"""Image sizes: the model's own always works, others if every worker makes them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from ditserve.model.spec.manifest import Manifest
from ditserve.service.fleet import Network
from ditserve.service.http.sizes import AskedSize, OutputSize, in_windows
from tests.service.http.conftest import MANIFEST, Stage

pytestmark = pytest.mark.anyio
OpenStage = Callable[..., Awaitable[Stage]]


def detail(response: httpx.Response) -> str:
    assert response.status_code == 422
    body: dict[str, Any] = response.json()
    assert body["errors"][0]["pointer"] == "#/size"
    return str(body["detail"])


async def test_a_size_that_the_workers_make_reaches_them(stage: Stage) -> None:
    patch = MANIFEST["config"]["patch_size"]
    height, width = MANIFEST["config"]["image_size"]
    await stage.worker.report(network=Network("stub", "fp32", patch))
    response = await stage.generate(condition={}, size=f"{2 * width}x{height}", seed=1)
    assert response.status_code == 200
    assert stage.worker.claimed[-1].job.size == (height, 2 * width)
    wide = stage.worker.claimed[-1].job.cost_rows
    await stage.generate(condition={}, size=f"{width}x{height}", seed=1)
    assert stage.worker.claimed[-1].job.size is None
    assert wide == 2 * stage.worker.claimed[-1].job.cost_rows


async def test_what_cannot_be_made_is_refused_with_what_can(stage: Stage) -> None:
    patch = MANIFEST["config"]["patch_size"]
    height, width = MANIFEST["config"]["image_size"]
    other = f"{2 * width}x{height}"
    assert "images only" in detail(await stage.generate(condition={}, size=other))
    await stage.worker.report(network=Network("stub", "fp32", patch))
    uneven = f"{width + 1}x{height}"
    assert f"multiples of {patch}" in detail(await stage.generate(condition={}, size=uneven))
    assert "Write it as width x height" in detail(await stage.generate(condition={}, size=f"0x{height}"))
    huge = f"{patch * 1000}x{patch * 1000}"
    assert "pixels in all" in detail(await stage.generate(condition={}, size=huge))


async def test_in_windows_any_model_makes_what_is_larger_at_the_price_of_their_rows(stage: Stage) -> None:
    height, width = MANIFEST["config"]["image_size"]
    await stage.generate(condition={}, seed=1)
    own = stage.worker.claimed[-1].job
    assert own.windows == 0
    for size, latent, windows in [
        (f"{4 * width}x{height}", (height, 4 * width), 7),
        (f"{width}x{height + 1}", (height + 1, width), 2),
        (f"{2 * width}x{2 * height}", (2 * height, 2 * width), 9),
    ]:
        assert (await stage.generate(condition={}, size=size, windows=True, seed=1)).status_code == 200
        job = stage.worker.claimed[-1].job
        assert (job.size, job.windows, job.cost_rows) == (latent, windows, windows * own.cost_rows)


async def test_what_has_no_windows_is_refused(stage: Stage) -> None:
    height, width = MANIFEST["config"]["image_size"]
    for smaller in (f"{width}x{height}", f"{4 * width}x{height - 1}", f"{width - 1}x{4 * height}", "1x1"):
        text = detail(await stage.generate(condition={}, size=smaller, windows=True))
        assert f"larger than the model's own, {width}x{height}" in text
    large = detail(await stage.generate(condition={}, size=f"{4 * width + 1}x{height}", windows=True))
    assert f"At most {4 * width * height} pixels" in large
    response = await stage.generate(condition={}, windows=True)
    assert response.status_code == 422
    assert response.json()["errors"][0]["pointer"] == "#/windows"


async def test_a_deadline_is_weighed_against_the_rows_of_all_windows(stage: Stage) -> None:
    height, width = MANIFEST["config"]["image_size"]
    await stage.worker.report(step_per_row_s=0.01)
    asked: dict[str, Any] = {"condition": {}, "steps": 20, "deadline_ms": 1000, "allow_degraded": False}
    assert (await stage.generate(**asked)).status_code == 200  # 40 rows
    wide = await stage.generate(**asked, size=f"{4 * width}x{height}", windows=True)
    assert wide.status_code == 503


def test_windows_over_latents_are_reckoned_in_pixels_of_the_image() -> None:
    config = {**MANIFEST["config"], "in_channels": 4}
    manifest = Manifest.model_validate(
        {
            **MANIFEST,
            "config": config,
            "decoder": "small",
            "diffusion": {**MANIFEST["diffusion"], "clip_x0": False},
        }
    )
    height, width = MANIFEST["config"]["image_size"]
    wide = in_windows(AskedSize(f"{16 * width}x{8 * height}"), manifest, max_area=4)
    assert wide == OutputSize((height, 2 * width), 3, 3.0)
    with pytest.raises(ValueError, match="multiples of 8"):
        in_windows(AskedSize(f"{16 * width + 1}x{8 * height}"), manifest, max_area=4)


async def test_without_workers_only_the_models_own_size_is_known(open_stage: OpenStage) -> None:
    stage = await open_stage(worker=False)
    height, width = MANIFEST["config"]["image_size"]
    response = await stage.generate(condition={}, size=f"{2 * width}x{height}")
    assert response.status_code == 503
    assert response.headers["retry-after"]
    wide = await stage.generate(
        {"prefer": "respond-async"}, condition={}, size=f"{2 * width}x{height}", windows=True
    )
    # A worker that starts later will make it.
    assert wide.status_code == 202
