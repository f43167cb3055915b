"""Bad input: it gets one clear problem, never a 500, and puts nothing in the queue."""

import json
from typing import Any

import pytest

from ditserve.service.errors import QueueUnavailable
from ditserve.service.fleet import LoadSnapshot
from ditserve.service.jobs import Job
from tests.service.http.conftest import OpenStage, Stage

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"steps": "50"}, "#/steps"),
        ({"steps": 0}, "#/steps"),
        ({"steps": 101}, "#/steps"),
        ({"steps": 10**30}, "#/steps"),
        ({"steps": 2.5}, "#/steps"),
        ({"steps": True}, "#/steps"),
        ({"n": 0}, "#/n"),
        ({"n": 17}, "#/n"),
        ({"n": None}, "#/n"),
        ({"guidance_scale": -1}, "#/guidance_scale"),
        ({"guidance_interval": [0.8, 0.2]}, "#/guidance_interval"),
        ({"guidance_interval": [0.1]}, "#/guidance_interval"),
        ({"seed": -1}, "#/seed"),
        ({"seed": 2**60}, "#/seed"),
        ({"sampler": "magic"}, "#/sampler"),
        ({"grid": "magic"}, "#/grid"),
        ({"grid": "leading", "steps": 1}, "#/grid"),
        ({"grid": "ddim-stride", "steps": 37}, "#/grid"),
        ({"noise_levels": []}, "#/noise_levels"),
        ({"noise_levels": [99, 50, 50]}, "#/noise_levels"),
        ({"noise_levels": [50, 99]}, "#/noise_levels"),
        ({"noise_levels": [100, 50]}, "#/noise_levels"),
        ({"noise_levels": [99, 50.5]}, "#/noise_levels"),
        ({"noise_levels": [99, -1]}, "#/noise_levels"),
        ({"noise_levels": [50, 25]}, "#/noise_levels"),
        ({"noise_levels": [1e300]}, "#/noise_levels"),
        ({"noise_levels": list(range(257, 0, -1))}, "#/noise_levels"),
        ({"noise_levels": "99,50"}, "#/noise_levels"),
        ({"noise_levels": [99, 50], "steps": 3}, "#/steps"),
        ({"noise_levels": [99, 50], "grid": "trailing"}, "#/grid"),
        ({"noise_levels": [99, 50], "min_steps": 3}, "#/min_steps"),
        ({"format": "bmp"}, "#/format"),
        ({"size": "32x32"}, "#/size"),
        ({"size": "large"}, "#/size"),
        ({"deadline_ms": 0}, "#/deadline_ms"),
        ({"deadline_ms": 10**9}, "#/deadline_ms"),
        ({"min_steps": 21}, "#/min_steps"),
        ({"priority": "urgent"}, "#/priority"),
        ({"previews": -1}, "#/previews"),
        ({"colour": "red"}, "#/colour"),
        ({"condition": "strawberry"}, "#/condition"),
        ({"condition": []}, "#/condition"),
        ({"condition": {"label": ["a"]}}, "#/condition/label"),
        ({"condition": [{"label": "lemon", "weight": 0}]}, "#/condition/0/weight"),
        ({"condition": [{"label": "lemon"}] * 9}, "#/condition"),
    ],
)
async def test_a_wrong_field_is_422_and_named(stage: Stage, body: dict[str, Any], pointer: str) -> None:
    response = await stage.generate(**body)
    assert response.status_code == 422, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["code"] == "invalid-request"
    assert problem["errors"][0]["pointer"].startswith(pointer)
    assert problem["status"] == 422
    assert problem["instance"] == "/generate"
    assert not stage.worker.claimed


@pytest.mark.parametrize(
    ("condition", "suggestion"),
    [
        ({"label": "strawbery"}, "strawberry"),
        ({"label": "lemon", "style": "twemojis"}, "twemoji"),
        ({"labl": "lemon"}, "label"),
        ([{"label": "lemon"}, {"label": "aple"}], "apple"),
    ],
)
async def test_an_unknown_class_is_422_with_the_closest(
    stage: Stage, condition: Any, suggestion: str
) -> None:
    response = await stage.generate(condition=condition)
    assert (response.status_code, response.json()["code"]) == (422, "unknown-condition")
    assert response.json()["suggestions"][0] == suggestion


