"""Random histories of the queue against a simple model of it: no job lost or answered twice, fair order."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Collection, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ditserve.service.errors import InternalError, QueueFull, to_wire
from ditserve.service.jobs import WEIGHTS, Claim, Job, JobResult, Lease
from ditserve.service.queue.broker import Broker
from tests.conftest import close_books

T = TypeVar("T")
LIMIT, ATTEMPTS, LEASE_S, PATIENCE_S = 6, 2, 10.0, 60.0
OWNERS = st.sampled_from(["w1", "w2", "w3"])
PICK = st.integers(0, 30)


@dataclass
class Entry:
    """A job as the model sees it."""

    job: Job
    score: float = 0.0
    state: str = "queued"
    lease: Lease | None = None
    expires: float = 0.0
    attempt: int = 0
    spent: int = 0
    suspect: bool = False
    returned: float = 0.0
    due: float = 0.0
    checkpoint: bytes = b""

    @property
    def flow(self) -> str:
        return f"{self.job.priority}:{self.job.caller}"

    @property
    def work(self) -> float:
        return self.job.cost_rows / WEIGHTS[self.job.priority]


@dataclass
class Model:
    """The queue in a page: one dictionary, one list of what waits, one virtual clock."""

    now: float
    entries: dict[str, Entry] = field(default_factory=dict)
    flows: dict[str, float] = field(default_factory=dict)
    clock: float = 0.0

    def waiting(self) -> list[Entry]:
        queued = [entry for entry in self.entries.values() if entry.state == "queued"]
        return sorted(queued, key=lambda entry: (entry.score, entry.job.id))

    def running(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.state == "running"]

    def settle(self) -> None:
        if not self.waiting():
            self.flows, self.clock = {}, 0.0

    def submit(self, job: Job) -> bool | None:
        if job.id in self.entries:
            return False
        if len(self.waiting()) >= LIMIT:
            return None
        due = self.now + PATIENCE_S if job.deadline_at is None else job.deadline_at
        entry = Entry(job, due=due)
        last = max(self.clock, self.flows.get(entry.flow, 0.0))
        later = [
            other for other in self.waiting() if other.score and other.flow == entry.flow and other.due > due
        ]
        entry.score = min((other.score - other.work for other in later), default=last) + entry.work
        for other in later:
            other.score += entry.work
        self.flows[entry.flow] = last + entry.work
        self.entries[job.id] = entry
        return True

    def claim(
        self, owner: str, room: int, idle: bool, reserved: int = 0, crowded: Collection[str] = ()
    ) -> list[Entry]:
        taken: list[Entry] = []
        crowded = set(crowded)
        if room <= 0 and not idle and not self.newcomer_waits(crowded):
            return []
        for entry in self.waiting():
            fresh = idle and not taken
            if room <= 0 and reserved <= 0:
                break
            if entry.job.deadline_at is not None and entry.job.deadline_at < self.now:
                entry.state = "failed"
                continue
            if entry.suspect and not fresh:
                if self.now - entry.returned > LEASE_S:
                    break
                continue
            samples = len(entry.job.seeds)
            if samples <= room or fresh:
                room -= samples
            elif samples <= reserved and entry.flow not in crowded:
                reserved -= samples
            else:
                room = 0
                continue
            crowded.add(entry.flow)
            entry.attempt += 1
            entry.state, entry.expires = "running", self.now + LEASE_S
            entry.lease = Lease(entry.job.id, owner, entry.attempt)
            self.clock = max(self.clock, entry.score)
            taken.append(entry)
            if entry.suspect:
                break
        self.flows = (
            {flow: finish for flow, finish in self.flows.items() if finish > self.clock}
            if taken
            else self.flows
        )
        self.settle()
        return taken

    def newcomer_waits(self, crowded: Collection[str]) -> bool:
        """Return whether any job waits that a full worker may be given, or that had its turn before."""
        return any(entry.flow not in crowded or not entry.score for entry in self.waiting())

    def put_back(self, entry: Entry) -> None:
        entry.state, entry.score, entry.returned = "queued", 0.0, self.now

    def spend(self, entry: Entry) -> None:
        entry.spent, entry.suspect, entry.checkpoint = entry.spent + 1, True, b""
        if entry.spent < ATTEMPTS:
            self.put_back(entry)
        else:
            entry.state = "dead"

    def sweep(self) -> int:
        expired = [entry for entry in self.running() if entry.expires <= self.now]
        for entry in expired:
            self.spend(entry)
        return len(expired)


class QueueHistory(RuleBasedStateMachine):
    """Runs the broker and the model side by side."""

    runner: asyncio.Runner
    url: str
    make_job: Callable[..., Job]
    make_result: Callable[..., JobResult]

    def __init__(self) -> None:
        super().__init__()
        self.model = Model(now=1_700_000_000.0)
        self.answered: dict[str, bytes] = {}
        self.serial = 0

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    @initialize()
    def open(self) -> None:
        self.broker = self.run(
            Broker.connect(
                self.url,
                namespace=f"model-{uuid.uuid4().hex[:12]}",
                clock=lambda: self.model.now,
                queue_limit=LIMIT,
                max_attempts=ATTEMPTS,
                lease_s=LEASE_S,
                result_ttl_s=60,
            )
        )

    def teardown(self) -> None:
        if hasattr(self, "broker"):
            self.run(self.drain())

    async def drain(self) -> None:
        """Bring every job left to an end."""
        for _ in range(200):
            claims = await self.claim_both("last", 8, True)
            for entry in claims:
                assert entry.lease is not None
                assert await self.broker.finish(entry.lease, self.make_result(entry.job.id.encode()))
                entry.state = "done"
            if not claims and not self.model.running():
                break
            self.model.now += LEASE_S + 1
            assert await self.broker.sweep() == self.model.sweep()
        assert not self.model.waiting()
        await self.compare()
        await self.broker.aclose()
        await close_books(self.url, self.broker.keys.namespace)

    @rule(
        caller=st.sampled_from("abc"),
        priority=st.sampled_from(["low", "normal", "high"]),
        rows=st.integers(1, 9),
        samples=st.integers(1, 3),
        patience=st.sampled_from([None, None, 5.0, 30.0, 300.0]),
    )
    def submit(self, caller: str, priority: str, rows: int, samples: int, patience: float | None) -> None:
        self.serial += 1
        job = self.make_job(
            id=f"{self.serial:04}",
            caller=caller,
            priority=priority,
            cost_rows=rows,
            seeds=tuple(range(samples)),
            deadline_at=None if patience is None else self.model.now + patience,
        )
        self.submit_both(job)

    @precondition(lambda self: self.model.entries)
    @rule(pick=PICK)
    def submit_again(self, pick: int) -> None:
        self.submit_both(list(self.model.entries.values())[pick % len(self.model.entries)].job)

    def submit_both(self, job: Job) -> None:
        expected = self.model.submit(job)
        if expected is None:
            with pytest.raises(QueueFull):
                self.run(self.broker.submit(job))
        else:
            assert self.run(self.broker.submit(job)) is expected

    @rule(
        owner=OWNERS,
        room=st.integers(0, 4),
        idle=st.booleans(),
        reserved=st.integers(0, 3),
        crowded=st.sets(st.sampled_from(["normal:a", "normal:b", "high:a"])),
    )
    def claim(self, owner: str, room: int, idle: bool, reserved: int, crowded: set[str]) -> None:
        self.run(self.claim_both(owner, room, idle, reserved, crowded))

    async def claim_both(
        self, owner: str, room: int, idle: bool, reserved: int = 0, crowded: Collection[str] = ()
    ) -> list[Entry]:
        claims = await self.broker.claim(
            owner, models=["emoji"], max_samples=room, idle=idle, reserved=reserved, crowded=crowded
        )
        expected = self.model.claim(owner, room, idle, reserved, crowded) if room or reserved else []
        assert claims == [
            Claim(entry.job, entry.lease, entry.suspect, entry.checkpoint)
            for entry in expected
            if entry.lease
        ]
        return expected

    @precondition(lambda self: self.model.entries)
    @rule(
        pick=PICK,
        stale=st.booleans(),
        verb=st.sampled_from(["finish", "fail", "retry", "hand_back", "renew"]),
    )
    def write(self, pick: int, stale: bool, verb: str) -> None:
        """Let a worker write to a job that it holds, held, or (stale) believes to hold."""
        entry = list(self.model.entries.values())[pick % len(self.model.entries)]
        lease = entry.lease or Lease(entry.job.id, "w1", 1)
        if stale:
            lease = Lease(lease.job_id, lease.owner, lease.attempt - 1)
        holds = entry.state == "running" and lease == entry.lease
        getattr(self, f"_{verb}")(entry, lease, holds)

    def _finish(self, entry: Entry, lease: Lease, holds: bool) -> None:
        repeated = entry.state == "done" and lease == entry.lease
        result = self.make_result(uuid.uuid4().bytes, attempt=lease.attempt)
        assert self.run(self.broker.finish(lease, result)) is (holds or repeated)
        if holds:
            entry.state = "done"
            assert entry.job.id not in self.answered, "answered twice"
            self.answered[entry.job.id] = result.images[0].data

    def _fail(self, entry: Entry, lease: Lease, holds: bool) -> None:
        repeated = entry.state == "failed" and lease == entry.lease
        assert self.run(self.broker.fail(lease, to_wire(InternalError()))) is (holds or repeated)
        if holds:
            entry.state = "failed"

    def _retry(self, entry: Entry, lease: Lease, holds: bool) -> None:
        repeated = entry.state == "failed" and lease == entry.lease
        assert self.run(self.broker.fail(lease, to_wire(InternalError()), retry=True)) is (holds or repeated)
        if holds:
            self.model.spend(entry)

    def _hand_back(self, entry: Entry, lease: Lease, holds: bool) -> None:
        checkpoint = uuid.uuid4().bytes if entry.job.cost_rows % 2 else b""
        assert self.run(self.broker.hand_back(lease, checkpoint=checkpoint)) is holds
        if holds:
            self.model.put_back(entry)
            entry.checkpoint = checkpoint

    def _renew(self, entry: Entry, lease: Lease, holds: bool) -> None:
        renewal = self.run(self.broker.renew([lease]))
        assert (not renewal.lost) is holds
        assert bool(renewal.cancelled) is (entry.state == "cancelled" and lease == entry.lease)
        if holds:
            entry.expires = self.model.now + LEASE_S

    @precondition(lambda self: self.model.entries)
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        entry = list(self.model.entries.values())[pick % len(self.model.entries)]
        alive = entry.state in ("queued", "running")
        assert self.run(self.broker.cancel(entry.job.id)) is alive
        if alive:
            entry.state = "cancelled"
            self.model.settle()

    @rule(seconds=st.sampled_from([1.0, 6.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.model.now += seconds
        assert self.run(self.broker.sweep()) == self.model.sweep()

    @precondition(lambda self: self.model.entries)
    @rule(pick=PICK)
    def requeue(self, pick: int) -> None:
        entry = list(self.model.entries.values())[pick % len(self.model.entries)]
        dead = entry.state == "dead"
        assert self.run(self.broker.requeue(entry.job.id)) is dead
        if dead:
            entry.spent = 0
            self.model.put_back(entry)

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "broker"):
            self.run(self.compare())

    async def compare(self) -> None:
        load = await self.broker.load()
        waiting = self.model.waiting()
        assert load.queued_jobs == len(waiting)
        assert load.queued_rows == sum(entry.job.cost_rows for entry in waiting)
        positions = {entry.job.id: position for position, entry in enumerate(waiting)}
        statuses = await asyncio.gather(*map(self.broker.status, self.model.entries))
        for (job_id, entry), status in zip(self.model.entries.items(), statuses, strict=True):
            assert status is not None, "lost"
            assert (status.state, status.position) == (entry.state, positions.get(job_id))
        for job_id, data in self.answered.items():
            result = await self.broker.result(job_id)
            assert result is not None
            assert result.images[0].data == data


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def test_random_histories(
    redis_url: str,
    runner: asyncio.Runner,
    make_job: Callable[..., Job],
    make_result: Callable[..., JobResult],
) -> None:
    parts = {
        "runner": runner,
        "url": redis_url,
        "make_job": staticmethod(make_job),
        "make_result": staticmethod(make_result),
    }
    run_state_machine_as_test(
        type("History", (QueueHistory,), parts),
        settings=settings(
            max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
