"""Offer requests to an HTTP server on a schedule that does not wait for it, and tell what became of them.

    python -m bench.load http://127.0.0.1:8000 --rate 3 [--requests 480] [--process poisson|bursts|flash|at-once] [--seed 1]
                         [--adapter service|service-undegraded|service-undated|peer|bentoml|ray] [--slo 3] [--bundle model/zoo/emoji] [--pid PID]

Open loop: every request has its time, drawn before the start, and is sent then, whatever has become of the others. 70 % ask for 20
steps and 30 % for 50, 70 % are guided, classes follow Zipf's law (`--steps`, `--guided`). The promise is `--slo` times what each kind
of request takes alone, measured first. The first `--warm-up` requests do not count. A run whose own requests left late, by more than
`--max-lag-ms` at the 99th percentile, says nothing of the server: it is void, and the status is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from ditserve.bench.adapters import ADAPTERS, Adapter, Told
from ditserve.bench.answers import Exchange, Promise, Summary
from ditserve.bench.arrivals import PROCESSES
from ditserve.bench.consumption import Consumption, passes
from ditserve.bench.plots import RESULTS
from ditserve.bench.record import Neighbours, machine
from ditserve.bench.workload import STEPS, Asked, Kind, Workload
from ditserve.model.spec.bundle import Bundle, BundleError, Manifest, write_atomic
from ditserve.model.spec.errors import ModelError

LAG_MS = 5.0
ANSWER_S = 600.0  # nobody waits longer
LEAD_S = 0.2  # from drawing the schedule to its time zero
PROBES = 5  # requests of each kind that are timed alone

Send = Callable[[Asked], Awaitable[tuple[int, Told | None]]]


class Unreachable(ModelError):
    """There is no server, or it refuses plain requests; the message is one sentence."""


def sender(http: httpx.AsyncClient, adapter: Adapter, promise: Promise | None) -> Send:
    """Asks for one image: status and what the answer told; status 0 when the connection broke."""

    async def send(asked: Asked) -> tuple[int, Told | None]:
        body = adapter.body(asked, promise.within(asked.kind) if promise else None)
        try:
            answer = await http.post(adapter.path, json=body, headers=dict(adapter.headers))
        except httpx.TransportError:
            return 0, None
        return answer.status_code, adapter.told(asked, answer.headers) if answer.is_success else None

    return send


async def offer(
    asked: Sequence[Asked],
    send: Send,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> list[Exchange]:
    """Send every request at its time on one absolute schedule; what became of them, in the order they were asked."""
    zero = clock() + LEAD_S

    async def one(each: Asked) -> Exchange:
        sent = clock() - zero
        status, told = await send(each)
        return Exchange(each, sent, clock() - zero, status, told)

    running = []
    for each in asked:
        if (left := zero + each.at - clock()) > 0:
            await sleep(left)
        running.append(asyncio.create_task(one(each)))
    return list(await asyncio.gather(*running))


async def watched(
    http: httpx.AsyncClient, adapter: Adapter, asked: Sequence[Asked], promise: Promise, *, pid: int | None
) -> tuple[list[Exchange], dict[str, float | None]]:
    """`offer`, and what it cost the server's process `pid` and all that it started: processor seconds an image, memory at the end; and
    rows a forward pass, where the server counts them."""
    rows, before = await _passes(http, adapter), pid and Consumption.of(pid)
    exchanges = await offer(asked, sender(http, adapter, promise))
    images = max(1, sum(each.told is not None for each in exchanges))
    used: dict[str, float | None] = {
        "processor_s_per_image": None,
        "resident_mib": None,
        "rows_per_pass": None,
    }
    if pid and before:
        after = Consumption.of(pid)
        used["processor_s_per_image"] = (after.processor_s - before.processor_s) / images
        used["resident_mib"] = after.resident_mib
    done = await _passes(http, adapter)
    if done[1] > rows[1]:
        used["rows_per_pass"] = (done[0] - rows[0]) / (done[1] - rows[1])
    return exchanges, used


async def _passes(http: httpx.AsyncClient, adapter: Adapter) -> tuple[float, float]:
    return (0.0, 0.0) if adapter.counters is None else passes((await http.get(adapter.counters)).text)


async def unloaded(workload: Workload, send: Send, probes: int = PROBES) -> dict[Kind, float]:
    """Seconds that each kind of request takes alone: the median of `probes`, after one that does not count.

    Raises:
        Unreachable: a request of an idle server was not answered.
    """
    found: dict[Kind, float] = {}
    for kind in workload.kinds:
        times = []
        for k in range(probes + 1):
            began = time.perf_counter()
            status, _ = await send(Asked(0.0, kind, k % workload.classes, k))
            times.append(time.perf_counter() - began)
            if not 200 <= status < 300:
                reason = f"answered {status}" if status else "does not answer"
                raise Unreachable(f"the server {reason}: is it up, and is --adapter the right one?")
        found[kind] = sorted(times[1:])[probes // 2]
    return found


def connect(url: str) -> httpx.AsyncClient:
    """As many connections as there are requests: a client that queues would hide the server's queue."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(base_url=url, timeout=ANSWER_S, trust_env=False, limits=limits)


