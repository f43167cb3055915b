"""Callbacks from the request to the receiver: each end is told, signed, once, and again until it is heard."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import REGISTRY
from pydantic_settings import SettingsError
from standardwebhooks import Webhook

from ditserve.service.callbacks import delivery, post
from ditserve.service.callbacks.delivery import delay_before
from ditserve.service.errors import QueueUnavailable
from ditserve.service.queue import patience
from ditserve.service.settings import Settings
from tests.conftest import wait_until
from tests.service.callbacks.conftest import HANG, SECRETS, Receiver
from tests.service.callbacks.conftest import receiver as receiver  # a fixture
from tests.service.http.conftest import OpenStage, Stage

pytestmark = pytest.mark.anyio
ASYNC = {"prefer": "respond-async"}
LEMON = {"label": "lemon"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "LOOK_S", 0.02)
    monkeypatch.setattr(delivery, "FIRST_DELAY_S", 0.05)


def calling(receiver: Receiver, **options: Any) -> dict[str, Any]:
    """Return the settings of a service that may call the receiver."""
    allow = {"callback_allow": receiver.url, "callback_networks": "127.0.0.0/8", "callback_secret": SECRETS}
    return {**allow, **options}


@pytest.fixture
async def stage(open_stage: OpenStage, receiver: Receiver) -> Stage:
    return await open_stage(**calling(receiver))


def counted(outcome: str) -> float:
    return REGISTRY.get_sample_value("dit_callbacks_total", {"outcome": outcome}) or 0.0


async def state(stage: Stage, address: str) -> dict[str, Any]:
    body: dict[str, Any] = (await stage.client.get(address)).json()
    return body


async def settled(stage: Stage, address: str) -> dict[str, Any]:
    """Return the callback of a job once it is tried no more."""

    async def there() -> Any:
        callback = (await state(stage, address))["callback"]
        return callback if callback["state"] in ("delivered", "given-up") else None

    callback: dict[str, Any] = await wait_until(there)
    return callback


async def test_the_receiver_is_sent_what_the_job_s_address_answers(stage: Stage, receiver: Receiver) -> None:
    before = counted("delivered")
    answer = await stage.generate(ASYNC, condition=LEMON, callback_url=receiver.url)
    assert answer.json()["callback"] == {"state": "waiting", "attempts": 0, "fault": None}
    callback = await settled(stage, answer.headers["location"])
    assert callback == {"state": "delivered", "attempts": 1, "fault": None}
    (sent,) = receiver.posts
    now = await state(stage, answer.headers["location"])
    assert sent.job == {**now, "callback": {"state": "pending", "attempts": 1, "fault": None}}
    assert (sent.job["state"], len(sent.job["links"]["images"])) == ("done", 1)
    assert b"b64" not in sent.body
    assert counted("delivered") == before + 1
    for secret in SECRETS.split(","):
        Webhook(secret).verify(sent.body, sent.headers)


async def test_every_end_is_told(stage: Stage, receiver: Receiver) -> None:
    stage.worker.fail_with = {"code": "numerical-error", "detail": "NaN.", "extra": {}}
    await settled(stage, await stage.queued(callback_url=receiver.url))
    stage.worker.hold = True
    stage.worker.fail_with = None
    running = await stage.queued(callback_url=receiver.url)
    await wait_until(lambda: len(stage.worker.claimed) == 2)
    await stage.client.delete(running)
    await settled(stage, running)
    late = await stage.queued(callback_url=receiver.url, deadline_ms=60_000)
    await wait_until(lambda: len(stage.worker.claimed) == 3)
    fault = {"code": "deadline-exceeded", "detail": "It was late.", "extra": {}}
    await stage.broker.fail(stage.worker.claimed[2].lease, fault)
    await settled(stage, late)
    told = [(got.job["state"], got.job["error"]["code"]) for got in receiver.posts]
    assert told == [
        ("failed", "numerical-error"),
        ("cancelled", "cancelled"),
        ("failed", "deadline-exceeded"),
    ]


async def test_a_receiver_that_fails_is_called_again(
    stage: Stage, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(post, "POST_S", 0.3)
    before = counted("failed")
    receiver.answers = [500, HANG, b"HTTP/1.1 302 X\r\nlocation: /\r\n\r\n", 202]
    callback = await settled(stage, await stage.queued(callback_url=receiver.url))
    assert callback == {"state": "delivered", "attempts": 4, "fault": None}
    assert len({got.headers["webhook-id"] for got in receiver.posts}) == 1
    assert {got.path for got in receiver.posts} == {"/hook"}
    assert counted("failed") == before + 3


async def test_it_is_given_up_at_410(stage: Stage, receiver: Receiver) -> None:
    before = counted("given-up")
    receiver.answers = [410]
    callback = await settled(stage, await stage.queued(callback_url=receiver.url))
    assert callback == {"state": "given-up", "attempts": 1, "fault": "the answer was 410"}
    assert counted("given-up") == before + 1


async def test_it_is_given_up_when_the_images_are_gone(open_stage: OpenStage, receiver: Receiver) -> None:
    before = counted("given-up")
    stage = await open_stage(**calling(receiver, result_ttl_s=1.0))
    receiver.answers = [503] * 100
    callback = await settled(stage, await stage.queued(callback_url=receiver.url))
    assert (callback["state"], callback["fault"]) == ("given-up", "the answer was 503")
    assert 3 <= callback["attempts"] <= 10
    assert counted("given-up") == before + 1


async def test_two_processes_call_once(open_stage: OpenStage, receiver: Receiver) -> None:
    stages = [await open_stage(**calling(receiver)) for _ in range(2)]
    jobs = [await stages[k % 2].queued(callback_url=receiver.url) for k in range(24)]
    for job in jobs:
        await settled(stages[0], job)
    assert sorted(got.job["links"]["self"] for got in receiver.posts) == sorted(jobs)


async def test_a_redis_that_is_away_after_a_delivery_is_waited_for(
    stage: Stage, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle, faults = stage.broker.settle_callback, [QueueUnavailable("It is away.")] * 2

    async def settle_later(*args: Any, **options: Any) -> bool:
        if faults:
            raise faults.pop()
        return await settle(*args, **options)

    monkeypatch.setattr(stage.broker, "settle_callback", settle_later)
    monkeypatch.setattr(patience, "RETRY_S", 0.05)
    callback = await settled(stage, await stage.queued(callback_url=receiver.url))
    assert (callback["state"], callback["attempts"], faults) == ("delivered", 1, [])
    assert len(receiver.posts) == 1


async def test_what_is_under_way_when_a_process_stops_is_told_once(
    stage: Stage, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    going, answered = asyncio.Event(), asyncio.Event()
    sent = post.post

    async def slow(*args: Any, **options: Any) -> int:
        going.set()
        await answered.wait()
        return await sent(*args, **options)

    monkeypatch.setattr(delivery, "post", slow)
    context = stage.app.state.context
    deliveries = delivery.Deliveries(stage.broker, _compose(context), stage.settings)
    running = asyncio.create_task(deliveries.run())
    job = await stage.queued(callback_url=receiver.url)
    await going.wait()
    running.cancel()
    answered.set()
    await asyncio.wait([running])
    assert (await settled(stage, job))["attempts"] == 1
    assert len(receiver.posts) == 1


def _compose(context: Any) -> delivery.Compose:
    async def compose(job_id: str) -> delivery.CallbackMessage:
        return delivery.CallbackMessage((await context.job(job_id)).status.job.callback_url, "{}")

    return compose


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/hook",
        "http://localhost:{port}/hook",
        "http://127.1:{port}/hook",
        "http://2130706433:{port}/hook",
        "http://[::ffff:127.0.0.1]:{port}/hook",
        "http://127.0.0.1.:{port}/hook",
        "http://127.0.0.1:{port}@evil.example/hook",
        "http://evil.example#@127.0.0.1:{port}/hook",
        "http://127.0.0.1:{port}/hooked",
        "http://127.0.0.1:{port}/hook/../admin",
        "https://127.0.0.1:{port}/hook",
        "http://１２７.0.0.1:{port}/hook",
        "file:///etc/passwd",
        "",
    ],
)
async def test_another_address_is_refused(stage: Stage, receiver: Receiver, url: str) -> None:
    answer = await stage.generate(ASYNC, callback_url=url.format(port=receiver.port))
    assert (answer.status_code, answer.json()["code"]) == (422, "callback-refused")
    assert answer.json()["errors"][0]["pointer"] == "#/callback_url"
    assert stage.worker.claimed == []


async def test_what_is_not_switched_on_or_not_asked_for_is_refused(
    open_stage: OpenStage, receiver: Receiver
) -> None:
    off = await open_stage()
    refused = await off.generate(ASYNC, callback_url=receiver.url)
    assert (refused.status_code, refused.json()["code"]) == (422, "callback-refused")
    on = await open_stage(**calling(receiver))
    waiting = await on.generate(callback_url=receiver.url)
    assert (waiting.status_code, waiting.json()["code"]) == (422, "invalid-request")
    assert "respond-async" in waiting.json()["detail"]
    body = {"prompt": "lemon", "callback_url": receiver.url}
    assert (await on.client.post("/v1/images/generations", json=body)).status_code == 400


async def test_a_private_address_is_not_called_and_the_job_says_so(
    open_stage: OpenStage, receiver: Receiver
) -> None:
    stage = await open_stage(**calling(receiver, callback_networks=""))
    job = await stage.queued(callback_url=receiver.url)

    async def tried() -> bool:
        return bool((await state(stage, job))["callback"]["fault"])

    await wait_until(tried)
    assert "not on the public internet" in (await state(stage, job))["callback"]["fault"]
    assert receiver.posts == []


async def test_a_job_with_a_callback_is_its_own(open_stage: OpenStage, receiver: Receiver) -> None:
    stage = await open_stage(**calling(receiver, reuse_s=60))
    body: dict[str, Any] = {"condition": LEMON, "seed": 7}
    first, second = [await stage.queued(**body, callback_url=receiver.url) for _ in range(2)]
    assert first != second
    for job in (first, second):
        assert (await settled(stage, job))["state"] == "delivered"
    assert (await stage.generate(**body)).headers["x-cache"] == "hit"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--callback-allow=a.example"], "no --callback-secret"),
        (["--callback-allow=a b", f"--callback-secret={SECRETS}"], "--callback-allow: 'a b'"),
        (["--callback-secret=hunter2"], "--callback-secret: write whsec_"),
        (["--callback-secret=whsec_c2hvcnQ="], "--callback-secret: write whsec_"),
        (["--callback-networks=10.0.0.0/99"], "--callback-networks"),
        (["--reuse-s=7200"], "--reuse-s 7200 is above --result-ttl-s 3600"),
    ],
)
def test_settings_that_cannot_work_are_refused(flags: list[str], sentence: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        Settings.parse(flags)
    assert sentence in str(refusal.value)
    assert "hunter2" not in str(refusal.value)


def test_each_try_comes_later() -> None:
    assert [delay_before(number) for number in (1, 2, 3, 4)] == [0.05, 0.1, 0.2, 0.4]
    assert delay_before(10**6) == delivery.LONGEST_DELAY_S
