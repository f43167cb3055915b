"""`POST /generate` and `GET /models` as an application meets them, on the real broker."""

import base64
import hashlib
import time
from email import message_from_bytes
from email.message import Message
from typing import Any

import pytest

from ditserve.service.http import load_cache
from ditserve.service.jobs import ConditionTerm, Job
from ditserve.service.planning import caution
from tests.service.http.conftest import PNG, OpenStage, Stage

pytestmark = pytest.mark.anyio


def submitted(stage: Stage) -> Job:
    return stage.worker.claimed[-1].job


async def test_json_answer_tells_how_the_images_were_made(stage: Stage) -> None:
    response = await stage.generate(condition={"label": "strawberry", "style": "noto"}, n=2, seed=7)
    assert response.status_code == 200
    answer = response.json()
    assert answer["images"] == [
        {"b64": base64.b64encode(PNG).decode(), "seed": seed, "content_type": "image/png"} for seed in (7, 8)
    ]
    assert (answer["steps_requested"], answer["steps_used"], answer["rung"]) == (20, 20, "full")
    assert (answer["model"], answer["sampler"], answer["degraded"], answer["reason"]) == (
        "fruits",
        "ddim",
        False,
        None,
    )
    assert answer["timings_ms"] == {"queue": 1.25, "denoise": 20.0}
    assert response.headers["server-timing"] == "queue;dur=1.2, denoise;dur=20.0"
    assert response.headers["x-seed"] == "7, 8"


async def test_the_job_is_what_was_asked_for(stage: Stage) -> None:
    await stage.generate(
        condition={"label": "Red-Apple", "style": 1},
        steps=7,
        sampler="dpmpp-2m",
        guidance_scale=3,
        guidance_interval=[0.2, 0.8],
        seed=5,
        format="webp",
        min_steps=4,
        priority="high",
        previews=2,
    )
    job = submitted(stage)
    assert job.condition == (ConditionTerm((1, 1)),)
    assert (job.steps, job.solver, job.grid, job.min_steps) == (7, "dpmpp-2m", "uniform-t", 4)
    assert (job.guidance_scale, job.guidance_interval) == (3.0, (0.2, 0.8))
    assert (job.seeds, job.format, job.priority, job.previews) == ((5,), "webp", "high", 2)


async def test_defaults_are_the_models(stage: Stage) -> None:
    await stage.generate()
    job = submitted(stage)
    assert job.condition == (ConditionTerm((None, None)),)
    # Guiding no condition would change nothing.
    assert (job.guidance_scale, job.cost_rows) == (1.0, 20)
    await stage.generate(condition={"label": "lemon"})
    job = submitted(stage)
    assert (job.steps, job.solver, job.grid, job.guidance_scale) == (20, "ddim", "trailing", 2.0)
    assert (job.deadline_at, job.rung, job.cost_rows) == (None, None, 40)


async def test_conditions_are_mixed(stage: Stage) -> None:
    mixed = [{"label": "lemon", "weight": 0.25}, {"label": "apple"}]
    assert (await stage.generate(condition=mixed, mix="spherical")).status_code == 200
    job = submitted(stage)
    assert job.condition == (ConditionTerm((3, None), 0.25), ConditionTerm((0, None), 1.0))
    assert job.mix == "spherical"


async def test_a_seed_is_picked_when_none_is_given(stage: Stage) -> None:
    seeds = [(await stage.generate()).json()["images"][0]["seed"] for _ in range(2)]
    assert seeds[0] != seeds[1]


async def test_listed_noise_levels_are_the_steps_and_are_given_up_only_by_consent(stage: Stage) -> None:
    answer = await stage.generate(noise_levels=[99, 60.0, 20], sampler="dpmpp-2m")
    assert answer.status_code == 200, answer.text
    job = submitted(stage)
    assert (job.steps, job.solver, job.grid) == (3, "dpmpp-2m", "99,60,20")
    assert (job.allow_degraded, job.min_steps) == (False, 3)
    assert job.requested == job.admitted
    await stage.generate(noise_levels=[99, 60, 20], steps=3, allow_degraded=True)
    job = submitted(stage)
    assert (job.steps, job.grid, job.allow_degraded, job.min_steps) == (3, "99,60,20", True, 1)


async def test_without_degrading_the_floor_is_the_steps_asked_for(stage: Stage) -> None:
    await stage.generate(steps=9, allow_degraded=False)
    assert submitted(stage).min_steps == 9


