"""Reads of what the scripts wrote about a job: status, result, outcome, events, dead letters.

Nothing here writes, so every read may be repeated. None is a transaction: Redis refuses those when its memory
is full. A key of another kind than this service writes is read as if it were not there.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar, cast, get_args

import structlog

from ditserve.service.errors import (
    InternalError,
    JobExpired,
    JobLost,
    QueueUnavailable,
    ServiceError,
    from_wire,
    to_wire,
)
from ditserve.service.jobs import (
    TERMINAL_STATES,
    CallbackState,
    CallbackStatus,
    EventKind,
    Job,
    JobEvent,
    JobResult,
    JobStatus,
    State,
)
from ditserve.service.queue.clock import FIRST_READINGS, READ_EVERY_S, QueueClock
from ditserve.service.queue.connection import ask, commands, of_another_kind, open_client, patiently
from ditserve.service.queue.keys import Keys
from ditserve.service.telemetry import metrics
from ditserve.service.telemetry.faults import kept_running
from ditserve.service.wire import OtherVersion, WireError, read_number, unpack

BLOCK_MS = 3000  # a read of events waits so long for the next one, and then looks whether the job is there
GRACE_S = 5.0  # for the answer of a read of events, beyond the time it may wait
EVENTS_AT_ONCE = 64
EVENT_DEPTH = 32  # of lists and maps in each other
OTHER_RELEASE_S = 5.0  # after which an upgrade may have gone on
EVENT_KINDS: frozenset[str] = frozenset(get_args(EventKind))
STATES: frozenset[str] = frozenset(get_args(State))
CALLBACK_STATES: frozenset[str] = frozenset(get_args(CallbackState))

log = structlog.get_logger()

T = TypeVar("T")

_FIELDS = ("wire", "state", "attempt", "step", "steps", "error", "owner")
_LATER_FIELDS = ("withdrawn", "callback", "called", "callback_fault")


class Reads:
    """The half of the broker that reads. Every verb raises `QueueUnavailable` when Redis cannot be used.

    It has two clients: one for commands that are answered at once, and one for those that wait, each of which
    keeps a connection for as long as it waits. `clock` is that of the queue, once `start_clock` was called.
    """

    # Whoever waits for a job waits so long for a Redis that cannot be used.
    outage_s = 30.0

    def __init__(self, url: str, keys: Keys, *, timeout_s: float) -> None:
        self.keys, self.clock = keys, QueueClock()
        self._following: asyncio.Task[None] | None = None
        self._timeout_s = timeout_s
        self._client = open_client(url, connections=32)
        self._waiting_client = open_client(url, connections=4096)

    async def aclose(self) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following])
        await self._client.aclose()
        await self._waiting_client.aclose()

    async def start_clock(self) -> None:
        """Read Redis' clock a few times, of which the surest counts, and follow it from then on."""
        for _ in range(FIRST_READINGS):
            await self._read_clock()
        self._following = asyncio.create_task(kept_running("following the clock", self._follow_clock))

    async def _read_clock(self) -> None:
        await self._ask(lambda: self.clock.read(self._client.time))

    async def _follow_clock(self) -> None:
        """Read the clock again and again: it may be set, and Redis may become another server."""
        while True:
            await asyncio.sleep(READ_EVERY_S)
            with suppress(QueueUnavailable):
                await self._read_clock()

    async def status(self, job_id: str) -> JobStatus | None:
        """Return the job's status; None if the job is unknown or its record has expired.

        Raises:
            QueueUnavailable: the job is of a release that writes another schema version.
            InternalError: the job cannot be read at all.
        """

        position, fields = await self._ask_together(
            ("ZRANK", self.keys.queue, job_id),
            ("HMGET", self.keys.job(job_id), *_FIELDS, *_LATER_FIELDS),
        )
        values: Sequence[Any] = fields or (None,) * len(_FIELDS + _LATER_FIELDS)
        wire, state, attempt, step, steps, error, owner, withdrawn, *callback = values
        if None in (wire, state, attempt, step):
            return None
        try:
            job = Job.from_bytes(wire)
            numbers = [read_number(text) for text in (attempt, step, steps or b"%d" % job.steps)]
            if (name := state.decode(errors="replace")) not in STATES:
                raise OtherVersion(f"no state of a job is {name!r:.60}")
        except WireError as fault:
            raise _unreadable("job", fault) from fault
        return JobStatus(
            id=job_id,
            state="cancelled" if withdrawn else cast(State, name),
            position=position if state == b"queued" and not withdrawn else None,
            attempt=numbers[0],
            step=numbers[1],
            steps=numbers[2],
            created_at=job.created_at,
            error=None if error is None else _read_error(error, owner),
            job=job,
            callback=_read_callback(*callback),
        )

    async def equal_job(self, digest: str) -> str:
        """Return the job last queued for the pictures of this digest; "" if there is none, or no longer."""
        job_id = await self._read(lambda: self._client.get(self.keys.equal(digest)))
        return "" if job_id is None else job_id.decode(errors="replace")

    async def result(self, job_id: str) -> JobResult | None:
        """Return the job's result; None if there is none, or no longer. Raise what `status` raises."""
        data = await self._read(lambda: self._client.get(self.keys.result(job_id)))
        try:
            return None if data is None else JobResult.from_bytes(data)
        except WireError as fault:
            raise _unreadable("result", fault) from fault

    async def outcome(self, job_id: str) -> JobResult | None:
        """Return the job's result, or None while it has not ended.

        Raises:
            ServiceError: the job's own error, `JobLost` or `JobExpired`.
        """
        (outcome,) = await self.outcomes([job_id])
        if isinstance(outcome, ServiceError):
            raise outcome
        return outcome

    async def outcomes(self, job_ids: Sequence[str]) -> list[JobResult | ServiceError | None]:
        """Return what `outcome` returns or raises for each of several jobs, in one exchange with Redis."""

        # A script writes a job's result together with its state, so the state, which is read first, is never
        # ahead of the result.
        reads: list[Sequence[str]] = []
        for job_id in job_ids:
            reads.append(("HMGET", self.keys.job(job_id), "state", "error", "owner"))
            reads.append(("GET", self.keys.result(job_id)))
        replies = await self._ask_together(*reads)
        return [
            _read_outcome(job_id, data, *(fields or (None,) * 3))
            for job_id, fields, data in zip(job_ids, replies[::2], replies[1::2], strict=True)
        ]

    async def dead(self) -> list[JobStatus]:
        """Return the dead-lettered jobs, oldest first; those that cannot be read are logged and left out."""
        ids = await self._read(lambda: self._client.zrange(self.keys.dead, 0, -1))
        names = [job_id.decode(errors="replace") for job_id in ids or ()]
        statuses = await asyncio.gather(*map(self._readable_status, names))
        return [status for status in statuses if status is not None and status.state == "dead"]

    async def _readable_status(self, job_id: str) -> JobStatus | None:
        try:
            return await self.status(job_id)
        except ServiceError as error:
            if not isinstance(error.__cause__, WireError):
                raise
            log.warning("dead job left out", job=job_id, reason=error.detail)
            return None

    async def events(self, job_id: str, after: str = "0-0") -> AsyncIterator[JobEvent]:
        """Yield the job's events after the given id as they come.

        The last one is a terminal event, unless that was read before: then none is left to read of a job that
        has ended. An event that cannot be read is left out, and logged once for each reader.

        Waits through outages of Redis of up to `outage_s` seconds.

        Raises:
            JobLost: the queue has no record of the job.
        """
        block, ended, complained = None, False, False
        while True:
            events = await patiently(partial(self._read_events, job_id, after, block), outage_s=self.outage_s)
            for event_id, event in events:
                after = event_id
                if isinstance(event, WireError):
                    metrics.UNREADABLE.labels("event").inc()
                    if not complained:
                        log.warning("event left out", job=job_id, reason=str(event))
                    complained = True
                    continue
                yield event
                if event.terminal:
                    return
            if not events:
                if ended:
                    return
                ended = await patiently(partial(self._has_ended, job_id), outage_s=self.outage_s)
            # Once the job has ended, one read without waiting gets what was written in between.
            block = None if events or ended else BLOCK_MS

    async def last_event_id(self, job_id: str) -> str | None:
        """Return the id of the job's last event; None if there is no stream, or no longer."""
        stream = self.keys.events(job_id)
        entries = await self._read(lambda: self._client.xrevrange(stream, count=1))
        return entries[0][0].decode() if entries else None

    async def _read_events(
        self, job_id: str, after: str, block: int | None
    ) -> list[tuple[str, JobEvent | WireError]]:
        stream = self.keys.events(job_id)
        client = self._waiting_client
        try:
            reply: Any = await ask(
                client,
                lambda: client.xread({stream: after}, count=EVENTS_AT_ONCE, block=block),
                timeout_s=GRACE_S + BLOCK_MS / 1000,
            )
        except QueueUnavailable as error:
            if not of_another_kind(error.__cause__):
                raise
            # The next event will make it a stream again.
            await asyncio.sleep((block or 0) / 1000)
            return []
        return [_read_event(entry_id, fields) for entry_id, fields in _entries(reply)]

    async def _has_ended(self, job_id: str) -> bool:
        state = await self._read(lambda: self._client.hget(self.keys.job(job_id), "state"))
        if state is None:
            raise JobLost()
        return state.decode(errors="replace") in TERMINAL_STATES

    def _ask(self, call: Callable[[], Awaitable[T]]) -> Awaitable[T]:
        return ask(self._client, call, timeout_s=self._timeout_s)

    async def _read(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Return the answer to a read of one key, None if that is of another kind."""
        try:
            return await self._ask(call)
        except QueueUnavailable as error:
            if of_another_kind(error.__cause__):
                return None
            raise

    def _ask_together(self, *reads: Sequence[str]) -> Awaitable[list[Any]]:
        """Return the answers to several reads, in one exchange with Redis.

        The answer about a key of another kind is None.
        """

        async def call() -> list[Any]:
            replies = await commands(self._client, *reads)
            replies = [None if of_another_kind(reply) else reply for reply in replies]
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
            return replies

        return self._ask(call)


def _entries(reply: Any) -> list[tuple[bytes, Mapping[bytes, bytes]]]:
    """Return the entries of the one stream that was read. The reply is a map in RESP3 and a list in RESP2."""
    if not reply:
        return []
    entries: list[tuple[bytes, Mapping[bytes, bytes]]]
    entries = next(iter(reply.values()))[0] if isinstance(reply, dict) else reply[0][1]
    return entries


def _read_event(entry_id: bytes, fields: Mapping[bytes, bytes]) -> tuple[str, JobEvent | WireError]:
    """Return the id of an entry, and its event or the reason why that cannot be read."""
    event_id, kind = entry_id.decode(), fields.get(b"kind", b"").decode(errors="replace")
    try:
        if kind not in EVENT_KINDS:
            raise WireError(f"no kind of event is {kind!r:.60}")
        data = unpack(fields.get(b"data", b""))
        if not (_nests_at_most(EVENT_DEPTH, data) and _is_json(data)):
            raise WireError("an event that JSON cannot hold")
        if kind == "preview" and not isinstance(data.get("image"), bytes):
            raise WireError("a preview without an image")
        return event_id, JobEvent(event_id, cast(EventKind, kind), data)
    except WireError as fault:
        return event_id, fault


def _nests_at_most(levels: int, value: Any) -> bool:
    """Return whether lists and maps lie at most this deep in each other.

    How deep `json` can go depends on the recursion limit, which any library of a process may have raised.
    """
    if not isinstance(value, list | dict):
        return True
    inside = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_nests_at_most(levels - 1, one) for one in inside)


def _is_json(data: Mapping[str, Any]) -> bool:
    """Return whether JSON can hold an event, but for values that are left out, such as an image."""
    try:
        json.dumps(data, allow_nan=False, skipkeys=True, default=lambda value: None)
    except ValueError:
        return False
    return True


def _read_outcome(
    job_id: str, data: bytes | None, state: bytes | None, error: bytes | None, owner: bytes | None
) -> JobResult | ServiceError | None:
    try:
        if data is not None:
            return JobResult.from_bytes(data)
        if state in (b"failed", b"dead", b"cancelled"):
            return from_wire(_read_error(error or b"", owner))
    except WireError as fault:
        return _unreadable("result", fault)
    if state is None:
        return JobLost()
    if state == b"done":
        return JobExpired(f"The images of job {job_id} are no longer kept.")
    return None


def _read_callback(state: bytes | None, called: bytes | None, fault: bytes | None) -> CallbackStatus | None:
    name = (state or b"").decode(errors="replace")
    if name not in CALLBACK_STATES:
        return None
    attempts = int(called) if called and called.isdigit() else 0
    return CallbackStatus(cast(CallbackState, name), attempts, (fault or b"").decode(errors="replace"))


def _read_error(data: bytes, owner: bytes | None) -> dict[str, Any]:
    """Return the error of a job, with the worker that ran it last."""
    try:
        error = from_wire(unpack(data))
    except WireError as fault:
        error = _unreadable("error", fault)
    if owner is not None:
        error.extra["worker"] = owner.decode(errors="replace")
    return to_wire(error)


def _unreadable(message: str, fault: WireError) -> ServiceError:
    """Return the error for what was written about a job and cannot be read here; count it."""
    metrics.UNREADABLE.labels(message).inc()
    if isinstance(fault, OtherVersion):
        return QueueUnavailable(
            "The job is of another release of the service; ask again once all of it is upgraded.",
            retry_after=OTHER_RELEASE_S,
        )
    return InternalError(f"The queue's record of the job cannot be read: {fault}.")
