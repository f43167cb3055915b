"""Check that nothing grows out of bounds: the queue, admission and planning.

    python -m bench.growth [--depths 1 10 100 1000 10000] [--workers 1 4 16 64] [--calls 40]

The queue is a real Valkey. The time of an operation is what one caller waits for it, client and script
together: medians over `--calls` calls, with the jobs spread over callers; and besides these the worst case, a
job that is due before all others of its one caller. Admission is timed with as many published worker states.
The fleets are simulated (`bench.simulate`): a crowd above capacity with deadlines far away. Writes
bench/results/growth.{json,png}.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ditserve.bench import report
from ditserve.bench.load.workload import Traffic
from ditserve.bench.plots import draw_lines
from ditserve.bench.simulate.fleet import SimulatedFleet
from ditserve.bench.simulate.outcome import offered_rate
from ditserve.bench.simulate.scenario import (
    CURVES,
    LADDERS,
    PATIENT_SLO,
    PLANNED_EVERY_STEP,
    SimulatedCluster,
)
from ditserve.service.fleet import DemandBucket, LoadSnapshot, WorkerState
from ditserve.service.jobs import Claim, ConditionTerm, Image, Job, JobResult, Progress
from ditserve.service.launch.valkey import scratch_folder, start_valkey
from ditserve.service.planning.admission import AdmissionRequest, admit
from ditserve.service.queue.broker import Broker
from ditserve.service.rung import Consent

CALLERS = 16
# (workers, requests, arrival process); thousands of these requests wait.
FLEETS = (
    (1, 1_000, "flash"),
    (4, 2_000, "flash"),
    (16, 5_000, "flash"),
    (64, 10_000, "flash"),
    (64, 10_000, "at-once"),
)
DEADLINES = 12  # that a busy worker reports apart
IMAGE_FILE = bytes(8192)


@dataclass(frozen=True, slots=True)
class EventTime:
    """The median microseconds of an event at one size: jobs waiting, or busy workers."""

    event: str
    size: int
    microseconds: float


@dataclass(frozen=True, slots=True)
class FleetGrowth:
    """A simulated fleet: microseconds of a planning event, longest queue, share of requests in time."""

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


def job_result(worker: str) -> JobResult:
    return JobResult(
        images=(Image(IMAGE_FILE, 0, "image/png"),),
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


def worker_state(k: int, now: float) -> WorkerState:
    """Return the published state of a busy worker."""
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
        dues=tuple(DemandBucket(now + 2.0**h, 80, 80) for h in range(DEADLINES)),
    )


async def microseconds(call: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await call()
    return 1e6 * (time.perf_counter() - began)


async def queue_events(broker: Broker, depth: int, calls: int) -> list[EventTime]:
    """Time every operation of a job's life while `depth` others wait."""
    for k in range(depth):
        await broker.submit(job(k, callers=CALLERS, due_s=1e5 + k))
    spent: dict[str, list[float]] = {}

    async def note(event: str, call: Callable[[], Awaitable[object]]) -> None:
        spent.setdefault(event, []).append(await microseconds(call))

    for k in range(calls):
        submitted = job(k, callers=CALLERS, due_s=2e5)
        await note("submit", partial(broker.submit, submitted))
        await note("load", broker.load)
        claims: list[Claim] = []

        async def claim(claims: list[Claim] = claims) -> None:
            claims.extend(await broker.claim("growth", models=["growth"], max_samples=1))

        await note("claim", claim)
        lease = claims[0].lease
        await note("progress", partial(broker.progress, Progress(lease, "step", {"step": 1})))
        await note("renew", partial(broker.renew, [lease]))
        await note("finish", partial(broker.finish, lease, job_result("growth")))
    return [EventTime(event, depth, float(np.median(times))) for event, times in spent.items()]


async def overtaking(broker: Broker, depth: int, calls: int) -> list[EventTime]:
    """Time the submission of the most urgent job of a caller who has `depth` others waiting."""
    for k in range(depth):
        await broker.submit(job(k, callers=1, due_s=1e5 + k))
    urgent = [job(0, callers=1, due_s=1e4 - k) for k in range(calls)]
    spent = [await microseconds(partial(broker.submit, submitted)) for submitted in urgent]
    return [EventTime("submit before all of one caller", depth, float(np.median(spent)))]


async def queue_times(depths: Sequence[int], calls: int) -> list[EventTime]:
    """Time the queue's operations at every depth, each in a namespace of its own."""
    times: list[EventTime] = []
    with scratch_folder() as folder:
        valkey, url = await start_valkey(Path(folder))
        try:
            for depth in depths:
                for study in (queue_events, overtaking):
                    namespace = f"{study.__name__}-{depth}"
                    broker = await Broker.connect(
                        url, namespace=namespace, queue_limit=10**6, queue_rows=10**9
                    )
                    try:
                        times += await study(broker, depth, calls)
                    finally:
                        await broker.aclose()
        finally:
            await valkey.stop(5.0)
    return times


