"""Jobs over HTTP: respond-async, state, events, images, cancelling."""

import asyncio
import base64
import json
from typing import Any

import httpx
import pytest

from ditserve.service.jobs import JobStatus
from tests.conftest import wait_until
from tests.service.http.conftest import PNG, OpenStage, Serve, Stage

pytestmark = pytest.mark.anyio

NOWHERE = f"/jobs/{'0' * 32}"
StreamEvent = tuple[str | None, str, dict[str, Any]]


def parsed(stream: str) -> list[StreamEvent]:
    """Return id, kind and data of every event in a stream."""
    events = []
    for block in stream.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            events.append((lines.get("id"), lines["event"], json.loads(lines["data"])))
    return events


async def done(stage: Stage, address: str) -> JobStatus:
    async def ended() -> JobStatus | None:
        status = await stage.broker.status(address.rpartition("/")[2])
        return status if status and status.state != "queued" and status.state != "running" else None

    status: JobStatus = await wait_until(ended)
    return status


async def test_respond_async_answers_with_the_jobs_address(open_stage: OpenStage) -> None:
    stage = await open_stage(worker=False)
    response = await stage.generate({"prefer": "respond-async, wait=1"}, n=2, steps=5)
    assert response.status_code == 202
    assert response.headers["preference-applied"] == "respond-async"
    described = response.json()
    assert response.headers["location"] == described["links"]["self"] == f"/jobs/{described['id']}"
    assert len(described["links"]["images"]) == 2
    state = (await stage.client.get(described["links"]["self"])).json()
    assert (state["state"], state["position"], state["step"], state["steps"]) == ("queued", 0, 0, 5)
    assert state["result"] is None


async def test_a_queued_job_tells_when_it_will_be_done(open_stage: OpenStage) -> None:
    stage = await open_stage(worker=False)
    await stage.worker.report(step_per_row_s=0.01, max_rows=10)
    address = await stage.queued(condition={"label": "lemon"})
    eta = (await stage.client.get(address)).json()["eta_s"]
    assert 0.3 < eta < 3


async def test_a_done_job_tells_how_and_gives_its_images(stage: Stage) -> None:
    address = await stage.queued(n=2, seed=40, format="webp")
    await done(stage, address)
    described = (await stage.client.get(address)).json()
    assert described["state"] == "done"
    assert described["result"]["seeds"] == [40, 41]
    assert described["result"]["rung"] == "full"
    image = await stage.client.get(described["links"]["images"][1])
    assert (image.status_code, image.content) == (200, PNG)
    assert (image.headers["content-type"], image.headers["x-seed"]) == ("image/webp", "41")


@pytest.mark.parametrize("k", ["2", "-1", "x", "99999999999"])
async def test_an_image_that_is_not_there_is_404(stage: Stage, k: str) -> None:
    address = await stage.queued(n=2)
    await done(stage, address)
    response = await stage.client.get(f"{address}/images/{k}")
    assert (response.status_code, response.json()["code"]) == (404, "image-not-found")


async def test_an_unfinished_job_has_no_images_yet(open_stage: OpenStage) -> None:
    stage = await open_stage(worker=False)
    response = await stage.client.get(f"{await stage.queued()}/images/0")
    assert (response.status_code, response.json()["code"]) == (409, "job-unfinished")
    assert "retry-after" in response.headers


async def test_a_failed_job_says_why_and_has_no_images(stage: Stage) -> None:
    stage.worker.fail_with = {"code": "numerical-error", "detail": "NaN.", "extra": {}}
    address = await stage.queued()
    await done(stage, address)
    described = (await stage.client.get(address)).json()
    assert (described["state"], described["error"]["code"]) == ("failed", "numerical-error")
    assert (await stage.client.get(f"{address}/images/0")).status_code == 404


@pytest.mark.parametrize("path", ["", "/events", "/images/0"])
@pytest.mark.parametrize("address", [NOWHERE, "/jobs/no-such-job", "/jobs/%00"])
async def test_an_unknown_job_is_404(stage: Stage, address: str, path: str) -> None:
    response = await stage.client.get(address + path)
    assert (response.status_code, response.json()["code"]) == (404, "job-not-found")


