"""The API's part of the queue, and how it is opened: the seam at which tests put something smaller."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from ditserve.service.errors import QueueUnavailable
from ditserve.service.fleet import LoadSnapshot
from ditserve.service.jobs import CallbackState, DueCallback, EqualJobs, Job, JobEvent, JobResult, JobStatus
from ditserve.service.queue.broker import Broker
from ditserve.service.queue.listener import Listener
from ditserve.service.queue.patience import until_answered
from ditserve.service.queue.quota import Allowance, Quota
from ditserve.service.settings import Settings


class Queue(Protocol):
    """The part of the broker that the API uses. Every verb may raise `QueueUnavailable`.

    `clock` gives the time by which jobs are created and due.
    """

    @property
    def clock(self) -> Callable[[], float]: ...
    async def submit(
        self, job: Job, *, at_once: int | None = None, equal: EqualJobs | None = None
    ) -> bool: ...
    def accepted(self, job_id: str) -> bool: ...
    async def equal_job(self, digest: str) -> str: ...
    async def join(self, job_id: str, holder: str) -> bool: ...
    async def cancel(self, job_id: str, *, holder: str = "") -> bool: ...
    async def status(self, job_id: str) -> JobStatus | None: ...
    async def result(self, job_id: str) -> JobResult | None: ...
    def events(self, job_id: str, after: str = "0-0") -> AsyncIterator[JobEvent]: ...
    async def last_event_id(self, job_id: str) -> str | None: ...
    async def load(self) -> LoadSnapshot: ...
    async def ping(self) -> bool: ...
    async def check_eviction(self) -> None: ...
    async def due_callbacks(self, most: int, *, lease_s: float) -> list[DueCallback]: ...
    async def settle_callback(
        self, due: DueCallback, state: CallbackState, *, delay_s: float = 0.0, fault: str = ""
    ) -> bool: ...


class Waiter(Protocol):
    async def wait(self, job_id: str, *, new: bool = False) -> JobResult: ...


class Meter(Protocol):
    async def take(self, name: str, per_minute: int) -> Allowance: ...
    async def give_back(self, name: str, per_minute: int) -> None: ...


@dataclass(frozen=True, slots=True)
class QueueClient:
    """The queue, the one listener of this process, and the counter of the requests of each API key."""

    queue: Queue
    listener: Waiter
    quota: Meter


@asynccontextmanager
async def open_queue_client(settings: Settings) -> AsyncIterator[QueueClient]:
    """Connect to the Redis of the settings, until the block ends.

    While Redis cannot be used, every verb raises `QueueUnavailable`, from the start on if need be.

    Raises `ValueError` where the URL is missing or malformed.
    """
    if settings.redis_url is None:
        raise ValueError("REDIS_URL is not set: name the Redis that the API and its workers share")
    url = settings.redis_url.get_secret_value()
    broker = Broker.open(
        url,
        namespace=settings.namespace,
        queue_limit=settings.queue_limit,
        result_ttl_s=settings.result_ttl_s,
        lease_s=settings.lease_s,
        max_attempts=settings.max_attempts,
    )
    starting = None
    try:
        await broker.start()
    except QueueUnavailable:
        starting = asyncio.create_task(until_answered(broker.start))
    listener = Listener(broker)
    quota = Quota(url, namespace=settings.namespace)
    try:
        yield QueueClient(broker, listener, quota)
    finally:
        if starting is not None:
            starting.cancel()
            await asyncio.wait([starting])
        await quota.aclose()
        await listener.aclose()
        await broker.aclose()