def admission_time(workers: int, calls: int) -> EventTime:
    """Time the decision about a new request with a deadline, beside that many busy workers."""
    now = time.time()
    ladder = LADDERS["ddim"]
    load = LoadSnapshot(10_000, 200_000, 1.0, tuple(worker_state(k, now) for k in range(workers)), now)
    admission_request = AdmissionRequest(ladder.rungs[0], 1.0, 1, now + 60.0, True, Consent())
    spent = []
    for _ in range(calls):
        began = time.perf_counter()
        admit(admission_request, load, ladder=ladder, now=now)
        spent.append(1e6 * (time.perf_counter() - began))
    return EventTime("admission", workers, float(np.median(spent)))


def fleet_growth(workers: int, n: int, process: str, seed: int) -> FleetGrowth:
    """Simulate a crowd above capacity."""
    cluster = SimulatedCluster(CURVES["gpu"], LADDERS["ddim"], workers, PATIENT_SLO)
    traffic = Traffic(process)
    fleet = SimulatedFleet(PLANNED_EVERY_STEP, cluster, seed=seed)
    samples = fleet.run(traffic.draw(n, offered_rate(cluster, traffic, 1.1), seed))
    plans = 1e6 * np.array([seconds for worker in fleet.workers for seconds in worker.plan_seconds])
    return FleetGrowth(
        workers=workers,
        requests=n,
        process=process,
        queue_peak=fleet.queue_peak,
        plan_us=float(plans.mean()),
        plan_p99_us=float(np.percentile(plans, 99)),
        attainment=sum(sample.in_time for sample in samples) / n,
    )


def event_table(title: str, times: Sequence[EventTime]) -> Table:
    sizes = sorted({measured.size for measured in times})
    rows = []
    for event in dict.fromkeys(measured.event for measured in times):
        by_size = {m.size: m.microseconds for m in times if m.event == event}
        rows.append([event, *(f"{by_size[size]:.0f}" if size in by_size else "" for size in sizes)])
    return report.table(title, ["event", *(f"{size:,}" for size in sizes)], rows, text={"event"})


def fleet_table(fleets: Sequence[FleetGrowth]) -> Table:
    rows = []
    for fleet in fleets:
        times = (f"{fleet.plan_us:.0f}", f"{fleet.plan_p99_us:.0f}", f"{fleet.attainment:.1%}")
        counts = (str(fleet.workers), f"{fleet.requests:,}", fleet.process, f"{fleet.queue_peak:,}")
        rows.append([*counts, *times])
    columns = ("workers", "requests", "arrivals", "longest queue", "plan µs", "p99 µs", "in time")
    return report.table("simulated fleets above capacity: planning a step", columns, rows, text={"arrivals"})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("growth", __doc__)
    parser.add_argument(
        "--depths", type=int, nargs="+", default=[1, 10, 100, 1000, 10_000], help="jobs waiting"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--calls", type=int, default=40, help="of each event, for a median")
    parser.add_argument("--fleets", type=int, default=len(FLEETS), help="how many of the simulated fleets")
    parser.add_argument("--seed", type=int, default=11)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, console, background = parse(arguments), Console(), report.BackgroundLoad()

    def work() -> None:
        queue = asyncio.run(queue_times(options.depths, options.calls))
        console.print(event_table("the queue: µs by jobs waiting", queue))
        admission = [admission_time(workers, options.calls) for workers in options.workers]
        console.print(event_table("admission: µs by busy workers", admission))
        fleets = [fleet_growth(*fleet, options.seed) for fleet in FLEETS[: options.fleets]]
        console.print(fleet_table(fleets))
        figures = {
            "queue_us": [asdict(measured) for measured in queue],
            "admission_us": [asdict(measured) for measured in admission],
            "fleets": [asdict(fleet) for fleet in fleets],
        }
        report.save("growth", options, background, figures)
        lines: dict[str, list[tuple[float, float]]] = {}
        for measured in (*queue, *admission):
            name = "admission (by workers)" if measured.event == "admission" else measured.event
            lines.setdefault(name, []).append((measured.size, measured.microseconds))
        figure = report.result_path("growth.png")
        draw_lines(lines, figure, x="jobs waiting", y="µs an event", log_y=True)

    return report.run_command("growth", work)


if __name__ == "__main__":
    sys.exit(main())
