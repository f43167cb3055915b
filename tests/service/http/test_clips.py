"""Clips and volumes over HTTP: which files can be had, how long and how fast, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from ditserve.service.fleet import Network
from ditserve.service.http.schemas import PICTURE
from tests.conftest import wait_until
from tests.service.http.conftest import MANIFEST, Stage

pytestmark = pytest.mark.anyio
OpenStage = Callable[..., Awaitable[Stage]]
FRAMES, SIDE, PATCH = 8, 16, 4
PICTURE_URL = f"data:image/png;base64,{PICTURE}"


def clip_manifest(first_axis: str, **fields: Any) -> dict[str, Any]:
    manifest = copy.deepcopy(MANIFEST)
    manifest["config"] |= {"image_size": [FRAMES, SIDE, SIDE], "patch_size": [2, PATCH, PATCH]}
    return {**manifest, "first_axis": first_axis, **fields}


def bundle_of(folder: Path, manifest: dict[str, Any]) -> Path:
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
async def clips(open_stage: OpenStage, tmp_path: Path) -> Stage:
    return await open_stage(bundle=bundle_of(tmp_path, clip_manifest("frames", fps=12.0)))


@pytest.fixture
async def volumes(open_stage: OpenStage, tmp_path: Path) -> Stage:
    return await open_stage(bundle=bundle_of(tmp_path, clip_manifest("depth")))


def refusal(response: httpx.Response) -> tuple[str, str]:
    """Return the field that a refusal names, and its sentence."""
    assert response.status_code == 422
    (error,) = response.json()["errors"]
    return error["pointer"].removeprefix("#/"), error["detail"]


async def test_a_clip_is_the_file_that_accept_asks_for(clips: Stage) -> None:
    for accept, format, kind in [
        ("*/*", "webp", "application/json"),
        ("image/gif", "gif", "image/gif"),
        ("image/apng,image/gif;q=0.9", "apng", "image/apng"),
        ("image/*", "webp", "image/webp"),
    ]:
        response = await clips.generate({"accept": accept}, condition={}, seed=1)
        job = clips.worker.claimed[-1].job
        assert (response.headers["content-type"], job.format, job.fps) == (kind, format, 12.0)
        assert (job.size, job.oldest_version) == (None, 2)
    response = await clips.generate({"accept": "image/gif"}, condition={}, seed=7)
    assert response.headers["content-disposition"] == 'inline; filename="fruits-7.gif"'


async def test_mp4_is_there_where_every_worker_writes_it(clips: Stage) -> None:
    field, said = refusal(await clips.generate(condition={}, format="mp4"))
    assert (field, said) == (
        "format",
        "Not every worker has the extra 'video', which mp4 needs: choose webp, gif or apng.",
    )
    assert (await clips.generate({"accept": "video/mp4"}, condition={})).status_code == 406
    await clips.worker.report(formats=("mp4",))

    async def listed() -> bool:
        (described,) = (await clips.client.get("/models")).json()["models"]
        return bool(described["formats"] == ["webp", "gif", "apng", "mp4"])

    await wait_until(listed)
    response = await clips.generate({"accept": "video/*"}, condition={}, seed=1)
    assert (response.status_code, response.headers["content-type"]) == (200, "video/mp4")


@pytest.mark.parametrize(
    ("asked", "field", "said"),
    [
        ({"format": "png"}, "format", "This model makes clips, which are no png: choose webp, gif or apng."),
        ({"format": "gif", "fps": 60}, "fps", "A gif plays at most 50 frames a second"),
        ({"fps": 1000}, "fps", "less than or equal to 240"),
        ({"fps": 0}, "fps", "greater than or equal to 0.1"),
        ({"frames": 0}, "frames", "greater than or equal to 1"),
        ({"frames": 9}, "frames", "Their number must be a multiple of 2."),
        ({"frames": 64}, "frames", "At most 32 frames of 16x16 pixels."),
        ({"frames": 16, "size": "32x32"}, "frames", "At most 8 frames of 32x32 pixels."),
        ({"size": "48x48", "frames": 2}, None, ""),
        ({"size": "1600x1600"}, "size", "At most 1024 pixels in all."),
        ({"size": "17x16"}, "size", "Width and height must be multiples of 4."),
        ({"frames": 4, "windows": True}, "frames", "larger than the model's own, 16x16 of 8 frames"),
        ({"windows": True}, "windows", "Name a size larger than the model's own, 16x16 of 8 frames."),
        (
            {"image": PICTURE_URL, "mask": PICTURE_URL},
            "mask",
            "A clip keeps its whole first frame and has no mask",
        ),
    ],
)
async def test_what_cannot_be_made_is_one_sentence(
    clips: Stage, asked: dict[str, Any], field: str | None, said: str
) -> None:
    await clips.worker.report(network=Network("stub", "fp32", PATCH, first_multiple=2))
    response = await clips.generate(condition={}, **asked)
    if field is None:
        assert response.status_code == 200
        return
    named, sentence = refusal(response)
    assert named == field
    assert said in sentence


async def test_frames_cost_what_their_tokens_cost(clips: Stage) -> None:
    field, said = refusal(await clips.generate(condition={}, frames=16))
    assert (field, said) == ("frames", "This model makes 8 frames only, or more with windows.")
    await clips.worker.report(network=Network("stub", "fp32", PATCH, first_multiple=2))
    asks: list[tuple[dict[str, Any], tuple[int, ...] | None, float]] = [
        ({}, None, 1.0),
        ({"frames": 8}, None, 1.0),
        ({"frames": 16}, (16, 16, 16), 2.0),
        ({"frames": 2}, (2, 16, 16), 0.25),
        ({"frames": 16, "size": "32x16"}, (16, 16, 32), 4.0),
        ({"frames": 16, "windows": True}, (16, 16, 16), 3.0),
    ]
    for asked, size, cost in asks:
        assert (await clips.generate(condition={}, seed=1, **asked)).status_code == 200
        job = clips.worker.claimed[-1].job
        assert (job.size, job.row_cost, job.cost_rows) == (size, cost, 20 * cost)


async def test_a_model_says_what_its_clips_are(clips: Stage) -> None:
    await clips.worker.report(network=Network("stub", "fp32", PATCH, first_multiple=2))
    (described,) = (await clips.client.get("/models")).json()["models"]
    assert {
        name: described[name] for name in ("kind", "frames", "frames_step", "fps", "size", "size_step")
    } == {
        "kind": "clip",
        "frames": 8,
        "frames_step": 2,
        "fps": 12.0,
        "size": "16x16",
        "size_step": 4,
    }


async def test_a_volume_is_numbers_unless_it_is_to_be_seen(volumes: Stage) -> None:
    asks: list[tuple[dict[str, Any], str, float]] = [({}, "npz", 0.0), ({"format": "webp"}, "webp", 12.0)]
    for asked, format, fps in asks:
        assert (await volumes.generate(condition={}, seed=1, **asked)).status_code == 200
        job = volumes.worker.claimed[-1].job
        assert (job.format, job.fps, job.oldest_version) == (format, fps, 2)
    response = await volumes.generate({"accept": "application/x-npz"}, condition={}, seed=1)
    assert response.headers["content-type"] == "application/x-npz"
    assert refusal(await volumes.generate(condition={}, fps=4)) == (
        "fps",
        "An npz does not play: leave fps out.",
    )
    refused = await volumes.generate(condition={}, image=PICTURE_URL)
    assert refusal(refused) == (
        "image",
        "This model makes volumes, which start from no picture: leave it out.",
    )


async def test_a_picture_has_neither_frames_nor_a_rate(stage: Stage) -> None:
    asks: list[tuple[dict[str, Any], str, str]] = [
        ({"frames": 8}, "frames", "This model makes pictures, which have no frames: leave it out."),
        ({"fps": 8}, "fps", "A picture does not play: leave fps out."),
        (
            {"format": "gif"},
            "format",
            "This model makes pictures, which are no gif: choose png, webp or jpeg.",
        ),
    ]
    for asked, field, said in asks:
        assert refusal(await stage.generate(condition={}, **asked)) == (field, said)
    assert (await stage.generate({"accept": "image/gif"}, condition={})).status_code == 406
    await stage.generate(condition={}, seed=1)
    assert stage.worker.claimed[-1].job.oldest_version == 1


async def test_a_clip_may_begin_with_a_picture(clips: Stage) -> None:
    asks: list[tuple[dict[str, Any], float]] = [({}, 1.0), ({"strength": 0.5}, 0.5)]
    for asked, strength in asks:
        response = await clips.generate(condition={}, image=PICTURE_URL, seed=1, **asked)
        assert response.status_code == 200
        job = clips.worker.claimed[-1].job
        assert job.source is not None
        assert job.requested is not None
        assert (job.source.mask, job.source.strength, job.requested.strength) == (None, strength, strength)


async def test_openais_route_answers_a_clip_as_webp(clips: Stage) -> None:
    response = await clips.client.post("/v1/images/generations", json={"prompt": "apple"})
    assert (response.status_code, response.json()["output_format"]) == (200, "webp")
    refused = await clips.client.post(
        "/v1/images/generations", json={"prompt": "apple", "output_format": "png"}
    )
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == (
        "output_format: This model makes clips, which are no png: choose webp, or ask /generate."
    )
