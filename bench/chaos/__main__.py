"""Break the service while it works, and check that every accepted job ends once, with the right image.

    python -m bench.chaos [--seconds 60] [--seed 1] [--clients 6] [--workers 2] [--bundle model/zoo/emoji]
        [--out bench/results/chaos.json]

A durable Valkey, an API and workers run as processes of their own. Clients send jobs of every kind and pursue
each to its end, while workers, the API and Valkey are killed, frozen and drained, in an order that the seed
decides. Each image is compared with that of the same request run alone and undisturbed. Ends with status 1 if
a job was lost, answered twice, or answered with a wrong image.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ditserve.bench import report
from ditserve.bench.chaos.clients import LoadClient, connected, reference_requests, with_images
from ditserve.bench.chaos.faults import LEASE_S, ChaosLog, cause_faults
from ditserve.bench.load.cluster import TestCluster, running_cluster
from ditserve.model.spec.bundle import Bundle
from ditserve.service.launch.valkey import scratch_folder
from ditserve.service.queue.broker import Broker
from ditserve.service.settings import Settings

DRAIN_S = 0.3
PATIENCE_S = 120.0  # for all requests to end after the last fault
TERMINAL = {"done", "failed", "cancelled"}


async def audit(cluster: TestCluster, log: ChaosLog) -> None:
    """Count the jobs that ended more than once, and the attempts of each."""
    broker = await Broker.connect(cluster.redis_url)
    try:
        for outcome in log.accepted:
            status = await broker.status(outcome.job) if outcome.job else None
            if status is None:
                continue
            ends = [event.kind async for event in broker.events(status.id) if event.kind in TERMINAL]
            log.duplicated += len(ends) != 1
            log.attempts[status.attempt] += 1
        load = await broker.load()
        if load.queued_jobs:
            raise RuntimeError(f"{load.queued_jobs} jobs are still queued")
    finally:
        await broker.aclose()


async def run(options: argparse.Namespace, progress: Progress) -> ChaosLog:
    flags = [
        f"--bundle={options.bundle}",
        "--threads=1",
        "--precision=fp32",
        f"--lease-s={LEASE_S}",
        f"--drain-s={DRAIN_S}",
        "--log-level=warning",
        f"--ready-workers={options.workers}",
    ]
    log, rng = ChaosLog(), random.Random(options.seed)
    factor = Bundle.open(options.bundle).manifest.factors[0]
    requests = reference_requests(factor.classes, factor.name, steps=options.steps)
    with scratch_folder() as folder:
        async with (
            running_cluster(Path(folder), Settings.parse(flags), workers=options.workers) as cluster,
            connected(cluster.url) as http,
        ):
            requests = await with_images(http, requests)
            seeds = [rng.random() for _ in range(options.clients)]
            clients = [LoadClient(http, requests, random.Random(seed), log.outcomes) for seed in seeds]
            showing = asyncio.create_task(_show(progress, log, options.seconds))
            await _work_through_faults(cluster, clients, log, rng, options.seconds)
            showing.cancel()
            await audit(cluster, log)
    return log


async def _work_through_faults(
    cluster: TestCluster, clients: Sequence[LoadClient], log: ChaosLog, rng: random.Random, seconds: float
) -> None:
    """Run the clients while faults happen, and then until their requests end or `PATIENCE_S` passes."""
    stop = asyncio.Event()
    running = [asyncio.create_task(client.run(stop)) for client in clients]
    await cause_faults(cluster, log, rng, seconds)
    stop.set()
    _, left = await asyncio.wait(running, timeout=PATIENCE_S)
    for task in left:
        task.cancel()
    for task, error in zip(running, await asyncio.gather(*running, return_exceptions=True), strict=True):
        if task not in left and isinstance(error, BaseException):
            raise RuntimeError(f"a client met what it did not expect: {error!r}\n{cluster.logs()}") from error


async def _show(progress: Progress, log: ChaosLog, seconds: float) -> None:
    task, began = progress.add_task("", total=seconds), time.monotonic()
    while True:
        last = log.faults[-1][1] if log.faults else "…"
        text = f"{len(log.outcomes)} requests, {len(log.faults)} faults ({last})"
        progress.update(task, completed=time.monotonic() - began, description=text)
        await asyncio.sleep(0.2)


def summary_table(summary: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None)
    for name, value in summary.items():
        shown = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(name.replace("_", " "), shown)
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("chaos", __doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long faults go on")
    parser.add_argument("--seed", type=int, default=1, help="of faults and requests")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="of a plain request")
    parser.add_argument("--bundle", type=Path, default=report.DEFAULT_BUNDLE)
    parser.add_argument("--out", type=Path, help="file for the result, as JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if a promise was broken."""
    options, background = parse(arguments), report.BackgroundLoad()
    summary: dict[str, Any] = {}

    def work() -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            log = asyncio.run(run(options, progress))
        summary.update(log.summary())
        Console().print(summary_table(summary))
        if options.out:
            report.write_json(options.out, report.record(options, background, summary))

    if status := report.run_command("chaos", work):
        return status
    return 1 if summary["lost"] or summary["duplicated"] or summary["wrong_images"] else 0


if __name__ == "__main__":
    sys.exit(main())