def qualities(manifest: Manifest, ladder: str) -> tuple[dict[str, float], dict[str, float]]:
    """By rung of the bundle: the measured distance to its reference, and the Fréchet distance where `bench.ladder` found one for the
    ladder of that name."""
    found: dict[str, float] = {}
    file = RESULTS / f"ladder-{ladder}.json"
    if file.is_file():
        found = json.loads(file.read_text())["frechet"]
    return {rung.name: rung.quality for rung in manifest.ladder}, found


async def run(options: argparse.Namespace, manifest: Manifest) -> dict[str, Any]:
    adapter = ADAPTERS[options.adapter]
    mix = tuple((steps, share) for steps, share in options.steps)
    workload = Workload(len(manifest.factors[0].classes), options.process, mix, options.guided, options.zipf)
    neighbours = Neighbours()
    async with connect(options.url) as http:
        promise = Promise(await unloaded(workload, sender(http, adapter, None)), options.slo)
        asked = workload.draw(options.requests + options.warm_up, options.rate, options.seed)
        exchanges, used = await watched(http, adapter, asked, promise, pid=options.pid)
    distance, frechet = qualities(manifest, manifest.name)
    summary = Summary.of([exchanges[options.warm_up :]], promise, distance=distance, frechet=frechet)
    return {
        "machine": machine(),
        "neighbours": neighbours.told(),
        "promise_s": {
            f"{k.steps} {'guided' if k.guided else 'unguided'}": promise.within(k) for k in workload.kinds
        },
        "void": 1000 * summary.lag_p99 > options.max_lag_ms,
        **asdict(summary),
        **used,
    }


def table(result: dict[str, Any]) -> Table:
    shown = Table(show_header=False)
    for name, value in result.items():
        if name not in ("machine", "neighbours"):
            shown.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    return shown


def share(text: str) -> tuple[int, float]:
    """`20:0.7`."""
    steps, _, part = text.partition(":")
    return int(steps), float(part or 1.0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--rate", type=float, required=True, help="requests a second, on average")
    parser.add_argument("--requests", type=int, default=480, help="that count; at least 459 for a p99")
    parser.add_argument("--warm-up", type=int, default=20, help="requests before them that do not count")
    parser.add_argument("--process", choices=list(PROCESSES), default="poisson")
    parser.add_argument("--steps", type=share, nargs="+", default=STEPS, metavar="STEPS:SHARE")
    parser.add_argument("--guided", type=float, default=0.7, help="share of guided requests")
    parser.add_argument("--zipf", type=float, default=1.0, help="how uneven the classes are")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--adapter", choices=list(ADAPTERS), default="service")
    parser.add_argument("--slo", type=float, default=3.0, help="promised latency, in unloaded ones")
    parser.add_argument("--bundle", type=Path, default=Path("model/zoo/emoji"), help="what is served")
    parser.add_argument("--pid", type=int, help="the server's process, to tell its processor time and memory")
    parser.add_argument("--max-lag-ms", type=float, default=LAG_MS)
    parser.add_argument("--out", type=Path, help="file for the result, as JSON")
    options = parser.parse_args(arguments)
    try:
        result = asyncio.run(run(options, Bundle.open(options.bundle, verify=False).manifest))
    except (BundleError, Unreachable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console().print(table(result))
    if options.out:
        told = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        write_atomic(options.out, (json.dumps({"options": told, **result}, indent=1) + "\n").encode())
    if result["void"]:
        print("void: requests left late, so this says nothing of the server", file=sys.stderr)
    return int(result["void"])


if __name__ == "__main__":
    sys.exit(main())