@pytest.mark.parametrize("label", [4, -1, 10**40])
async def test_a_class_number_out_of_range_is_422(stage: Stage, label: int) -> None:
    response = await stage.generate(condition={"label": label})
    assert response.status_code == 422
    assert "0 to 3" in response.json()["detail"]


async def test_an_unknown_model_is_404(stage: Stage) -> None:
    response = await stage.generate(model="imagenet")
    assert (response.status_code, response.json()["code"]) == (404, "model-not-found")


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b'{"n": 1,}',
        b"\xff\xfe",
        b'{"a": ' * 5000,
        b'{"steps": ' + b"9" * 5000 + b"}",
        b'{"condition": {"label": "\\ud800"}}',
        b'{"guidance_scale": NaN}',
        b'{"guidance_scale": 1e999}',
        b"[]",
        b'"text"',
        b"null",
        b"",
    ],
)
async def test_broken_json_is_a_problem(stage: Stage, raw: bytes) -> None:
    response = await stage.client.post("/generate", content=raw, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422)
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/mixed; boundary=x", ""]
)
async def test_another_content_type_is_415(stage: Stage, content_type: str) -> None:
    headers = {"content-type": content_type} if content_type else {}
    response = await stage.client.post("/generate", content=b"{}", headers=headers)
    assert (response.status_code, response.json()["code"]) == (415, "unsupported-media-type")


async def test_json_with_a_charset_or_a_suffix_is_fine(stage: Stage) -> None:
    for kind in ("application/json; charset=utf-8", "application/vnd.api+json"):
        response = await stage.client.post("/generate", content=b"{}", headers={"content-type": kind})
        assert response.status_code == 200


async def test_a_big_body_is_413_whether_or_not_it_is_announced(open_stage: OpenStage) -> None:
    stage = await open_stage(max_body_bytes=1000)
    content = json.dumps({"model": "x" * 2000}).encode()
    announced = await stage.client.post(
        "/generate", content=content, headers={"content-type": "application/json"}
    )

    async def chunks() -> Any:
        for start in range(0, len(content), 100):
            yield content[start : start + 100]

    streamed = await stage.client.post(
        "/generate", content=chunks(), headers={"content-type": "application/json"}
    )
    for response in (announced, streamed):
        assert (response.status_code, response.json()["code"]) == (413, "payload-too-large")


async def test_a_wrong_method_or_path_is_a_problem(stage: Stage) -> None:
    wrong_method = await stage.client.get("/generate")
    assert (wrong_method.status_code, wrong_method.json()["code"]) == (405, "method-not-allowed")
    assert wrong_method.headers["allow"] == "POST"
    nowhere = await stage.client.get("/models/")
    assert (nowhere.status_code, nowhere.json()["code"]) == (404, "not-found")


async def test_a_crash_leaks_nothing(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async def crash(job: Job) -> bool:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(stage.broker, "submit", crash)
    response = await stage.generate()
    assert (response.status_code, response.json()["code"]) == (500, "internal-error")
    assert "secret" not in response.text
    assert response.headers["x-request-id"] == response.json()["request_id"]


async def test_without_redis_submitting_is_503_and_probes_say_so(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone() -> LoadSnapshot:
        raise QueueUnavailable("Redis cannot be reached.", retry_after=2)

    monkeypatch.setattr(stage.broker, "load", gone)
    response = await stage.generate()
    assert (response.status_code, response.json()["code"]) == (503, "queue-unavailable")
    assert response.headers["retry-after"] == "2"
    assert (await stage.client.get("/readyz")).json()["checks"]["queue"] is False
    assert (await stage.client.get("/livez")).status_code == 200
    assert "dit_redis_up 0.0" in (await stage.client.get("/metrics")).text


async def test_while_draining_new_work_is_refused(stage: Stage) -> None:
    stage.app.state.draining.set()
    response = await stage.generate()
    assert (response.status_code, response.json()["code"]) == (503, "draining")
    assert response.headers["connection"] == "close"
    assert (await stage.client.get("/readyz")).status_code == 503
