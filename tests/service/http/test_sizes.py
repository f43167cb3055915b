"""Image sizes: the model's own always, others as far as every worker makes them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from service.jobs import Network
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
    for wrong in (f"{width + 1}x{height}", f"0x{height}"):
        assert f"multiples of {patch}" in detail(await stage.generate(condition={}, size=wrong))
    huge = f"{patch * 1000}x{patch * 1000}"
    assert "pixels in all" in detail(await stage.generate(condition={}, size=huge))


async def test_without_workers_only_the_models_own_size_is_known(open_stage: OpenStage) -> None:
    stage = await open_stage(worker=False)
    height, width = MANIFEST["config"]["image_size"]
    response = await stage.generate(condition={}, size=f"{2 * width}x{height}")
    assert response.status_code == 503
    assert response.headers["retry-after"]