@pytest.mark.parametrize(
    ("accept", "asked", "content_type"),
    [
        ("image/png", None, "image/png"),
        ("image/webp", None, "image/webp"),
        ("image/*", "jpeg", "image/jpeg"),
        ("text/html, image/jpeg;q=0.5, */*;q=0.1", None, "image/jpeg"),
        ("*/*", "webp", "application/json"),
        ("application/json, image/png;q=0.9", None, "application/json"),
    ],
)
async def test_accept_chooses_the_representation(
    stage: Stage, accept: str, asked: str | None, content_type: str
) -> None:
    response = await stage.generate({"accept": accept}, format=asked, seed=3)
    assert response.status_code == 200
    assert response.headers["content-type"] == content_type
    if content_type.startswith("image/"):
        assert response.content == PNG
        assert response.headers["x-seed"] == "3"
        assert response.headers["x-steps-used"] == "20"
        digest = base64.b64encode(hashlib.sha256(PNG).digest()).decode()
        assert response.headers["content-digest"] == f"sha-256=:{digest}:"


async def test_several_images_are_multipart(stage: Stage) -> None:
    response = await stage.generate({"accept": "multipart/mixed"}, n=3, seed=1)
    head = f"content-type: {response.headers['content-type']}\r\n\r\n".encode()
    message = message_from_bytes(head + response.content)
    parts: list[Message[str, str]] = message.get_payload()  # type: ignore[assignment]
    assert [part["x-seed"] for part in parts] == ["1", "2", "3"]
    assert all(part.get_payload(decode=True) == PNG for part in parts)
    digest = base64.b64encode(hashlib.sha256(response.content).digest()).decode()
    assert response.headers["content-digest"] == f"sha-256=:{digest}:"


@pytest.mark.parametrize(
    ("accept", "body"),
    [("image/png", {"n": 2}), ("image/webp", {"format": "png"}), ("text/html", {}), ("image/avif", {})],
)
async def test_what_nobody_accepts_is_406(stage: Stage, accept: str, body: dict[str, Any]) -> None:
    response = await stage.generate({"accept": accept}, **body)
    assert response.status_code == 406
    assert response.json()["code"] == "not-acceptable"
    assert not stage.worker.claimed


async def test_a_deadline_that_cannot_be_kept_is_refused_with_a_time_to_come_back(stage: Stage) -> None:
    await stage.worker.report(step_per_row_s=0.001, running_samples=8, backlog_rows=50_000)
    response = await stage.generate(deadline_ms=1000)
    assert response.status_code == 503
    assert response.json()["code"] == "overloaded"
    assert int(response.headers["retry-after"]) == response.json()["retry_after_s"] >= 1


async def test_a_deadline_too_short_for_idle_workers_is_refused_for_good(stage: Stage) -> None:
    await stage.worker.report(step_per_row_s=1.0)
    response = await stage.generate(deadline_ms=200)
    assert (response.status_code, response.json()["code"]) == (503, "overloaded")
    assert "idle" in response.json()["detail"]
    assert response.headers["x-should-retry"] == "false"


async def test_a_deadline_is_kept_by_a_lower_rung_and_said_so(stage: Stage) -> None:
    await stage.worker.report(step_per_row_s=0.01, max_rows=1)
    answer = (await stage.generate(condition={"label": "lemon"}, deadline_ms=300)).json()
    assert answer["degraded"] is True
    assert answer["rung"] in ("half", "floor")
    refused = await stage.generate(condition={"label": "lemon"}, deadline_ms=300, allow_degraded=False)
    assert refused.status_code == 503
    assert "rules out" in refused.json()["detail"]


@pytest.mark.parametrize(("allow_degraded", "taken"), [(True, 14), (False, 4)])
async def test_of_a_crowd_at_once_as_many_are_taken_as_can_be_cut_to_fit(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, allow_degraded: bool, taken: int
) -> None:
    """The worker runs 200 rows until the deadline, less a margin. A request needs 40, or 10 if degraded."""
    # The load is read once, so only the cache knows of the jobs queued before.
    monkeypatch.setattr(load_cache, "LOAD_FRESH_S", 60.0)
    # The machine counts as known, so that its queue may be as long as the deadline allows.
    monkeypatch.setattr(caution, "FIRST_QUEUE_MARGIN", 1.0)
    stage.worker.hold = True
    await stage.worker.report(step_per_row_s=0.01, max_rows=1)
    ask = {"condition": {"label": "lemon"}, "deadline_ms": 2000, "allow_degraded": allow_degraded}
    answers = [await stage.generate({"prefer": "respond-async"}, **ask) for _ in range(14)]
    assert sorted(answer.status_code for answer in answers) == [202] * taken + [503] * (14 - taken)


