"""Requests that start from a picture become jobs that count the steps they walk."""

from __future__ import annotations

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ditserve.service.source_picture import SourcePicture, decode, encode
from tests.service.http.conftest import MANIFEST, OpenStage, Stage

pytestmark = pytest.mark.anyio

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
MASK = np.zeros((16, 16), np.uint8)
MASK[:, 8:] = 255


def data_url(pixels: npt.NDArray[np.uint8]) -> str:
    return f"data:image/png;base64,{b64encode(encode(pixels)).decode()}"


PICTURE: dict[str, Any] = {"image": data_url(PIXELS), "condition": {"label": "lemon"}}


async def test_a_picture_of_the_size_arrives_as_it_is(stage: Stage) -> None:
    assert (await stage.generate(**PICTURE, mask=data_url(MASK), strength=0.5)).status_code == 200
    source = stage.worker.claimed[-1].job.source
    assert isinstance(source, SourcePicture)
    assert source.mask is not None
    np.testing.assert_array_equal(decode(source.image), PIXELS)
    np.testing.assert_array_equal(decode(source.mask), MASK)
    assert source.strength == 0.5


async def test_the_steps_that_are_walked_are_counted(stage: Stage) -> None:
    answer = (await stage.generate(**PICTURE, strength=0.33, steps=20)).json()
    job = stage.worker.claimed[-1].job
    assert job.requested is not None
    assert (job.requested.steps, job.requested.strength, job.requested.walked) == (20, 0.33, 7)
    assert (job.steps, job.cost_rows, answer["steps_requested"]) == (7, 14, 7)
    # The lowest rung has 5 steps, of which 2 are walked.
    assert job.floor_rows == 4
    assert job.oldest_version == 2


async def test_the_default_strength_changes_most_of_it(stage: Stage) -> None:
    await stage.generate(**PICTURE)
    assert stage.worker.claimed[-1].job.steps == 16


async def test_a_cut_walks_the_same_share_of_a_lower_rung(stage: Stage) -> None:
    # 14 passes of 0.5 s do not fit, but the 4 of the rung of half the steps do.
    await stage.worker.report(step_fixed_s=0.5)
    answer = await stage.generate(**PICTURE, strength=0.33, deadline_ms=3000)
    assert answer.status_code == 200
    job = stage.worker.claimed[-1].job
    assert job.admitted is not None
    assert (job.rung, job.admitted.walked, job.cost_rows) == ("half", 4, 8)


@pytest.mark.parametrize(
    ("fields", "pointer", "words"),
    [
        ({"strength": 0.5}, "#/strength", "needs an image to start from"),
        ({"mask": data_url(MASK)}, "#/mask", "needs an image to start from"),
        ({**PICTURE, "strength": 0.25, "min_steps": 6}, "#/min_steps", "more than the 5 steps asked for"),
    ],
)
async def test_what_cannot_be_is_refused_by_its_field(
    stage: Stage, fields: dict[str, Any], pointer: str, words: str
) -> None:
    answer = await stage.generate(**fields)
    assert answer.status_code == 422
    (error,) = answer.json()["errors"]
    assert error["pointer"] == pointer
    assert words in error["detail"]


async def test_a_bundle_without_an_encoder_says_what_to_do(open_stage: OpenStage, tmp_path: Path) -> None:
    """Bundles on latents that an earlier release exported have none."""
    (tmp_path / "manifest.json").write_text(
        json.dumps({**MANIFEST, "decoder": "small", "diffusion": {**MANIFEST["diffusion"], "clip_x0": False}})
    )
    stage = await open_stage(bundle=tmp_path)
    answer = await stage.generate(**PICTURE)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid-request")
    assert "has no encoder of pictures: leave image out, or export the model again" in answer.json()["detail"]
    assert [model["pictures"] for model in (await stage.client.get("/models")).json()["models"]] == [False]
