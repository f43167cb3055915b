"""The promises that `POST /generate` and OpenAI's routes keep alike, tried at all."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.prompt_limit import PromptLimit
from ditserve.service.api_keys import add
from ditserve.service.http.openai_drawing import translate
from ditserve.service.http.openai_schemas import ImagesRequest
from ditserve.service.http.picture_reader import PictureReader
from ditserve.service.http.schemas import MAX_SEED, DrawingOptions
from ditserve.service.http.submission import Submissions
from ditserve.service.queue.queue_client import Queue
from ditserve.service.settings import Settings
from tests.conftest import wait_until
from tests.service.http.conftest import MANIFEST, OpenStage, Serve, Stage
from tests.service.http.test_pictures import halves, saved

pytestmark = pytest.mark.anyio
OPENAI = "/v1/images/generations"


@dataclass(frozen=True)
class Door:
    """One way in: its path, a body that it takes, and the files of a form."""

    path: str
    body: dict[str, Any]
    # The status of a field that is wrong: OpenAI's clients know 400.
    wrong: int
    files: dict[str, tuple[str, bytes]] | None = None

    async def knock(
        self, client: httpx.AsyncClient, headers: dict[str, str] | None = None, **more: Any
    ) -> httpx.Response:
        body = self.body | more
        if self.files is None:
            return await client.post(self.path, json=body, headers=headers or {})
        # In a form everything is written as in JSON, but texts without their quotes.
        written = {name: v if isinstance(v, str) else json.dumps(v) for name, v in body.items()}
        return await client.post(self.path, data=written, files=self.files, headers=headers or {})


def code(response: httpx.Response) -> str:
    content = response.json()
    return str(content.get("error", content)["code"])


PICTURE = {"image": ("a.png", saved(halves(16, 16)))}
DOORS = {
    "generate": Door("/generate", {"condition": {"label": "lemon"}}, 422),
    "form": Door("/generate", {"condition": {"label": "lemon"}}, 422, PICTURE),
    "openai": Door(OPENAI, {"prompt": "a lemon"}, 400),
    "edits": Door("/v1/images/edits", {"prompt": "a lemon"}, 400, PICTURE),
    "variations": Door("/v1/images/variations", {}, 400, PICTURE),
}


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest) -> Door:
    return DOORS[request.param]


KEY = {"idempotency-key": "order-1"}


class TestIdempotencyKey:
    async def test_a_repeat_is_answered_with_the_first_images(self, stage: Stage, door: Door) -> None:
        first, again = [await door.knock(stage.client, KEY, n=2) for _ in range(2)]
        assert again.json() == first.json()
        assert again.headers["idempotency-replayed"] == "true"
        assert again.headers["x-job-id"] == first.headers["x-job-id"]
        assert len(stage.worker.claimed) == 1

    async def test_while_the_first_runs_it_is_409(self, stage: Stage, door: Door) -> None:
        stage.worker.hold = True
        first = asyncio.create_task(door.knock(stage.client, KEY))
        await wait_until(lambda: len(stage.worker.claimed) == 1)
        response = await door.knock(stage.client, KEY)
        assert (response.status_code, code(response)) == (409, "idempotency-conflict")
        assert response.headers["retry-after"] == "1"
        claim = stage.worker.claimed[0]
        await stage.broker.finish(claim.lease, stage.worker.result(claim))
        assert (await first).status_code == 200

    async def test_another_body_is_refused(self, stage: Stage, door: Door) -> None:
        await door.knock(stage.client, KEY)
        response = await door.knock(stage.client, KEY, seed=7)
        assert (response.status_code, code(response)) == (door.wrong, "idempotency-mismatch")

    async def test_a_malformed_key_is_refused(self, stage: Stage, door: Door) -> None:
        response = await door.knock(stage.client, {"idempotency-key": "a b"})
        assert (response.status_code, code(response)) == (door.wrong, "invalid-request")

    async def test_the_job_goes_on_without_its_client(self, stage: Stage, door: Door, serve: Serve) -> None:
        stage.worker.hold = True
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{await serve(stage)}") as client:
            leaving = asyncio.create_task(door.knock(client, KEY))
            await wait_until(lambda: len(stage.worker.claimed) == 1)
            leaving.cancel()
            await asyncio.wait([leaving])
        claim = stage.worker.claimed[0]
        assert await stage.broker.finish(claim.lease, stage.worker.result(claim))
        assert (await door.knock(stage.client, KEY)).headers["idempotency-replayed"] == "true"


async def test_one_key_at_both_doors_is_two_requests(stage: Stage) -> None:
    key = {"idempotency-key": "order-2"}
    await stage.generate(key, condition={"label": "lemon"})
    response = await stage.client.post(OPENAI, json={"prompt": "a lemon"}, headers=key)
    assert (response.status_code, code(response)) == (400, "idempotency-mismatch")


async def test_other_words_of_one_class_are_another_request(stage: Stage) -> None:
    key = {"idempotency-key": "order-3"}
    one, other = [
        await stage.client.post(OPENAI, json={"prompt": prompt}, headers=key)
        for prompt in ("a lemon", "one lemon")
    ]
    assert (one.status_code, other.status_code) == (200, 400)


STREAM = {"prompt": "a lemon", "stream": True, "partial_images": 1}


class TestStreamWithAKey:
    async def test_a_repeat_is_the_same_stream(self, stage: Stage) -> None:
        first, again = [await stage.client.post(OPENAI, json=STREAM, headers=KEY) for _ in range(2)]
        kinds = [line for line in first.text.splitlines() if line.startswith("event")]
        assert kinds == ["event: image_generation.partial_image", "event: image_generation.completed"]
        assert kinds == [line for line in again.text.splitlines() if line.startswith("event")]
        assert again.headers["idempotency-replayed"] == "true"
        assert again.headers["x-job-id"] == first.headers["x-job-id"]
        assert len(stage.worker.claimed) == 1

    async def test_while_the_first_runs_it_is_409(self, stage: Stage, serve: Serve) -> None:
        stage.worker.hold = True
        async with (
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{await serve(stage)}") as client,
            client.stream("POST", OPENAI, json=STREAM, headers=KEY),
        ):
            await wait_until(lambda: len(stage.worker.claimed) == 1)
            response = await client.post(OPENAI, json=STREAM, headers=KEY)
            assert (response.status_code, code(response)) == (409, "idempotency-conflict")
        claim = stage.worker.claimed[0]
        assert await stage.broker.finish(claim.lease, stage.worker.result(claim)), "it was cancelled"


def last_event(answer: httpx.Response) -> dict[str, Any]:
    kind, data = answer.text.strip().split("\n")[-2:]
    assert kind == "event: error"
    error: dict[str, Any] = json.loads(data.removeprefix("data: "))
    return error


async def test_a_stream_keeps_its_deadline(stage: Stage) -> None:
    stage.worker.hold = True
    body = STREAM | {"deadline_ms": 600, "min_steps": 1}
    answer = await asyncio.wait_for(stage.client.post(OPENAI, json=body), 10)
    assert last_event(answer)["error"]["code"] == "deadline-exceeded"
    status = await stage.broker.status(stage.worker.claimed[0].job.id)
    assert status is not None
    assert status.state == "cancelled"


async def test_a_stream_ends_when_its_process_must_stop(open_stage: OpenStage) -> None:
    stage = await open_stage(drain_s=0.05)
    stage.worker.hold = True
    streaming = asyncio.create_task(stage.client.post(OPENAI, json=STREAM))
    await wait_until(lambda: len(stage.worker.claimed) == 1)
    stage.app.state.draining.set()
    assert last_event(await asyncio.wait_for(streaming, 10))["error"]["code"] == "draining"


async def test_a_key_has_so_many_jobs_at_a_time(open_stage: OpenStage, door: Door, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    _, text = add(keys, "shop", concurrency=1)
    stage = await open_stage(keys_file=keys)
    stage.worker.hold = True
    key = {"authorization": f"Bearer {text}"}
    await stage.generate(key | {"prefer": "respond-async"})
    response = await door.knock(stage.client, key)
    assert (response.status_code, code(response)) == (429, "quota-exceeded")


async def test_options_of_the_queue_and_the_planner(stage: Stage, door: Door) -> None:
    await door.knock(
        stage.client, priority="high", deadline_ms=60000, min_steps=5, seed=3, guidance_scale=-0.0
    )
    await door.knock(stage.client, priority="low", allow_degraded=False)
    first, second = (claim.job for claim in stage.worker.claimed)
    assert first.deadline_at is not None
    assert (first.priority, first.min_steps, first.seeds) == ("high", 5, (3,))
    assert math.copysign(1.0, first.guidance_scale) == 1.0
    # It counts from when the request came, which is before its picture was read.
    assert first.deadline_at - first.created_at == pytest.approx(60, abs=2)
    assert (second.priority, second.allow_degraded) == ("low", False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("size", size) for size in ("", "big", "32X32", "٣٢x٣٢", "0x0", "16x16\n", "032x032", "1e1x1")),
        ("seed", MAX_SEED + 1),
        ("deadline_ms", 10**30),
        ("min_steps", 10**30),
        ("guidance_scale", "2"),
        ("priority", "urgent"),
    ],
)
async def test_a_wrong_field_is_refused_and_named(stage: Stage, door: Door, field: str, value: Any) -> None:
    response = await door.knock(stage.client, **{field: value})
    if door.files and value in ("", "2"):
        # A form has no other way to write a number, or to leave a field empty.
        assert response.status_code == 200
        return
    assert (response.status_code, code(response)) == (door.wrong, "invalid-request")
    assert field in response.text
    assert not stage.worker.claimed


async def test_every_seed_can_be_written_exactly(stage: Stage, door: Door) -> None:
    last = await door.knock(stage.client, n=2, seed=MAX_SEED - 1)
    assert last.status_code == 200
    assert stage.worker.claimed[-1].job.seeds == (MAX_SEED - 1, MAX_SEED)
    beyond = await door.knock(stage.client, n=2, seed=MAX_SEED)
    assert (beyond.status_code, code(beyond)) == (door.wrong, "invalid-request")
    assert "seed" in beyond.json().get("detail", beyond.text)


BODIES = st.fixed_dictionaries(
    {"prompt": st.text(min_size=0, max_size=1990).map(lambda text: f"lemon {text}")},
    optional={
        "n": st.none() | st.integers(1, 10),
        "size": st.none()
        | st.just("auto")
        | st.from_regex("[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", fullmatch=True),
        "quality": st.sampled_from(["auto", "standard", "hd", "low", "medium", "high", "xhigh", "max"]),
        "output_format": st.none() | st.sampled_from(["png", "webp", "jpeg"]),
        "partial_images": st.none() | st.integers(0, 3),
        "seed": st.none() | st.integers(0, MAX_SEED),
        "guidance_scale": st.none() | st.floats(0, 100),
        "deadline_ms": st.none() | st.integers(1, 10**400),
        "min_steps": st.none() | st.integers(1, 10**400),
        "priority": st.sampled_from(["low", "normal", "high"]),
        "windows": st.booleans(),
    },
)


@pytest.mark.parametrize("text_size", [0, 8])
@settings(max_examples=100, deadline=None)
@given(fields=BODIES)
def test_whatever_openais_route_takes_can_be_translated(text_size: int, fields: dict[str, Any]) -> None:
    config = {**MANIFEST["config"], "text_size": text_size}
    manifest = Manifest.model_validate_json(json.dumps({**MANIFEST, "config": config}))
    body = ImagesRequest(**fields)
    prompts = PromptLimit(manifest.config, Path())
    queue, pictures = cast(Queue, None), cast(PictureReader, None)
    submissions = Submissions(
        manifest, Settings.parse(), queue, prompts=prompts, pictures=pictures, bundle=""
    )
    drawing = translate(body, submissions)
    for name in DrawingOptions.model_fields:
        assert getattr(drawing, name) == getattr(body, name)
