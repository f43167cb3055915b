"""Calls the senders of jobs back: every API process does so for all, whichever took the job.

A job that ends is due to be called back, by the script that ends it. A process leases it (`LEASE_S`), sends,
and settles: delivered at any 2xx; given up at 410, or once the next try would come after the images are gone;
else due again, later each time. A process that dies leaves its leases, and another takes them when they end.
So a callback is sent once, unless a process dies, or loses Redis, between sending and settling.

Messages are signed by the Standard Webhooks scheme (https://www.standardwebhooks.com): `webhook-id` is the
same in every try, `webhook-timestamp` is the time of Redis, and each secret signs.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog
from standardwebhooks import Webhook

from ditserve.service.addresses import Network, parsed_network
from ditserve.service.callback_url import AllowedCallbacks, CallbackUrl
from ditserve.service.callbacks.post import POST_S, PostError, post
from ditserve.service.errors import QueueUnavailable, ServiceError
from ditserve.service.jobs import CallbackState, DueCallback
from ditserve.service.queue.patience import until_answered
from ditserve.service.queue.queue_client import Queue
from ditserve.service.settings import Settings
from ditserve.service.telemetry import metrics
from ditserve.service.telemetry.faults import surviving

AT_ONCE = 32  # callbacks that one process sends
LEASE_S = 3 * POST_S
# Asked so often whether any is due: retries come due by themselves, and most jobs that end have none.
LOOK_S = 0.5
FIRST_DELAY_S, LONGEST_DELAY_S = 5.0, 600.0
GONE = 410

log = structlog.get_logger("service.callbacks")


@dataclass(frozen=True, slots=True)
class CallbackMessage:
    """A message to the sender of a job, and its address."""

    url: str
    body: str


# Writes the message about a job. Raises `ServiceError`: the job is gone, or Redis cannot be used.
Compose = Callable[[str], Awaitable[CallbackMessage]]


class Deliveries:
    """The callbacks of one model's jobs that this process makes."""

    def __init__(self, queue: Queue, compose: Compose, settings: Settings) -> None:
        self._queue, self._compose = queue, compose
        self._allowed = AllowedCallbacks.parse(settings.callback_allow)
        networks = settings.callback_networks
        self._networks: Sequence[Network] = [parsed_network(text) for text in networks.split(",") if text]
        secret = settings.callback_secret
        self._signers = [Webhook(text) for text in secret.get_secret_value().split(",")] if secret else []
        self._window_s = settings.result_ttl_s
        self._sending: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Deliver what comes due until cancelled; what is under way then ends first."""
        try:
            while True:
                await self._take_due()
                await asyncio.sleep(LOOK_S)
        finally:
            if self._sending:
                await asyncio.wait(self._sending, timeout=POST_S)
            for task in self._sending:
                task.cancel()

    async def _take_due(self) -> None:
        room = AT_ONCE - len(self._sending)
        try:
            due = await self._queue.due_callbacks(room, lease_s=LEASE_S) if room else []
        except QueueUnavailable:
            return
        for callback in due:
            task = asyncio.create_task(self._deliver(callback))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _deliver(self, due: DueCallback) -> None:
        with surviving("calling back", job=due.job_id):
            if due.number == 0:
                self._give_up(due, "the job's record is gone")
                return
            try:
                message = await self._compose(due.job_id)
                status = await self._send(message, due)
                fault = "" if 200 <= status < 300 else f"the answer was {status}"
                gone = status == GONE
            except PostError as error:
                fault, gone = str(error), False
            except QueueUnavailable:
                # The lease ends, and the callback is due again.
                return
            except (ServiceError, ValueError) as error:
                # The job is gone, or its address is allowed no longer.
                fault, gone = str(error), True
            await self._settle(due, fault, gone=gone)

    async def _send(self, message: CallbackMessage, due: DueCallback) -> int:
        url = CallbackUrl.parse(message.url)
        if not self._allowed.allow(url):
            raise ValueError("the address is no longer in --callback-allow")
        message_id = f"{due.job_id}-{round(due.ended_at * 1000)}"
        headers = self._signed(message_id, message.body)
        return await post(url, headers, message.body.encode(), networks=self._networks)

    def _signed(self, message_id: str, body: str) -> list[tuple[str, str]]:
        """Return the headers of a message, signed with every secret at the time of Redis."""
        now = datetime.fromtimestamp(int(self._queue.clock()), UTC)
        signatures = " ".join(signer.sign(message_id, now, body) for signer in self._signers)
        return [
            ("content-type", "application/json"),
            ("user-agent", "ditserve"),
            ("webhook-id", message_id),
            ("webhook-timestamp", str(int(now.timestamp()))),
            ("webhook-signature", signatures),
        ]

    async def _settle(self, due: DueCallback, fault: str, *, gone: bool) -> None:
        """Note how a callback went. A Redis that is away is waited for: else it would be sent again."""
        state: CallbackState = "pending"
        delay_s = delay_before(due.number) * random.uniform(0.75, 1.25)
        if not fault:
            state = "delivered"
            metrics.CALLBACKS.labels("delivered").inc()
        elif gone or self._queue.clock() + delay_s > due.ended_at + self._window_s:
            state = "given-up"
            self._give_up(due, fault)
        else:
            metrics.CALLBACKS.labels("failed").inc()
            log.info("callback failed", job=due.job_id, attempt=due.number, reason=fault)
        await until_answered(lambda: self._queue.settle_callback(due, state, delay_s=delay_s, fault=fault))

    def _give_up(self, due: DueCallback, fault: str) -> None:
        metrics.CALLBACKS.labels("given-up").inc()
        log.warning("callback given up", job=due.job_id, attempts=due.number, reason=fault)


def delay_before(number: int) -> float:
    """Return the seconds after which a callback is tried again that has failed `number` times.

    Example: after 5 s, 10 s, 20 s, 40 s, …, and then every 600 s: 12 tries in the first hour.
    """
    return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(number - 1, 30))