async def test_expired_images_are_410(open_stage: OpenStage) -> None:
    stage = await open_stage()
    address = await stage.queued()
    await done(stage, address)
    await stage.broker._client.delete(stage.broker.keys.result(address.rpartition("/")[2]))
    for path in ("", "/images/0"):
        response = await stage.client.get(address + path)
        assert (response.status_code, response.json()["code"]) == (410, "job-expired")


async def test_delete_cancels(open_stage: OpenStage) -> None:
    stage = await open_stage(worker=False)
    address = await stage.queued()
    assert (await stage.client.delete(address)).json()["state"] == "cancelled"
    assert (await stage.client.delete(address)).json()["state"] == "cancelled"
    assert (await stage.client.delete(NOWHERE)).status_code == 404


async def test_delete_leaves_a_done_job_as_it_is(stage: Stage) -> None:
    address = await stage.queued()
    await done(stage, address)
    assert (await stage.client.delete(address)).json()["state"] == "done"


async def test_a_waiting_client_is_told_that_its_job_was_cancelled(stage: Stage) -> None:
    stage.worker.hold = True
    waiting = asyncio.create_task(stage.generate())
    await wait_until(lambda: stage.worker.claimed)
    await stage.client.delete(f"/jobs/{stage.worker.claimed[0].job.id}")
    response = await waiting
    assert (response.status_code, response.json()["code"]) == (499, "cancelled")


async def test_events_tell_the_story_and_end(stage: Stage) -> None:
    address = await stage.queued(steps=9, previews=4)
    response = await stage.client.get(f"{address}/events")
    assert response.headers["content-type"].startswith("text/event-stream")
    events = parsed(response.text)
    kinds = [kind for _, kind, _ in events]
    assert kinds == ["queued", "started", "preview", "preview", "done"]
    _, _, preview = events[2]
    assert (preview["step"], preview["steps"], preview["content_type"]) == (4, 9, "image/png")
    assert base64.b64decode(preview["b64"]) == PNG


async def test_events_resume_after_the_last_id(stage: Stage) -> None:
    address = await stage.queued(steps=9, previews=4)
    events = parsed((await stage.client.get(f"{address}/events")).text)
    resumed = await stage.client.get(f"{address}/events", headers={"last-event-id": str(events[2][0])})
    assert parsed(resumed.text) == events[3:]
    at_the_end = await stage.client.get(f"{address}/events", headers={"last-event-id": str(events[-1][0])})
    assert (at_the_end.status_code, at_the_end.content) == (204, b"")
    beyond = await stage.client.get(f"{address}/events", headers={"last-event-id": "9" * 15 + "-1"})
    assert beyond.status_code == 204


async def test_a_failure_is_told_as_a_problem(stage: Stage) -> None:
    stage.worker.fail_with = {"code": "numerical-error", "detail": "NaN.", "extra": {}}
    address = await stage.queued()
    _, kind, data = parsed((await stage.client.get(f"{address}/events")).text)[-1]
    assert (kind, data["code"], data["status"]) == ("failed", "numerical-error", 500)


@pytest.mark.parametrize("last", ["x", "1-", "9" * 40 + "-1", "1-1-1"])
async def test_a_malformed_last_event_id_is_refused(stage: Stage, last: str) -> None:
    response = await stage.client.get(f"{await stage.queued()}/events", headers={"last-event-id": last})
    assert response.status_code == 400


async def test_a_quiet_stream_is_kept_alive_and_ends_when_the_process_drains(
    open_stage: OpenStage, serve: Serve
) -> None:
    stage = await open_stage(worker=False, keepalive_s=0.05)
    address = await stage.queued()
    port = await serve(stage)
    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
        client.stream("GET", f"{address}/events") as response,
    ):
        seen = ""
        async for text in response.aiter_text():
            seen += text
            if seen.count(": keep-alive") == 2:
                stage.app.state.draining.set()
    assert "event: queued" in seen
