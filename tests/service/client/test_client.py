"""The Python client and `python -m service generate`, over a real socket; retries over a fake transport."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from ditserve.service.api_keys import add
from ditserve.service.client import cli as generate
from ditserve.service.client import messages
from ditserve.service.client.client import AsyncClient, Client
from ditserve.service.client.messages import Unreachable
from ditserve.service.errors import (
    Cancelled,
    JobLost,
    NumericalError,
    Overloaded,
    QueueFull,
    ServiceError,
    Unauthorized,
    UnknownCondition,
)
from ditserve.service.jobs import ConditionTerm
from ditserve.service.source_picture import decode, encode
from tests.conftest import wait_until
from tests.service.http.conftest import PNG, OpenStage, Serve, Stage

pytestmark = pytest.mark.anyio
APPLE = {"label": "apple"}


@pytest.fixture
async def url(stage: Stage, serve: Serve) -> str:
    return f"http://127.0.0.1:{await serve(stage)}"


async def test_draws(url: str) -> None:
    async with AsyncClient(url) as client:
        generation = await client.generate(APPLE, n=2, seed=5, steps=3)
    assert [(image.seed, image.data) for image in generation.images] == [(5, PNG), (6, PNG)]
    assert generation.facts["steps_used"] == 3


async def test_a_prompt_takes_the_place_of_a_condition(stage: Stage, url: str) -> None:
    async with AsyncClient(url) as client:
        await client.generate(prompt="an apple", steps=4)
    assert stage.worker.claimed[-1].job.condition == (ConditionTerm((0, None)),)


async def test_the_blocking_client_does_the_same(url: str) -> None:
    def blocking() -> None:
        with Client(url) as client:
            assert client.generate(APPLE, seed=5).images[0].seed == 5
            job = client.submit(APPLE, steps=4, previews=1)
            kinds = [event.kind for event in client.events(job)]
            assert (kinds[0], kinds[-1], kinds.count("preview")) == ("queued", "done", 3)
            assert client.job(job)["state"] == "done"
            assert client.image(job).data == PNG
            assert client.models()["models"][0]["name"] == "fruits"

    await asyncio.to_thread(blocking)


async def test_follows_and_cancels(stage: Stage, url: str) -> None:
    stage.worker.hold = True
    async with AsyncClient(url) as client:
        job = await client.submit(APPLE)
        events = client.events(job)
        assert (await anext(events)).kind == "queued"
        await client.cancel(job)
        assert [event.kind async for event in events][-1] == "cancelled"
        assert (await client.job(job))["state"] == "cancelled"


@pytest.mark.parametrize(
    ("condition", "kind"),
    [({"label": "aple"}, UnknownCondition), ([{"label": "apple", "weight": -1}], ServiceError)],
)
async def test_a_refusal_is_its_own_error(
    url: str, condition: dict[str, object], kind: type[ServiceError]
) -> None:
    async with AsyncClient(url) as client:
        with pytest.raises(kind) as caught:
            await client.generate(condition)
    assert caught.value.status == 422


async def test_a_failed_job_raises_how_it_failed(stage: Stage, url: str) -> None:
    stage.worker.fail_with = {"code": NumericalError.code, "detail": "NaN in row 0"}
    async with AsyncClient(url) as client:
        with pytest.raises(NumericalError, match="NaN in row 0"):
            await client.generate(APPLE)


async def test_sends_its_key(open_stage: OpenStage, serve: Serve, tmp_path: Path) -> None:
    _, text = add(tmp_path / "keys.json", "me")
    url = f"http://127.0.0.1:{await serve(await open_stage(keys_file=tmp_path / 'keys.json'))}"
    async with AsyncClient(url, api_key=text) as client:
        assert (await client.generate(APPLE)).images
    async with AsyncClient(url) as client:
        with pytest.raises(Unauthorized):
            await client.generate(APPLE)


class Waits(list[float]):
    """The waits of the client in seconds; none of them takes place."""


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    waited = Waits()
    monkeypatch.setattr("ditserve.service.client.client.time.sleep", waited.append)
    return waited


def served(*answers: Callable[[httpx.Request], httpx.Response]) -> tuple[Client, list[httpx.Request]]:
    """Return a client whose requests get `answers` in turn (the last one for ever), and its requests."""
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return answers[min(len(seen), len(answers)) - 1](request)

    return Client("http://test", transport=httpx.MockTransport(handle)), seen


def refusing(status: int, code: str, **headers: str) -> Callable[[httpx.Request], httpx.Response]:
    return lambda _: httpx.Response(status, json={"code": code, "detail": "no"}, headers=headers)


def drawing(_: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json={"images": [{"b64": "AA==", "seed": 1, "content_type": "image/png"}]})


def cut(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadError("cut", request=request)


def test_waits_as_long_as_it_is_told_and_never_draws_twice(waits: Waits) -> None:
    client, seen = served(
        refusing(503, "queue-full", **{"retry-after": "7"}),
        cut,
        refusing(409, "idempotency-conflict"),
        drawing,
    )
    assert client.generate(APPLE).images[0].seed == 1
    assert len(seen) == 4
    assert len({request.headers["idempotency-key"] for request in seen}) == 1
    assert 7 <= waits[0] <= 8.4
    assert all(wait > 0 for wait in waits)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (refusing(422, "unknown-condition"), UnknownCondition),
        (refusing(503, "overloaded", **{"x-should-retry": "false"}), Overloaded),
        (refusing(503, "queue-full", **{"retry-after": "3600"}), QueueFull),
        (refusing(499, "cancelled"), Cancelled),
        (lambda _: httpx.Response(500, text="<html>"), ServiceError),
    ],
)
def test_does_not_insist_where_it_is_of_no_use(
    answer: Callable[[httpx.Request], httpx.Response], error: type[ServiceError], waits: Waits
) -> None:
    client, seen = served(answer)
    with pytest.raises(error):
        client.generate(APPLE)
    assert (len(seen), waits) == (1, [])


def test_gives_up_in_the_end(waits: Waits) -> None:
    client, seen = served(cut)
    with pytest.raises(Unreachable):
        client.generate(APPLE)
    assert len(seen) == messages.ATTEMPTS


def test_takes_a_broken_event_stream_up_where_it_broke(waits: Waits) -> None:
    def stream(*events: str) -> Callable[[httpx.Request], httpx.Response]:
        return lambda _: httpx.Response(
            200, text="".join(events), headers={"content-type": "text/event-stream"}
        )

    started, step, done = (
        "id: 1-0\nevent: started\ndata: {}\n\n",
        "id: 2-0\nevent: step\ndata: {}\n\n",
        "event: done\ndata: {}\n\n",
    )
    away = 'event: error\ndata: {"code": "queue-unavailable", "detail": "Redis is away."}\n\n'
    client, seen = served(stream(started), cut, stream(step, away), stream(done))
    assert [event.kind for event in client.events("1")] == ["started", "step", "done"]
    assert [request.headers.get("last-event-id") for request in seen] == [None, "1-0", "1-0", "2-0"]
    lost = 'event: error\ndata: {"code": "job-lost", "retry_after_s": 1}\n\n'
    client, _ = served(stream(started, lost))
    with pytest.raises(JobLost):
        list(client.events("1"))


def contents(path: Path) -> bytes:
    return path.read_bytes()


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def exists(path: Path) -> bool:
    return path.exists()


class TestCommand:
    async def test_draws_into_files(
        self, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        target = tmp_path / "fruit.png"
        line = ["an apple", "--url", url, "-n", "2", "--seed", "8", "-o", str(target)]
        assert await asyncio.to_thread(generate.run, line) == 0
        paths = [tmp_path / "fruit-8.png", tmp_path / "fruit-9.png"]
        assert capsys.readouterr().out.split()[-2:] == [str(path) for path in paths]
        assert [contents(path) for path in paths] == [PNG, PNG]

    async def test_combines_prompts(self, stage: Stage, url: str, tmp_path: Path) -> None:
        words = "an apple|a lemon|--mix|compose|--weights|1.5|-0.5|--guidance-decay|-0.75|-o"
        line = [*words.split("|"), str(tmp_path / "fruit.png"), "--guidance-interval", "0.1", "0.8"]
        assert await asyncio.to_thread(generate.run, [*line, "--url", url]) == 0
        job = stage.worker.claimed[-1].job
        assert job.condition == (ConditionTerm((0, None), 1.5), ConditionTerm((3, None), -0.5))
        assert (job.mix, job.guidance_interval) == ("compose", (0.1, 0.8))
        assert job.requested is not None
        assert job.requested.guidance_decay == -0.75

    async def test_starts_from_a_picture(self, stage: Stage, url: str, tmp_path: Path) -> None:
        pixels = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
        picture = tmp_path / "source.png"
        write(picture, encode(pixels))
        line = ["a lemon", "--image", str(picture), "--mask", str(picture), "--strength", "0.4", "--url", url]
        assert await asyncio.to_thread(generate.run, [*line, "-o", str(tmp_path / "edited.png")]) == 0
        source = stage.worker.claimed[-1].job.source
        assert source is not None
        assert source.mask is not None
        assert source.strength == 0.4
        np.testing.assert_array_equal(decode(source.image), pixels)

    async def test_a_picture_that_is_not_there_is_told_before_anything_is_sent(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit, match="2"):
            generate.run(["a lemon", "--image", "no/such.png", "--url", "http://127.0.0.1:9"])
        assert "no/such.png cannot be read: No such file or directory" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("line", "words", "status"),
        [
            (["an apple", "--strength", "0.5"], "strength: It needs an image to start from", 1),
            (["an apple", "--negative-prompt", "fog"], "takes no text", 1),
            (["an apple", "a lemon", "--weights", "1"], "--weights: give one for each of the 2 prompts", 2),
            (["an apple", "-o", "x.bmp"], "x.bmp", 2),
            (["an apple", "-o", "x.gif"], "This model makes pictures, which are no gif", 1),
            (["an apple", "--model", "clips"], "There is no model 'clips'; this service runs fruits", 1),
            (["an apple", "--frames", "8"], "This model makes pictures, which have no frames", 1),
            (
                ["an apple", "--adapter", "noir=0.5"],
                "adapters: Adapters need workers of the torch backend",
                1,
            ),
            (["a lemn"], "Closest: lemon", 1),
            (["an apple", "-n", "999"], "n: ", 1),
            (["an apple", "-o", "no/such/folder.png"], "no/such/folder.png", 1),
        ],
    )
    async def test_says_what_is_wrong(
        self, url: str, line: list[str], words: str, status: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert await asyncio.to_thread(generate.run, [*line, "--url", url]) == status
        assert words in capsys.readouterr().err

    async def test_a_job_that_fails(
        self, stage: Stage, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stage.worker.hold = True
        task = asyncio.create_task(
            asyncio.to_thread(generate.run, ["an apple", "--url", url, "-o", str(tmp_path / "a.png")])
        )
        await wait_until(lambda: stage.worker.claimed)
        await stage.broker.cancel(stage.worker.claimed[0].job.id)
        assert await task == 1
        assert "error:" in capsys.readouterr().err
        assert not exists(tmp_path / "a.png")

    def test_a_prompt_is_the_text_of_a_model_that_reads_text(self) -> None:
        factors = [{"name": "label", "classes": ["apple"]}]
        model = {"text": True, "factors": factors}
        assert generate._condition(model, "a lemon in the snow") == {"text": "a lemon in the snow"}
        assert generate._condition(model, "an apple") == {"label": 0}
        # An imported pipeline's encoder may know emoji: they go as they are written.
        assert generate._condition({"text": True, "factors": []}, "a 🍋") == {"text": "a 🍋"}
        assert generate._condition({**model, "text": False}, "an apple") == {"label": 0}