async def test_a_job_is_due_earlier_than_its_answer_by_the_way_of_recent_answers(stage: Stage) -> None:
    """A job that is denoised in the last moment would be late, and its answer is waited for to the end."""
    stage.worker.delivery_s = 0.5
    for _ in range(20):
        assert (await stage.generate(deadline_ms=60_000)).is_success
    jobs = [claim.job for claim in stage.worker.claimed]
    times = [(job.deadline_at or 0.0) - job.created_at for job in jobs]
    assert times[0] == pytest.approx(60.0, abs=0.1)
    assert 56.0 < times[-1] < 59.5
    stage.worker.hold = True
    began = time.monotonic()
    assert (await stage.generate(deadline_ms=1000)).status_code == 504
    assert time.monotonic() - began > 0.9
    job = stage.worker.claimed[-1].job
    assert (job.deadline_at or 0.0) - job.created_at < 0.8


async def test_images_not_ready_by_the_deadline_are_504_and_cancelled(stage: Stage) -> None:
    stage.worker.hold = True
    response = await stage.generate(deadline_ms=250)
    assert response.status_code == 504
    assert response.json()["code"] == "deadline-exceeded"
    status = await stage.broker.status(submitted(stage).id)
    assert status is not None
    assert status.state == "cancelled"


async def test_without_workers_a_deadline_is_refused(open_stage: OpenStage) -> None:
    response = await (await open_stage(worker=False)).generate(deadline_ms=1000)
    assert response.status_code == 503
    assert "No worker" in response.json()["detail"]


async def test_a_full_queue_is_503(open_stage: OpenStage) -> None:
    stage = await open_stage(worker=False, queue_limit=1)
    wish = {"prefer": "respond-async"}
    assert (await stage.generate(wish)).status_code == 202
    response = await stage.generate(wish)
    assert (response.status_code, response.json()["code"]) == (503, "queue-full")
    assert "retry-after" in response.headers


async def test_the_error_of_a_job_is_the_answer(stage: Stage) -> None:
    stage.worker.fail_with = {"code": "numerical-error", "detail": "NaN at step 3.", "extra": {}}
    response = await stage.generate()
    assert response.status_code == 500
    assert (response.json()["code"], response.json()["detail"]) == ("numerical-error", "NaN at step 3.")
    assert response.headers["x-should-retry"] == "false"


async def test_models_describes_the_bundle(stage: Stage) -> None:
    (model,) = (await stage.client.get("/models")).json()["models"]
    assert (model["name"], model["size"], model["licence"]) == ("fruits", "16x16", "Apache-2.0")
    assert model["factors"][1] == {"name": "style", "classes": ["noto", "twemoji"], "default": None}
    assert "ddim" in model["samplers"]
    assert [rung["name"] for rung in model["ladder"]] == ["full", "half", "floor"]
    assert model["ladder_order"] == "own"
    assert model["limits"]["steps"] == 100


async def test_the_request_id_is_the_clients_if_it_is_sane(stage: Stage) -> None:
    given = await stage.client.get("/models", headers={"x-request-id": "abc-123"})
    assert given.headers["x-request-id"] == "abc-123"
    replaced = await stage.client.get("/nope", headers={"x-request-id": "a b\tc"})
    assert replaced.headers["x-request-id"] != "a b\tc"
    assert replaced.json()["request_id"] == replaced.headers["x-request-id"]
    await stage.generate({"x-request-id": "in-the-job"})
    assert submitted(stage).trace["request_id"] == "in-the-job"


async def test_a_trace_goes_with_the_job(stage: Stage) -> None:
    parent = f"00-{'a' * 32}-{'b' * 16}-01"
    await stage.generate({"traceparent": parent})
    assert submitted(stage).trace["traceparent"] == parent


async def test_an_async_repeat_leads_to_the_same_job(stage: Stage) -> None:
    headers = {"idempotency-key": "k4", "prefer": "respond-async"}
    first, again = [await stage.generate(headers) for _ in range(2)]
    assert first.headers["location"] == again.headers["location"]
    assert again.headers["idempotency-replayed"] == "true"
