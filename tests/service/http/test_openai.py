"""The official `openai` client against the service, over a socket."""

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from ditserve.model.spec.stretches import Stretch
from ditserve.service.http.openai_drawing import rung_for
from ditserve.service.http.openai_schemas import ImagesRequest
from ditserve.service.jobs import ConditionTerm
from ditserve.service.planning.ladder import Ladder
from ditserve.service.rung import Rung
from ditserve.service.source_picture import decode
from tests.service.http.conftest import MANIFEST, PNG, OpenStage, Serve, Stage
from tests.service.http.test_pictures import halves, saved

pytestmark = pytest.mark.anyio

PHOTO = saved(halves(32, 16), "JPEG", quality=95)
_holed = Image.new("RGBA", (32, 16), "white")
_holed.paste((0, 0, 0, 0), (0, 0, 16, 16))
MASK = saved(_holed)
B64 = base64.b64encode(PNG).decode()


@pytest.fixture
async def client(stage: Stage, serve: Serve) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"http://127.0.0.1:{await serve(stage)}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        yield client


async def test_a_prompt_names_classes(stage: Stage, client: openai.AsyncOpenAI) -> None:
    answer = await client.images.generate(
        model="fruits", prompt="Two shiny red apples, twemoji style", n=2, size="16x16", output_format="webp"
    )
    assert answer.data is not None
    assert [image.b64_json for image in answer.data] == [B64, B64]
    assert (answer.output_format, answer.size) == ("webp", "16x16")
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (2, 32)
    job = stage.worker.claimed[-1].job
    assert job.condition == (ConditionTerm((1, 1)),)
    assert (job.format, len(job.seeds)) == ("webp", 2)


@pytest.mark.parametrize(
    ("quality", "steps", "solver"),
    [("high", 20, "ddim"), ("medium", 10, "dpmpp-2m"), ("low", 5, "dpmpp-2m"), ("auto", 20, "ddim")],
)
async def test_quality_chooses_a_rung(
    stage: Stage, client: openai.AsyncOpenAI, quality: str, steps: int, solver: str
) -> None:
    parameters: dict[str, Any] = {"prompt": "lemon", "quality": quality, "response_format": "b64_json"}
    await client.images.generate(**parameters)
    job = stage.worker.claimed[-1].job
    assert (job.steps, job.solver) == (steps, solver)


def rung_of(quality: Any, ladder: Ladder) -> Rung | None:
    return rung_for(ImagesRequest.model_validate({"prompt": "lemon", "quality": quality}), ladder)


def test_without_a_ladder_every_quality_is_the_default() -> None:
    assert rung_of("low", Ladder([])) is None
    only = Rung("only", "ddim", 10, "trailing", (0.0, 1.0), 0.0)
    assert rung_of("low", Ladder([only])) == rung_of("high", Ladder([only])) == only


def test_low_quality_is_never_a_rung_that_costs_more_than_a_better_one() -> None:
    steps = {100: 0.14, 20: 0.12, 4: 0.13}  # the long run lies farther from real pictures than the others
    ladder = Ladder([Rung(f"ddim-{n}", "ddim", n, "trailing", (0.0, 1.0), q) for n, q in steps.items()])
    chosen = [rung_of(quality, ladder) for quality in ("high", "low")]
    assert [rung and rung.steps for rung in chosen] == [20, 4]


async def test_quality_may_be_a_rung_of_another_network_and_min_quality_keeps_it_away(
    stage: Stage, client: openai.AsyncOpenAI
) -> None:
    submissions = stage.app.state.context.default.submissions
    few = Rung("few", "ddim", 2, "trailing", (0.0, 1.0), 0.6, stretches=(Stretch(0.0, "student", 0.5),))
    submissions.ladder = Ladder([*submissions.ladder.rungs, few])
    await client.images.generate(prompt="lemon", quality="low")
    job = stage.worker.claimed[-1].job
    assert (job.requested, job.admitted, job.steps, job.cost_rows) == (few, few, 2, 2)
    await client.images.generate(prompt="lemon", quality="low", extra_body={"min_quality": 0.55})
    assert stage.worker.claimed[-1].job.rung != "few"
    assert (stage.worker.claimed[-1].job.requested or few).name == "floor"


