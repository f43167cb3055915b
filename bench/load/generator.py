"""The open-loop load generator: every request leaves at its own time, whatever became of the others."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx

from ditserve.bench import report
from ditserve.bench.load.adapters import Adapter, DrawnWith
from ditserve.bench.load.processes import Consumption, batch_counters
from ditserve.bench.load.summary import Exchange, Promise, RungQualities
from ditserve.bench.load.workload import OfferedRequest, RequestKind, Workload
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.manifest import Manifest, RungSpec

ANSWER_TIMEOUT_S = 600.0
LEAD_S = 0.2  # from the call of `offer` to time zero of the schedule
PROBES = 5  # timed requests of each kind on an idle server

Send = Callable[[OfferedRequest], Awaitable[tuple[int, DrawnWith | None]]]


class ServerUnreachable(ModelError):
    """Raised when there is no server, or it refuses plain requests; the message is one sentence."""


def connect(url: str) -> httpx.AsyncClient:
    """Return a client without a limit on connections: its own queue would hide that of the server."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(base_url=url, timeout=ANSWER_TIMEOUT_S, trust_env=False, limits=limits)


def sender(http: httpx.AsyncClient, adapter: Adapter, promise: Promise | None) -> Send:
    """Return a function that asks for one image and returns the status and the operating point.

    The status is 0 when the connection broke. Without a `promise` requests have no deadline.
    """

    async def send(request: OfferedRequest) -> tuple[int, DrawnWith | None]:
        body = adapter.body(request, promise.within(request.kind) if promise else None)
        try:
            answer = await http.post(adapter.path, json=body, headers=dict(adapter.headers))
        except httpx.TransportError:
            return 0, None
        return answer.status_code, adapter.read(request, answer.headers) if answer.is_success else None

    return send


async def offer(
    requests: Sequence[OfferedRequest],
    send: Send,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> list[Exchange]:
    """Send every request at its time on one absolute schedule; return the exchanges in order."""
    zero = clock() + LEAD_S

    async def exchange(request: OfferedRequest) -> Exchange:
        sent = clock() - zero
        status, drawn_with = await send(request)
        return Exchange(request, sent, clock() - zero, status, drawn_with)

    running = []
    for request in requests:
        if (left := zero + request.at - clock()) > 0:
            await sleep(left)
        running.append(asyncio.create_task(exchange(request)))
    return list(await asyncio.gather(*running))


async def offer_and_measure(
    http: httpx.AsyncClient,
    adapter: Adapter,
    requests: Sequence[OfferedRequest],
    promise: Promise,
    *,
    pid: int | None,
) -> tuple[list[Exchange], dict[str, float | None]]:
    """Offer the requests; return the exchanges and what they cost the server.

    The costs are processor seconds an image and memory at the end, of process `pid` and its descendants; and
    rows a forward pass, where the server counts them.
    """
    rows, passes = await _counters(http, adapter)
    before = Consumption.of(pid) if pid else None
    exchanges = await offer(requests, sender(http, adapter, promise))
    images = max(1, sum(exchange.drawn_with is not None for exchange in exchanges))
    costs: dict[str, float | None] = {
        "processor_s_per_image": None,
        "resident_mib": None,
        "rows_per_pass": None,
    }
    if pid and before:
        after = Consumption.of(pid)
        costs["processor_s_per_image"] = (after.processor_s - before.processor_s) / images
        costs["resident_mib"] = after.resident_mib
    rows_after, passes_after = await _counters(http, adapter)
    if passes_after > passes:
        costs["rows_per_pass"] = (rows_after - rows) / (passes_after - passes)
    return exchanges, costs


async def _counters(http: httpx.AsyncClient, adapter: Adapter) -> tuple[float, float]:
    if adapter.counters is None:
        return 0.0, 0.0
    return batch_counters((await http.get(adapter.counters)).text)


async def unloaded(workload: Workload, send: Send, probes: int = PROBES) -> dict[RequestKind, float]:
    """Return the seconds of each kind of request on an idle server.

    That is the median of `probes`, after one uncounted request.

    Raises:
        ServerUnreachable: the idle server did not answer a request.
    """
    medians: dict[RequestKind, float] = {}
    for kind in workload.kinds:
        times = []
        for k in range(probes + 1):
            began = time.perf_counter()
            status, _ = await send(OfferedRequest(0.0, kind, k % workload.classes, k))
            times.append(time.perf_counter() - began)
            if not 200 <= status < 300:
                reason = f"answered {status}" if status else "does not answer"
                raise ServerUnreachable(f"the server {reason}: is it up, and is --adapter the right one?")
        medians[kind] = sorted(times[1:])[probes // 2]
    return medians


def rung_qualities(manifest: Manifest, ladder: str) -> RungQualities:
    """Return the qualities of a bundle's rungs, and of all that `bench.ladder` measured as `ladder`."""
    file = report.RESULTS / f"ladder-{ladder}.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    rungs = [RungSpec.model_validate(fields) for fields in record.get("measured", ())]
    # Where two points have one name, that of the default grid counts, and before it that of the ladder.
    rungs.sort(key=lambda rung: rung.grid == manifest.defaults.grid)
    rungs += manifest.ladder
    distance = {rung.name: rung.quality if rung.own is None else rung.own for rung in rungs}
    real = {rung.name: rung.real for rung in rungs if rung.real is not None}
    return RungQualities(distance, record.get("frechet", {}), real, record.get("grain", {}))
