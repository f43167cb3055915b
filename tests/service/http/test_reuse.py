"""The same request again: answered with stored images, or with those being drawn, and never with others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import fields, replace
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY

from ditserve.service.http.reuse import BOOKKEEPING, loses_nothing, picture_digest
from ditserve.service.jobs import AdapterUse, ConditionTerm, Job
from ditserve.service.rung import Rung
from ditserve.service.source_picture import SourcePicture
from tests.conftest import wait_until
from tests.service.http.conftest import OpenStage, Serve, Stage
from tests.service.http.test_edits import PIXELS, data_url

pytestmark = pytest.mark.anyio
OPENAI = "/v1/images/generations"
LEMON: dict[str, Any] = {"condition": {"label": "lemon"}, "seed": 7}
PNG = {"accept": "image/png"}
ASYNC = {"prefer": "respond-async"}


@pytest.fixture
async def stage(open_stage: OpenStage) -> Stage:
    return await open_stage(reuse_s=60)


@pytest.fixture
async def stranger(stage: Stage) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(stage.app, client=("192.0.2.9", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def counted(outcome: str) -> float:
    return REGISTRY.get_sample_value("dit_reuse_total", {"outcome": outcome}) or 0.0


async def finish(stage: Stage, number: int = -1) -> None:
    """Finish a job that the worker holds."""
    claim = stage.worker.claimed[number]
    assert await stage.broker.finish(claim.lease, stage.worker.result(claim)), "it was cancelled"


async def drawing(stage: Stage, count: int = 1) -> None:
    await wait_until(lambda: len(stage.worker.claimed) == count)


async def joined(stage: Stage, count: int, job: int = -1) -> None:
    """Wait until so many have joined a job that the worker holds."""
    holders = stage.broker.keys.holders(stage.worker.claimed[job].job.id)

    async def there() -> bool:
        held: Any = await stage.broker._client.scard(holders)
        return bool(held == count)

    await wait_until(there)


async def previewed(stage: Stage, job: int, previews: int) -> None:
    """Wait until so many previews of a job are there, after the events of its begin."""
    stream = stage.broker.keys.events(stage.worker.claimed[job].job.id)

    async def there() -> bool:
        length: Any = await stage.broker._client.xlen(stream)
        return bool(length == 2 + previews)

    await wait_until(there)


async def test_a_request_again_is_answered_with_the_stored_images(stage: Stage) -> None:
    before = counted("hit"), counted("miss")
    first, again = [await stage.generate(PNG, **LEMON, n=1) for _ in range(2)]
    assert (first.headers["x-cache"], again.headers["x-cache"]) == ("miss", "hit")
    assert again.content == first.content
    assert again.headers["x-job-id"] == first.headers["x-job-id"]
    assert len(stage.worker.claimed) == 1
    assert (counted("hit"), counted("miss")) == (before[0] + 1, before[1] + 1)


async def test_it_does_not_matter_which_door_it_came_by(stage: Stage) -> None:
    ours = await stage.generate(**LEMON)
    for stream in (False, True):
        theirs = await stage.client.post(OPENAI, json={"prompt": "lemon", "seed": 7, "stream": stream})
        assert theirs.headers["x-cache"] == "hit"
        assert theirs.headers["x-job-id"] == ours.headers["x-job-id"]
        assert ours.json()["images"][0]["b64"] in theirs.text
    assert len(stage.worker.claimed) == 1


OTHERS: list[dict[str, Any]] = [
    {"seed": 8},
    {"n": 2},
    {"steps": 19},
    {"sampler": "dpmpp-2m"},
    {"guidance_scale": 2.5},
    {"guidance_decay": 0.5},
    {"format": "webp"},
    {"condition": {"label": "apple"}},
    {"condition": {"label": "lemon", "style": "noto"}},
    {"size": "32x16", "windows": True},
]


async def test_another_picture_is_drawn(stage: Stage) -> None:
    await stage.generate(**LEMON)
    for other in OTHERS:
        answer = await stage.generate(**{**LEMON, **other})
        assert (answer.status_code, answer.headers["x-cache"]) == (200, "miss"), other
    for unseeded in range(2):
        answer = await stage.generate(condition=LEMON["condition"])
        assert answer.headers["x-cache"] == "miss", unseeded
    assert len(stage.worker.claimed) == 1 + len(OTHERS) + 2


async def test_off_by_default(open_stage: OpenStage) -> None:
    stage = await open_stage()
    for _ in range(2):
        assert "x-cache" not in (await stage.generate(**LEMON)).headers
    assert len(stage.worker.claimed) == 2


async def test_callers_share_only_where_the_service_says_so(
    stage: Stage, stranger: httpx.AsyncClient, open_stage: OpenStage
) -> None:
    await stage.generate(**LEMON)
    assert (await stranger.post("/generate", json=LEMON)).headers["x-cache"] == "miss"
    shared = await open_stage(reuse_s=60, reuse_across_keys=True)
    await shared.generate(**LEMON)
    transport = httpx.ASGITransport(shared.app, client=("192.0.2.9", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as other:
        assert (await other.post("/generate", json=LEMON)).headers["x-cache"] == "hit"
        # A job's address is its caller's.
        answer = await other.post("/generate", json=LEMON, headers=ASYNC)
        assert (answer.status_code, answer.headers["x-cache"]) == (202, "miss")


async def test_a_degraded_picture_answers_only_requests_that_are_degraded_as_far(stage: Stage) -> None:
    """20 steps are 40 rows of 50 ms, 10 steps are 20: only those fit into 1.2 s."""
    hurried = []
    for _ in range(2):
        given = stage.worker.broker.given_rows("stub")
        await stage.worker.report(step_per_row_s=0.05, max_rows=1, given_rows=given)
        hurried.append(await stage.generate(**LEMON, deadline_ms=1200))
    assert [answer.json()["rung"] for answer in hurried] == ["half", "half"]
    assert [answer.headers["x-cache"] for answer in hurried] == ["miss", "hit"]
    assert hurried[1].headers["x-degraded"] == "true"
    refused = await stage.generate(**LEMON, deadline_ms=1200, allow_degraded=False)
    assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
    patient = await stage.generate(**LEMON, allow_degraded=False)
    assert (patient.headers["x-cache"], patient.headers["x-degraded"]) == ("miss", "false")
    # What was drawn in full answers all, in no time.
    bodies: list[dict[str, Any]] = [{"deadline_ms": 1200}, {"deadline_ms": 1, "allow_degraded": False}]
    for body in [*bodies, {"min_steps": 20}]:
        answer = await stage.generate(**LEMON, **body)
        assert (answer.headers["x-cache"], answer.headers["x-degraded"]) == ("hit", "false"), body


async def test_a_degraded_edit_is_reused_by_the_steps_that_it_walked(stage: Stage) -> None:
    """At strength 0.5 half of the steps are walked: 10 of 20, or 5 of 10."""
    edit = {**LEMON, "image": data_url(PIXELS), "strength": 0.5, "deadline_ms": 700}
    answers = []
    for _ in range(2):
        given = stage.worker.broker.given_rows("stub")
        await stage.worker.report(step_per_row_s=0.05, max_rows=1, given_rows=given)
        answers.append(await stage.generate(**edit))
    assert [(answer.json()["rung"], answer.json()["steps_used"]) for answer in answers] == [("half", 5)] * 2
    assert [answer.headers["x-cache"] for answer in answers] == ["miss", "hit"]


async def test_a_picture_that_was_moved_down_under_way_is_drawn_again(stage: Stage) -> None:
    stage.worker.hold = True
    first = asyncio.create_task(stage.generate(**LEMON))
    await drawing(stage)
    claim = stage.worker.claimed[0]
    moved = replace(stage.worker.result(claim), steps_used=11, degraded=True, reason="load", rung="half")
    assert await stage.broker.finish(claim.lease, moved)
    assert (await first).headers["x-degraded"] == "true"
    stage.worker.hold = False
    again = await stage.generate(**LEMON)
    assert (again.headers["x-cache"], again.headers["x-degraded"]) == ("miss", "false")


async def test_a_picture_of_another_bundle_is_drawn_again(stage: Stage) -> None:
    stage.worker.hold = True
    first = asyncio.create_task(stage.generate(**LEMON))
    await drawing(stage)
    claim = stage.worker.claimed[0]
    assert await stage.broker.finish(claim.lease, replace(stage.worker.result(claim), bundle="another"))
    await first
    stage.worker.hold = False
    assert (await stage.generate(**LEMON)).headers["x-cache"] == "miss"


async def test_many_at_once_are_drawn_once(stage: Stage) -> None:
    stage.worker.hold = True
    tasks = [asyncio.create_task(stage.generate(PNG, **LEMON)) for _ in range(12)]
    await drawing(stage)
    await joined(stage, 11)
    await finish(stage)
    answers = await asyncio.gather(*tasks)
    assert sorted(answer.headers["x-cache"] for answer in answers) == ["joined"] * 11 + ["miss"]
    assert len({answer.content for answer in answers}) == 1
    assert len(stage.worker.claimed) == 1


@pytest.mark.parametrize("leaving", ["first", "second"])
async def test_one_client_goes_and_the_other_is_answered(stage: Stage, serve: Serve, leaving: str) -> None:
    stage.worker.hold = True
    address = f"http://127.0.0.1:{await serve(stage)}"
    async with httpx.AsyncClient(base_url=address) as one, httpx.AsyncClient(base_url=address) as two:
        first = asyncio.create_task(one.post("/generate", json=LEMON))
        await drawing(stage)
        second = asyncio.create_task(two.post("/generate", json=LEMON))
        await joined(stage, 1)
        left, stays = (first, second) if leaving == "first" else (second, first)
        left.cancel()
        await asyncio.wait([left])

        async def alone() -> bool:
            job_id = stage.worker.claimed[0].job.id
            status = await stage.broker.status(job_id)
            held: Any = await stage.broker._client.scard(stage.broker.keys.holders(job_id))
            return status is not None and (held == 0 or status.state == "cancelled")

        await wait_until(alone)
        await finish(stage)
        assert (await stays).status_code == 200
    assert len(stage.worker.claimed) == 1


async def test_a_job_that_is_deleted_runs_on_for_who_joined_it(stage: Stage) -> None:
    stage.worker.hold = True
    address = await stage.queued(**LEMON)
    await drawing(stage)
    waiting = asyncio.create_task(stage.generate(**LEMON))
    await joined(stage, 1)
    assert (await stage.client.delete(address)).json()["state"] == "cancelled"
    await finish(stage)
    assert (await waiting).headers["x-cache"] == "joined"
    assert (await stage.client.get(address)).json()["state"] == "cancelled"


async def test_all_go_and_the_job_is_cancelled(stage: Stage, serve: Serve) -> None:
    stage.worker.hold = True
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{await serve(stage)}") as client:
        tasks = [asyncio.create_task(client.post("/generate", json=LEMON)) for _ in range(3)]
        await drawing(stage)
        await joined(stage, 2)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    (claim,) = stage.worker.claimed

    async def cancelled() -> bool:
        return claim.job.id in (await stage.broker.renew([claim.lease])).cancelled

    await wait_until(cancelled)


async def test_who_is_due_earlier_is_drawn_alone(stage: Stage) -> None:
    stage.worker.hold = True
    tasks = [asyncio.create_task(stage.generate(**LEMON, deadline_ms=60_000))]
    await drawing(stage)
    bodies: list[dict[str, Any]] = [{"deadline_ms": 30_000}, {}]
    for body in bodies:
        tasks.append(asyncio.create_task(stage.generate(**LEMON, **body)))
        await drawing(stage, len(tasks))
    tasks.append(asyncio.create_task(stage.generate(**LEMON)))
    await joined(stage, 1)
    for number in range(3):
        await finish(stage, number)
    assert [(await task).headers["x-cache"] for task in tasks] == ["miss", "miss", "miss", "joined"]


async def test_the_deadline_of_one_does_not_end_the_other(stage: Stage) -> None:
    stage.worker.hold = True
    first = asyncio.create_task(stage.generate(**LEMON, deadline_ms=700))
    await drawing(stage)
    second = asyncio.create_task(stage.generate(**LEMON, deadline_ms=20_000))
    await joined(stage, 1)
    assert (await first).status_code == 504
    # Its worker gives the job up, as one does whose deadline has passed.
    claim = stage.worker.claimed[0]
    fault: dict[str, Any] = {"code": "deadline-exceeded", "detail": "It was late.", "extra": {}}
    assert await stage.broker.fail(claim.lease, fault)
    await drawing(stage, 2)
    late = stage.worker.claimed[1].job
    assert late.deadline_at is not None
    assert late.deadline_at - late.created_at < 19.5, "it has what is left of its deadline"
    await finish(stage)
    answer = await second
    assert answer.status_code == 200
    assert answer.headers["x-cache"] == "miss"
    assert answer.headers["x-job-id"] == late.id


async def test_a_stream_joins_one_with_as_many_previews(stage: Stage) -> None:
    stage.worker.hold = True
    body = {"prompt": "lemon", "seed": 7, "stream": True, "partial_images": 1}
    first = asyncio.create_task(stage.client.post(OPENAI, json=body))
    await drawing(stage)
    second = asyncio.create_task(stage.client.post(OPENAI, json=body))
    await joined(stage, 1)
    third = asyncio.create_task(stage.client.post(OPENAI, json={**body, "partial_images": 3}))
    await drawing(stage, 2)
    for number, previews in enumerate((1, 3)):
        await previewed(stage, number, previews)
        await finish(stage, number)
    answers = await asyncio.gather(first, second, third)
    assert [answer.headers["x-cache"] for answer in answers] == ["miss", "joined", "miss"]
    assert [answer.text.count("partial_image\n") for answer in answers] == [1, 1, 3]


async def test_a_job_is_its_own_unless_it_is_done(stage: Stage) -> None:
    stage.worker.hold = True
    first, second = [await stage.queued(**LEMON) for _ in range(2)]
    assert first != second
    await drawing(stage, 2)
    await finish(stage, 0)
    await finish(stage, 1)
    third = await stage.generate(ASYNC, **LEMON)
    assert (third.status_code, third.headers["x-cache"]) == (202, "hit")
    assert third.headers["location"] == second
    assert third.json()["state"] == "done"


async def test_a_key_is_answered_as_others_are_and_replayed_where_it_drew(stage: Stage) -> None:
    first, replay = [await stage.generate({"idempotency-key": "a"}, **LEMON) for _ in range(2)]
    assert (first.headers["x-cache"], replay.headers["idempotency-replayed"]) == ("miss", "true")
    other = await stage.generate({"idempotency-key": "b"}, **LEMON)
    assert other.headers["x-cache"] == "hit"
    assert len(stage.worker.claimed) == 1


async def test_a_broken_record_of_another_is_no_answer(stage: Stage) -> None:
    await stage.generate(**LEMON)
    job_id = stage.worker.claimed[0].job.id
    await stage.broker._client.hset(stage.broker.keys.job(job_id), "wire", b"\xc1")
    assert (await stage.generate(**LEMON)).headers["x-cache"] == "miss"


FULL, HALF = Rung("full", "ddim", 20, "trailing", (0, 1), 0), Rung("half", "ddim", 10, "trailing", (0, 1), 1)
# A value of each field of a job, other than those of the job below.
CHANGED: dict[str, Any] = {
    "condition": (ConditionTerm((1,)),),
    "mix": "compose",
    "seeds": (8,),
    "format": "webp",
    "guidance_interval": (0.0, 0.5),
    "guidance_embedded": 3.5,
    "size": (32, 32),
    "requested": HALF,
    "admitted": HALF,
    "trace": {"a": "b"},
    "deadline_at": 1.0,
    "min_quality": 0.5,
    "allow_degraded": False,
    "priority": "high",
    "reason": "load",
    "rung": "half",
    "source": SourcePicture(b"a", None, 0.5),
    "adapters": (AdapterUse("a", 1.0, "1"),),
}


@pytest.mark.parametrize("name", [field.name for field in fields(Job)])
def test_every_field_but_bookkeeping_is_in_the_digest(name: str, make_job: Callable[..., Job]) -> None:
    """A field that a release adds is in it, without a word here, unless it is named as bookkeeping."""
    job = make_job(requested=FULL, admitted=FULL)
    value = getattr(job, name)
    other = CHANGED[name] if name in CHANGED else value + (1 if isinstance(value, int | float) else "x")
    changed = replace(job, **{name: other})
    assert changed != job
    same = picture_digest(job, "b", across=False) == picture_digest(changed, "b", across=False)
    assert same is (name in BOOKKEEPING)
    assert picture_digest(job, "b", across=False) != picture_digest(job, "c", across=False)
    across = picture_digest(job, "b", across=True) == picture_digest(changed, "b", across=True)
    assert across is (name in BOOKKEEPING | {"caller"})


@pytest.mark.parametrize(
    ("mine", "theirs", "joins"),
    [
        ({}, {}, True),
        ({"deadline_at": 9.0}, {"deadline_at": 9.0}, True),
        ({"deadline_at": 9.0}, {"deadline_at": 8.0}, True),
        ({"deadline_at": 8.0}, {"deadline_at": 9.0}, False),
        ({"deadline_at": 8.0}, {}, False),
        ({}, {"deadline_at": 8.0}, False),
        ({"allow_degraded": False}, {}, False),
        ({}, {"allow_degraded": False}, True),
        ({"min_steps": 5}, {}, False),
        ({"min_steps": 5}, {"min_steps": 5}, True),
        ({"priority": "high"}, {}, False),
        ({}, {"priority": "high"}, True),
        ({"previews": 5}, {}, False),
        ({}, {"previews": 5}, True),
    ],
)
def test_a_request_joins_where_it_loses_nothing(
    mine: dict[str, Any], theirs: dict[str, Any], joins: bool, make_job: Callable[..., Job]
) -> None:
    assert loses_nothing(make_job(**mine), make_job(**theirs)) is joins
