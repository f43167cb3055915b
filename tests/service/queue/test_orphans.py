"""Records that Redis has lost: their entries leave every index, and everything else goes on."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from redis.exceptions import ResponseError
from structlog.testing import capture_logs

from ditserve.service.errors import JobExpired, JobLost, NumericalError, to_wire
from ditserve.service.jobs import Claim, Job, JobEvent, JobResult, Lease, Progress
from ditserve.service.queue.broker import Broker
from ditserve.service.queue.listener import Listener
from tests.conftest import ManualClock, audit, close_books
from tests.service.queue.servers import Server, serving

pytestmark = pytest.mark.anyio
MakeJob = Callable[..., Job]
MakeResult = Callable[..., JobResult]
Connect = Callable[..., Awaitable[Broker]]
Damage = Callable[[Redis, str], Awaitable[Any]]

TEXTS = ("wire", "nonce", "state", "model", "flow", "caller", "deadline")
NUMBERS = ("samples", "rows", "due", "attempt", "spent", "step")


async def replaced(client: Redis, key: str) -> None:
    await client.delete(key)
    await client.set(key, "something else")


async def half_recreated(client: Redis, key: str) -> None:
    await client.delete(key)
    await client.hset(key, mapping={"suspect": 1, "step": 0})


def without(field: str) -> Damage:
    return lambda client, key: client.hdel(key, field)


DAMAGES: dict[str, Damage] = {
    "deleted": lambda client, key: client.delete(key),
    "replaced": replaced,
    "half re-created": half_recreated,
    "not a number": lambda client, key: client.hset(key, "rows", "many"),
    "not a whole number": lambda client, key: client.hset(key, "attempt", "1.5"),
    "no number that ends": lambda client, key: client.hset(key, "rows", "inf"),
    "more than can be counted": lambda client, key: client.hset(key, "spent", "9223372036854775807"),
    **{f"without {field}": without(field) for field in TEXTS + NUMBERS},
}
STATES = ("queued", "running", "returned", "suspect")
VERBS = ("claim", "finish", "fail", "retry", "hand_back", "renew", "progress", "cancel", "submit", "sweep")


@pytest.fixture
async def timed(connect: Connect, clock: Any) -> Broker:
    return await connect(clock=clock, lease_s=10, max_attempts=3)


async def claim(broker: Broker, owner: str = "w1", room: int = 100, **options: Any) -> list[Claim]:
    return await broker.claim(owner, models=["emoji"], max_samples=room, **options)


async def read_events(broker: Broker, job_id: str) -> list[JobEvent]:
    return [event async for event in broker.events(job_id)]


async def bring(broker: Broker, job: Job, state: str, clock: Any) -> None:
    """Bring the only job of the queue into a state."""
    await broker.submit(job)
    if state == "queued":
        return
    (entry,) = await claim(broker)
    if state == "returned":
        await broker.hand_back(entry.lease, checkpoint=b"half")
    elif state == "suspect":
        clock.advance(11)
        await broker.sweep()


async def act(verb: str, broker: Broker, job: Job, make_result: MakeResult) -> None:
    lease = Lease(job.id, "w1", 1)
    error = to_wire(NumericalError())
    actions: dict[str, Callable[[], Awaitable[Any]]] = {
        "claim": lambda: claim(broker),
        "finish": lambda: broker.finish(lease, make_result()),
        "fail": lambda: broker.fail(lease, error),
        "retry": lambda: broker.fail(lease, error, retry=True),
        "hand_back": lambda: broker.hand_back(lease),
        "renew": lambda: broker.renew([lease]),
        "progress": lambda: broker.progress(Progress(lease, "step", {"step": 1})),
        "cancel": lambda: broker.cancel(job.id),
        "submit": lambda: broker.submit(job),
        "sweep": broker.sweep,
    }
    await actions[verb]()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("damage", DAMAGES)
async def test_what_is_left_of_a_broken_record_goes_with_the_first_script_that_meets_it(
    damage: str,
    state: str,
    timed: Broker,
    client: Redis,
    make_job: MakeJob,
    make_result: MakeResult,
    clock: Any,
) -> None:
    for number, verb in enumerate(VERBS):
        job, other = make_job(), make_job(caller="bob")
        await bring(timed, job, state, clock)
        await timed.submit(other)
        await DAMAGES[damage](client, timed.keys.job(job.id))
        await act(verb, timed, job, make_result)
        clock.advance(1)
        await timed.sweep()
        await audit(client, timed.keys)
        assert (await timed.load()).orphans == number + 1
        if verb == "submit":
            assert await timed.cancel(job.id), "it is a new job now"
        else:
            assert await timed.status(job.id) is None
            with pytest.raises(JobLost):
                await timed.outcome(job.id)
            assert [event.kind for event in await read_events(timed, job.id)][-1] == "failed"
        for entry in await claim(timed, "w2"):
            await timed.finish(entry.lease, make_result())
        assert await timed.cancel(other.id) is (verb == "claim"), "the other job was served as ever"


async def test_a_job_lost_while_it_runs_is_told_to_its_waiter_and_its_worker_at_once(
    timed: Broker, client: Redis, make_job: MakeJob, wait_until: Any
) -> None:
    job = make_job()
    listener = Listener(timed)
    dropped: list[str] = []
    timed.work.watch(dropped.append)
    await wait_until(lambda: listener.live)
    await timed.work.wait(0.5)
    await timed.submit(job)
    (entry,) = await claim(timed)
    waiting = asyncio.create_task(listener.wait(job.id, new=True))
    await client.delete(timed.keys.job(job.id))
    assert await timed.progress(Progress(entry.lease, "step", {"step": 1})) == [False]
    async with asyncio.timeout(1.5):
        with pytest.raises(JobLost):
            await waiting
    await wait_until(lambda: dropped == [job.id])
    await listener.aclose()


@pytest.mark.parametrize("index", range(13))
async def test_an_index_that_is_lost_is_made_again(
    index: int, timed: Broker, client: Redis, make_job: MakeJob, make_result: MakeResult, clock: Any
) -> None:
    jobs = [make_job(caller=f"caller {k % 3}", cost_rows=3 + k) for k in range(9)]
    for job in jobs:
        await timed.submit(job)
    first, second, third = await claim(timed, room=3)
    await timed.finish(first.lease, make_result())
    await timed.hand_back(second.lease)
    key = timed.keys.permanent[index]
    await client.delete(key)
    assert not (await timed.renew([third.lease])).lost, "a held lease is renewed, and is in the index again"
    clock.advance(1)
    await timed.sweep()
    await audit(client, timed.keys)
    assert await timed.finish(third.lease, make_result())
    for _ in range(9):
        for entry in await claim(timed, "w2", room=1):
            assert await timed.finish(entry.lease, make_result())
    statuses = [await timed.status(job.id) for job in jobs]
    assert [status and status.state for status in statuses] == ["done"] * 9
    clock.advance(1)
    await timed.sweep()
    await audit(client, timed.keys)
    assert (await timed.load()).orphans == 0


async def test_many_orphans_are_removed_at_once(
    timed: Broker, client: Redis, make_job: MakeJob, clock: Any
) -> None:
    jobs = [make_job(caller=f"caller {k % 5}") for k in range(60)]
    for job in jobs:
        await timed.submit(job)
    await client.delete(*(timed.keys.job(job.id) for job in jobs[::2]))
    entries = await claim(timed, room=4)
    assert len(entries) == 4
    assert {entry.job.id for entry in entries} <= {job.id for job in jobs[1::2]}
    await audit(client, timed.keys)
    load = await timed.load()
    assert (load.orphans, load.queued_jobs) == (30, 26)


async def test_a_lost_result_counts_no_longer(
    timed: Broker, client: Redis, make_job: MakeJob, make_result: MakeResult, clock: Any
) -> None:
    for _ in range(3):
        await timed.submit(make_job())
    entries = await claim(timed)
    for entry in entries:
        await timed.finish(entry.lease, make_result(bytes(1000)))
    await client.delete(timed.keys.result(entries[0].job.id), timed.keys.sizes)
    clock.advance(1)
    await timed.sweep()
    stored: Any = await client.hget(timed.keys.totals, "bytes")
    assert 2000 < int(stored) < 2500
    await audit(client, timed.keys)


async def test_keys_of_another_kind_beside_a_job_do_no_harm(
    timed: Broker, client: Redis, make_job: MakeJob, make_result: MakeResult
) -> None:
    job = make_job()
    await timed.submit(job)
    await client.delete(timed.keys.events(job.id))
    await client.set(timed.keys.events(job.id), "a string", px=60_000)
    await client.hset(timed.keys.checkpoint(job.id), "a", "hash")
    (entry,) = await claim(timed)
    assert entry.checkpoint == b""
    assert await timed.finish(entry.lease, make_result())
    assert [event.kind for event in await read_events(timed, job.id)] == ["started", "done"]


async def write_another_kind(client: Redis, key: str) -> None:
    """Put a list in the place of a key, whichever that is; there are no lists in the queue."""
    await client.delete(key)
    await client.rpush(key, "of another kind")


@pytest.mark.parametrize("verb", [*VERBS, "load"])
async def test_an_index_of_another_kind_is_made_again_by_the_script_that_meets_it(
    verb: str, timed: Broker, client: Redis, make_job: MakeJob, make_result: MakeResult, clock: Any
) -> None:
    for index in timed.keys.permanent:
        job, other = make_job(), make_job(caller="bob")
        await bring(timed, job, "running", clock)
        await timed.submit(other)
        await write_another_kind(client, index)
        await (timed.load() if verb == "load" else act(verb, timed, job, make_result))
        for _ in range(4):
            clock.advance(11)
            await timed.sweep()
            await swept(client, timed)
            for entry in await claim(timed, "w2"):
                assert await timed.finish(entry.lease, make_result())
        status = await timed.status(other.id)
        assert (status and status.state) == "done"
        await audit(client, timed.keys)


@pytest.mark.parametrize("index", ["queue", "leases", "ages", "flows", "dues", "totals"])
async def test_a_claim_that_an_index_cut_short_is_given_all_that_it_took(
    index: str, timed: Broker, client: Redis, make_job: MakeJob, make_result: MakeResult
) -> None:
    jobs = [make_job(caller=caller) for caller in ("alice", "bob", "alice")]
    for job in jobs:
        await timed.submit(job)
    await write_another_kind(client, getattr(timed.keys, index))
    entries = [entry for _ in range(3) for entry in await claim(timed)]
    assert {entry.job.id for entry in entries} == {job.id for job in jobs}, "no lease has ended meanwhile"
    for entry in entries:
        assert await timed.finish(entry.lease, make_result())
    await audit(client, timed.keys)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e20", "1.5", "many", "", "9223372036854775807"])
async def test_a_count_that_is_no_number_is_counted_anew(
    value: str, timed: Broker, client: Redis, make_job: MakeJob, make_result: MakeResult
) -> None:
    keys = timed.keys
    await timed.submit(make_job(caller="alice"))
    for field in ("rows", "clock", "bytes", "dead", "orphans", "kept", "broken", "reconciled", "scanned"):
        await client.hset(keys.totals, field, value)
    await client.hset(keys.unfinished, "alice", value)
    await client.hset(keys.sizes, "nobody", value)
    await client.set(keys.given("w1"), value, px=60_000)
    await timed.load()
    await timed.submit(make_job(caller="alice"))
    first, second = await claim(timed)
    assert await timed.finish(first.lease, make_result())
    assert await timed.fail(second.lease, to_wire(NumericalError()))
    await swept(client, timed)
    await audit(client, keys)
    assert (await timed.load()).queued_rows == 0


async def test_keys_of_another_kind_are_read_as_if_they_were_not_there(
    timed: Broker, client: Redis, make_job: MakeJob, make_result: MakeResult
) -> None:
    good, bad = make_job(), make_job()
    for job in (good, bad):
        await timed.submit(job)
    for entry in await claim(timed):
        await timed.finish(entry.lease, make_result())
    keys = (timed.keys.result(bad.id), timed.keys.events(bad.id), timed.keys.job(bad.id), timed.keys.dead)
    await write_another_kind(client, keys[0])
    whole, expired = await timed.outcomes([good.id, bad.id])
    assert isinstance(whole, JobResult)
    assert isinstance(expired, JobExpired)
    assert await timed.result(bad.id) is None
    await write_another_kind(client, keys[1])
    assert await timed.last_event_id(bad.id) is None
    assert await read_events(timed, bad.id) == []
    await write_another_kind(client, keys[2])
    assert await timed.status(bad.id) is None
    await write_another_kind(client, keys[3])
    assert await timed.dead() == []
    await client.delete(*keys)


async def swept(client: Redis, broker: Broker) -> None:
    """Sweep until all keys of the server were looked at, a second apart."""
    await client.hdel(broker.keys.totals, "scanned")
    while True:
        await client.hdel(broker.keys.totals, "reconciled")
        await broker.sweep()
        if await client.hget(broker.keys.totals, "scanned") in (None, b"0"):
            return


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("lost", ["leases", "all indexes"])
async def test_a_job_that_no_index_holds_is_found_by_the_sweep(
    lost: str,
    state: str,
    timed: Broker,
    client: Redis,
    make_job: MakeJob,
    make_result: MakeResult,
    clock: Any,
) -> None:
    job = make_job()
    await bring(timed, job, state, clock)
    await client.delete(timed.keys.leases, *(timed.keys.permanent if lost == "all indexes" else ()))
    await swept(client, timed)
    await audit(client, timed.keys)
    # Should its worker be dead, another takes it once the lease that it was given has ended.
    clock.advance(11)
    await timed.sweep()
    (entry,) = await claim(timed, "w2")
    assert (entry.job, await timed.finish(entry.lease, make_result())) == (job, True)


async def test_a_worker_that_lives_keeps_a_job_whose_lease_was_lost(
    timed: Broker, client: Redis, make_job: MakeJob, make_result: MakeResult, clock: Any
) -> None:
    await timed.submit(make_job())
    (entry,) = await claim(timed)
    await client.delete(timed.keys.leases)
    await swept(client, timed)
    clock.advance(5)
    assert not (await timed.renew([entry.lease])).lost
    clock.advance(9)
    assert await timed.sweep() == 0
    assert await timed.finish(entry.lease, make_result())


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from((*VERBS, "requeue", "evict", "evict", "corrupt", "evict an index", "time")),
        st.integers(0, 30),
    ),
    max_size=40,
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(operations=OPERATIONS)
def test_random_histories_with_eviction(
    operations: list[tuple[str, int]], redis_url: str, make_job: MakeJob, make_result: MakeResult
) -> None:
    """Whatever is evicted in between, no script fails, the audit holds, and what is left is served."""

    async def history() -> None:
        clock = ManualClock()
        broker = await Broker.connect(
            redis_url, namespace=f"evict-{uuid.uuid4().hex[:8]}", clock=clock, lease_s=10, max_attempts=2
        )
        client = Redis.from_url(redis_url)
        jobs = [make_job(caller=f"caller {k}", cost_rows=1 + k, seeds=(1,) * (1 + k % 2)) for k in range(4)]
        for operation, pick in operations:
            job = jobs[pick % 4]
            key = broker.keys.job(job.id)
            if operation == "evict":
                await client.delete(key)
            elif operation == "corrupt":
                # A record that was replaced by one of another kind cannot be damaged further.
                with suppress(ResponseError):
                    await DAMAGES[sorted(DAMAGES)[pick % len(DAMAGES)]](client, key)
            elif operation == "evict an index":
                await client.delete(broker.keys.permanent[pick % 13])
            elif operation == "time":
                clock.advance(1 + pick % 12)
            elif operation == "requeue":
                await broker.requeue(job.id)
            else:
                await act(operation, broker, job, make_result)
        clock.advance(11)
        await swept(client, broker)
        await audit(client, broker.keys)
        clock.advance(11)
        await broker.sweep()
        for _ in range(10):
            for entry in await claim(broker, "last", idle=True):
                assert await broker.finish(entry.lease, make_result())
        assert (await broker.load()).queued_jobs == 0
        clock.advance(11)
        await broker.sweep()
        await client.aclose()
        await broker.aclose()
        await close_books(redis_url, broker.keys.namespace)

    asyncio.run(history())


@pytest.mark.parametrize("policy", ["noeviction", "allkeys-lru"])
async def test_a_redis_that_may_evict_is_warned_of(policy: str, tmp_path: Path, wait_until: Any) -> None:
    server = Server(tmp_path, f"maxmemory-policy {policy}", "maxmemory 64mb")
    with serving(server), capture_logs() as lines:
        await wait_until(server.answers)
        broker = await Broker.connect(server.url)
        await broker.aclose()
    assert [line.get("policy") for line in lines] == ["allkeys-lru"] * (policy != "noeviction")


async def test_a_policy_that_changes_is_noticed_once(tmp_path: Path, wait_until: Any) -> None:
    server = Server(tmp_path)
    with serving(server), capture_logs() as lines:
        await wait_until(server.answers)
        broker = await Broker.connect(server.url)
        async with Redis.from_url(server.url) as admin:
            for policy in ("volatile-lru", "noeviction", "allkeys-random"):
                await admin.config_set("maxmemory-policy", policy)
                for _ in range(2):
                    await broker.check_eviction()
        await broker.aclose()
    assert [line["policy"] for line in lines] == ["volatile-lru", "allkeys-random"]
