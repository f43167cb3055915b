"""Does anything grow out of bounds? The queue with what waits in it, admission with the workers, planning with the fleet.

    python -m bench.growth [--depths 1 10 100 1000 10000] [--workers 1 4 16 64] [--calls 40]

The queue is a real Valkey, and the time of a verb is what one caller waits for it, client and script together: medians over so many
calls, with the jobs spread over callers; beside that the worst case, a job that is due before all others of its one caller. Admission
is held against as many published worker states. The fleets are simulated (`bench.simulate`): a crowd above capacity with deadlines far
away. Writes bench/results/growth.{json,png}.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ditserve.bench.arrivals import Traffic
from ditserve.bench.curves import CURVES, LADDERS
from ditserve.bench.fleet import Fleet, Site
from ditserve.bench.plots import RESULTS, draw_lines
from ditserve.bench.record import Neighbours, save
from ditserve.bench.simulate import ARMS, PATIENT
from ditserve.service.jobs import (
    ConditionTerm,
    DemandBucket,
    Image,
    Job,
    JobResult,
    LoadSnapshot,
    WorkerState,
)
from ditserve.service.launch.valkey import start_valkey
from ditserve.service.planning.admission import AdmissionRequest, admit
from ditserve.service.queue.broker import Broker

CALLERS = 16
# (workers, requests, how they come): thousands of them wait
FLEETS = (
    (1, 1_000, "flash"),
    (4, 2_000, "flash"),
    (16, 5_000, "flash"),
    (64, 10_000, "flash"),
    (64, 10_000, "at-once"),
)
HORIZONS = 12  # deadlines that a busy worker tells apart
IMAGE = bytes(8192)


@dataclass(frozen=True, slots=True)
class Measured:
    """Median microseconds of an event at one size of what it looks at."""

    event: str
    size: int
    microseconds: float


@dataclass(frozen=True, slots=True)
class Crowd:
    """A simulated fleet: microseconds a planning event, the longest queue, and what became of the requests."""

    workers: int
    requests: int
    process: str
    queue_peak: int
    plan_us: float
    plan_p99_us: float
    attainment: float


def job(k: int, *, callers: int, due_s: float) -> Job:
    now = time.time()
    return Job(
        id=uuid.uuid4().hex,
        model="growth",
        condition=(ConditionTerm((0,)),),
        mix="linear",
        seeds=(k,),
        steps=20,
        solver="ddim",
        grid="trailing",
        guidance_scale=1.0,
        guidance_interval=(0.0, 1.0),
        format="png",
        previews=0,
        caller=f"caller-{k % callers}",
        priority="normal",
        created_at=now,
        deadline_at=now + due_s,
        allow_degraded=True,
        min_steps=1,
        rung=None,
        reason=None,
        cost_rows=20,
    )


def result(worker: str) -> JobResult:
    return JobResult(
        images=(Image(IMAGE, 0, "image/png"),),
        steps_requested=20,
        steps_used=20,
        solver="ddim",
        rung="ddim-20",
        degraded=False,
        reason=None,
        timings_ms={},
        attempt=1,
        worker=worker,
    )


def state(k: int, now: float) -> WorkerState:
    """Of a busy worker."""
    return WorkerState(
        worker=f"worker-{k}",
        models=("growth",),
        max_rows=16,
        step_fixed_s=0.01,
        step_per_row_s=0.02,
        decode_s=0.001,
        running_samples=64,
        backlog_rows=1000,
        last_step_age_s=0.0,
        updated_at=now,
        dues=tuple(DemandBucket(now + 2.0**h, 80, 80) for h in range(HORIZONS)),
    )


async def timed(call: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await call()
    return 1e6 * (time.perf_counter() - began)


async def queue_events(broker: Broker, depth: int, calls: int) -> list[Measured]:
    """Every verb of a job's life while `depth` others wait."""
    for k in range(depth):
        await broker.submit(job(k, callers=CALLERS, due_s=1e5 + k))
    spent: dict[str, list[float]] = {}

    async def note(event: str, call: Callable[[], Awaitable[object]]) -> None:
        spent.setdefault(event, []).append(await timed(call))

    for k in range(calls):
        one = job(k, callers=CALLERS, due_s=2e5)
        await note("submit", lambda one=one: broker.submit(one))  # type: ignore[misc]
        await note("load", broker.load)
        claims = []

        async def claim() -> None:
            claims.extend(await broker.claim("growth", models=["growth"], max_samples=1))  # noqa: B023

        await note("claim", claim)
        lease = claims[0].lease
        await note("progress", lambda lease=lease: broker.progress(lease, "step", {"step": 1}))  # type: ignore[misc]
        await note("renew", lambda lease=lease: broker.renew([lease]))  # type: ignore[misc]
        await note("finish", lambda lease=lease: broker.finish(lease, result("growth")))  # type: ignore[misc]
    return [Measured(event, depth, float(np.median(each))) for event, each in spent.items()]


