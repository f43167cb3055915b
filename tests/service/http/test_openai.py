"""The official `openai` client against the service, over a socket."""

import base64
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from ditserve.service.http.openai_drawing import rung_for
from ditserve.service.jobs import ConditionTerm
from ditserve.service.planning.ladder import Ladder
from ditserve.service.rung import Rung
from tests.service.http.conftest import PNG, Serve, Stage

pytestmark = pytest.mark.anyio

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


def test_without_a_ladder_every_quality_is_the_default() -> None:
    assert rung_for("low", Ladder([])) is None
    only = Rung("only", "ddim", 10, "trailing", (0.0, 1.0), 0.0)
    assert rung_for("low", Ladder([only])) == rung_for("high", Ladder([only])) == only


def test_low_quality_is_never_a_rung_that_costs_more_than_a_better_one() -> None:
    steps = {100: 0.14, 20: 0.12, 4: 0.13}  # the long run lies farther from real pictures than the others
    ladder = Ladder([Rung(f"ddim-{n}", "ddim", n, "trailing", (0.0, 1.0), q) for n, q in steps.items()])
    chosen = [rung_for(quality, ladder) for quality in ("high", "low")]
    assert [rung and rung.steps for rung in chosen] == [20, 4]


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


async def test_models_are_listed(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["fruits"]
    assert (await client.models.retrieve("fruits")).owned_by == "dit"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("gpt-image-1")
    assert caught.value.code == "model-not-found"