async def test_partial_images_are_streamed(stage: Stage, client: openai.AsyncOpenAI) -> None:
    stream = await client.images.generate(prompt="lemon", stream=True, partial_images=2)
    events = [event async for event in stream]
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [event.b64_json for event in events] == [B64] * 3
    assert [event.partial_image_index for event in events[:2]] == [0, 1]  # type: ignore[union-attr]
    assert events[2].usage.output_tokens == 16  # type: ignore[union-attr]


async def test_a_stream_without_partial_images_is_the_image(client: openai.AsyncOpenAI) -> None:
    stream = await client.images.generate(prompt="lemon", stream=True)
    assert [event.type async for event in stream] == ["image_generation.completed"]


async def test_a_failure_while_streaming_is_an_error(stage: Stage, client: openai.AsyncOpenAI) -> None:
    stage.worker.fail_with = {"code": "numerical-error", "detail": "NaN.", "extra": {}}
    with pytest.raises(openai.APIError, match="NaN"):
        _ = [event async for event in await client.images.generate(prompt="lemon", stream=True)]


async def test_an_unknown_prompt_is_400_with_suggestions(stage: Stage, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.images.generate(prompt="a strawbery, noto")
    assert caught.value.code == "unknown-condition"
    assert caught.value.type == "invalid_request_error"
    assert "strawberry" in caught.value.message
    assert not stage.worker.claimed


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"size": "1024x1024"}, "size"),
        ({"n": 11}, "n"),
        ({"response_format": "url"}, "response_format"),
        ({"background": "transparent"}, "background"),
        ({"extra_body": {"colour": "red"}}, "colour"),
        ({"partial_images": 2}, "partial_images"),
        ({"stream": True, "n": 2}, "n"),
        ({"style": "vivid"}, "style"),
        ({"output_compression": 50}, "output_compression"),
        ({"output_format": "gif", "extra_body": {"frame_count": 4}}, "output_format"),
        ({"extra_body": {"svg": {"model": "x"}}}, "svg"),
        ({"extra_body": {"complexity": "high"}}, "complexity"),
    ],
)
async def test_what_cannot_be_honoured_is_400_and_named(
    client: openai.AsyncOpenAI, options: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.images.generate(prompt="lemon", **options)  # type: ignore[call-overload]
    assert caught.value.param == param


async def test_an_unknown_model_is_404(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.images.generate(prompt="lemon", model="gpt-image-1")
    assert caught.value.code == "model-not-found"


async def test_a_seed_is_an_extension(stage: Stage, client: openai.AsyncOpenAI) -> None:
    await client.images.generate(prompt="lemon", extra_body={"seed": 99, "guidance_scale": 3.5})
    job = stage.worker.claimed[-1].job
    assert (job.seeds, job.guidance_scale) == ((99,), 3.5)


async def test_a_refusal_for_now_says_when_to_come_back(stage: Stage, client: openai.AsyncOpenAI) -> None:
    stage.app.state.draining.set()
    with pytest.raises(openai.InternalServerError) as caught:
        await client.images.generate(prompt="lemon")
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.type == "server_error"


async def test_hints_for_openais_monitoring_have_no_effect(stage: Stage, client: openai.AsyncOpenAI) -> None:
    hints = {"user": "u", "moderation": "low", "extra_body": {"safety_identifier": "hash", "style": None}}
    await client.images.generate(prompt="lemon", **hints)  # type: ignore[call-overload]
    assert stage.worker.claimed[-1].job.condition == (ConditionTerm((3, None)),)


class TestEdits:
    async def test_a_picture_and_its_mask_as_files(self, stage: Stage, client: openai.AsyncOpenAI) -> None:
        answer = await client.images.edit(
            image=("photo.jpg", PHOTO),
            mask=("mask.png", MASK),
            prompt="a lemon in noto style",
            n=2,
            size="16x16",
            quality="medium",
            extra_body={"seed": 5, "strength": 0.5, "condition": {}},
        )
        assert answer.data is not None
        assert [image.b64_json for image in answer.data] == [B64, B64]
        assert answer.usage is not None
        assert answer.usage.input_tokens_details.image_tokens == 16
        job = stage.worker.claimed[-1].job
        assert job.source is not None
        assert job.source.mask is not None
        assert decode(job.source.image).shape == (16, 16, 3)
        assert np.array_equal(decode(job.source.mask)[0], [255] * 8 + [0] * 8)
        assert (job.condition, job.seeds) == ((ConditionTerm((3, 0)),), (5, 6))
        assert (job.steps, job.source.strength) == (5, 0.5)

    async def test_a_list_of_one_picture(self, stage: Stage, client: openai.AsyncOpenAI) -> None:
        await client.images.edit(image=[("a.png", PHOTO)], prompt="lemon", response_format="b64_json")
        assert stage.worker.claimed[-1].job.source is not None
        with pytest.raises(openai.BadRequestError) as caught:
            await client.images.edit(image=[("a.png", PHOTO)] * 2, prompt="lemon")
        assert caught.value.param == "image"

    async def test_partial_images_are_streamed(self, stage: Stage, client: openai.AsyncOpenAI) -> None:
        stream = await client.images.edit(
            image=("a.png", PHOTO), prompt="lemon", stream=True, partial_images=2
        )
        events = [event async for event in stream]
        kinds = ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
        assert [event.type for event in events] == kinds
        assert events[2].usage.output_tokens == 16  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        ("options", "param"),
        [
            ({"image": ("a.gif", b"GIF89a")}, "image"),
            ({"image": ("a.png", b"")}, "image"),
            ({"mask": ("a.png", b"?")}, "mask"),
            ({"mask": ("a.png", PHOTO[:99])}, "mask"),
            ({"prompt": ""}, "prompt"),
            ({"n": 11}, "n"),
            ({"input_fidelity": "high"}, "input_fidelity"),
            ({"markup": ("a.png", MASK)}, "markup"),
            ({"background": "transparent"}, "background"),
            ({"extra_body": {"strength": 0}}, "strength"),
            ({"extra_body": {"strength": "much"}}, "strength"),
            ({"extra_body": {"svg": {"model": "x"}}}, "svg[model]"),
        ],
    )
    async def test_what_cannot_be_honoured_is_400_and_named(
        self, stage: Stage, client: openai.AsyncOpenAI, options: dict[str, Any], param: str
    ) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.images.edit(**{"image": ("a.png", PHOTO), "prompt": "lemon", **options})
        assert caught.value.param == param
        assert not stage.worker.claimed


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
class TestVariations:
    async def test_a_picture_without_a_prompt(self, stage: Stage, client: openai.AsyncOpenAI) -> None:
        answer = await client.images.create_variation(image=("a.png", PHOTO), n=2, user="u")
        assert answer.data is not None
        assert len(answer.data) == 2
        job = stage.worker.claimed[-1].job
        assert job.source is not None
        assert (job.condition, job.guidance_scale) == ((ConditionTerm((None, None)),), 1.0)

    async def test_a_model_that_draws_nothing_without_a_condition_has_none(
        self, open_stage: OpenStage, serve: Serve, tmp_path: Path
    ) -> None:
        manifest = {**MANIFEST, "guidance": "none"}
        manifest["defaults"] = {**MANIFEST["defaults"], "guidance_scale": 1.0}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        stage = await open_stage(bundle=tmp_path)
        files, path = {"image": ("a.png", PHOTO)}, "/v1/images/variations"
        response = await stage.client.post(path, files=files)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "image")
        assert "/v1/images/edits" in response.json()["error"]["message"]
        conditioned = {"condition": json.dumps({"label": "lemon"})}
        assert (await stage.client.post(path, files=files, data=conditioned)).status_code == 200


async def test_a_model_without_an_encoder_starts_from_no_picture(
    open_stage: OpenStage, tmp_path: Path
) -> None:
    config = {**MANIFEST["config"], "in_channels": 4}
    manifest = {
        **MANIFEST,
        "config": config,
        "decoder": "sd-vae",
        "diffusion": {**MANIFEST["diffusion"], "clip_x0": False},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    stage = await open_stage(bundle=tmp_path)
    assert (await stage.client.get("/models")).json()["models"][0]["pictures"] is False
    for path in ("/v1/images/edits", "/v1/images/variations", "/generate"):
        data = {} if path.endswith("variations") else {"prompt": "lemon"}
        response = await stage.client.post(path, files={"image": ("a.png", PHOTO)}, data=data)
        assert response.status_code in (400, 422), path
        assert "This model has no encoder of pictures" in response.text


async def test_models_are_listed(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["fruits"]
    assert (await client.models.retrieve("fruits")).owned_by == "dit"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("gpt-image-1")
    assert caught.value.code == "model-not-found"