async def overtaking(broker: Broker, depth: int, calls: int) -> Measured:
    """Submitting the most urgent job of a caller who has `depth` others waiting."""
    for k in range(depth):
        await broker.submit(job(k, callers=1, due_s=1e5 + k))
    urgent = [job(0, callers=1, due_s=1e4 - k) for k in range(calls)]
    spent = [await timed(lambda one=one: broker.submit(one)) for one in urgent]  # type: ignore[misc]
    return Measured("submit before all of one caller", depth, float(np.median(spent)))


async def queue(depths: Sequence[int], calls: int) -> list[Measured]:
    found: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="dit-") as folder:
        valkey, url = await start_valkey(Path(folder))
        try:
            for depth in depths:
                for study in (queue_events, overtaking):
                    name = f"{study.__name__}-{depth}"
                    broker = await Broker.connect(url, namespace=name, queue_limit=10**6, queue_rows=10**9)
                    try:
                        measured = await study(broker, depth, calls)
                    finally:
                        await broker.aclose()
                    found += measured if isinstance(measured, list) else [measured]
        finally:
            await valkey.stop(5.0)
    return found


def admission(workers: int, calls: int) -> Measured:
    """Deciding about a admission_request with a deadline, beside so many busy workers."""
    now = time.time()
    ladder = LADDERS["ddim"]
    load = LoadSnapshot(10_000, 200_000, 1.0, tuple(state(k, now) for k in range(workers)), now)
    admission_request = AdmissionRequest(ladder.rungs[0], 1.0, 1, now + 60.0, True, 1)
    spent = []
    for _ in range(calls):
        began = time.perf_counter()
        admit(admission_request, load, ladder=ladder, now=now)
        spent.append(1e6 * (time.perf_counter() - began))
    return Measured("admission", workers, float(np.median(spent)))


def crowd(workers: int, n: int, process: str, seed: int) -> Crowd:
    """A crowd above capacity in simulated time."""
    site = Site(CURVES["gpu"], LADDERS["ddim"], workers, PATIENT)
    traffic = Traffic(process)
    fleet = Fleet(ARMS[-1], site, seed=seed)
    samples = fleet.run(traffic.draw(n, 1.1 * site.curve.peak * workers / traffic.mean_steps, seed))
    plans = 1e6 * np.array([each for worker in fleet.workers for each in worker.plan_seconds])
    kept = sum(sample.kept for sample in samples) / n
    return Crowd(
        workers, n, process, fleet.queue_peak, float(plans.mean()), float(np.percentile(plans, 99)), kept
    )


def _event_table(title: str, found: Sequence[Measured]) -> Table:
    sizes = sorted({each.size for each in found})
    table = Table(title=title)
    table.add_column("event")
    for size in sizes:
        table.add_column(f"{size:,}", justify="right")
    for event in dict.fromkeys(each.event for each in found):
        by_size = {each.size: each.microseconds for each in found if each.event == event}
        table.add_row(event, *(f"{by_size[size]:.0f}" if size in by_size else "" for size in sizes))
    return table


def _crowd_table(crowds: Sequence[Crowd]) -> Table:
    table = Table(title="simulated fleets above capacity: planning a step")
    for column in ("workers", "requests", "arrivals", "longest queue", "plan µs", "p99 µs", "in time"):
        table.add_column(column, justify="left" if column == "arrivals" else "right")
    for each in crowds:
        figures = (f"{each.plan_us:.0f}", f"{each.plan_p99_us:.0f}", f"{each.attainment:.1%}")
        table.add_row(str(each.workers), f"{each.requests:,}", each.process, f"{each.queue_peak:,}", *figures)
    return table


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.growth", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--depths", type=int, nargs="+", default=[1, 10, 100, 1000, 10_000], help="jobs waiting"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--calls", type=int, default=40, help="of each event, for a median")
    parser.add_argument("--fleets", type=int, default=len(FLEETS), help="how many of the simulated fleets")
    parser.add_argument("--seed", type=int, default=11)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, console, neighbours = parse(arguments), Console(), Neighbours()
    verbs = asyncio.run(queue(options.depths, options.calls))
    console.print(_event_table("the queue: µs by jobs waiting", verbs))
    decisions = [admission(workers, options.calls) for workers in options.workers]
    console.print(_event_table("admission: µs by busy workers", decisions))
    crowds = [crowd(*each, options.seed) for each in FLEETS[: options.fleets]]
    console.print(_crowd_table(crowds))
    figures = {
        "queue_us": [asdict(each) for each in verbs],
        "admission_us": [asdict(each) for each in decisions],
        "fleets": [asdict(each) for each in crowds],
    }
    save("growth", vars(options), neighbours, figures)
    lines = {
        event: [(each.size, each.microseconds) for each in (*verbs, *decisions) if each.event == event]
        for event in dict.fromkeys(each.event for each in (*verbs, *decisions))
    }
    lines["admission (by workers)"] = lines.pop("admission")
    draw_lines(lines, RESULTS / "growth.png", x="jobs waiting", y="µs an event", log_y=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
