"""Check that the memory of an API and a worker stays where it is while they make many images.

    python -m bench.soak [--images 10000] [--bundle model/zoo/tiny] [--steps 1] [--clients 4]
        [--out bench/results/soak.json]

The first fifth is warm-up. For the rest, the growth is the median of the last quarter minus that of the
first, and the growth an image is the slope of a straight line through all of it. Ends with status 1 if a
process grew by more than `--allowed-mib`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ditserve.bench import report
from ditserve.bench.chaos.clients import (
    LoadClient,
    RequestOutcome,
    reference_requests,
    with_images,
)
from ditserve.bench.chaos.doors import opened
from ditserve.bench.load.cluster import TestCluster, running_cluster
from ditserve.bench.load.processes import resident_bytes
from ditserve.bench.report import MIB
from ditserve.model.spec.bundle import Bundle
from ditserve.service.launch.valkey import scratch_folder
from ditserve.service.settings import Settings

SAMPLE_S = 0.25
WATCHED = ("api", "worker-0")


@dataclass(slots=True)
class MemorySeries:
    """The resident bytes of a process by the number of images made."""

    images: list[int] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)

    def add(self, images: int, pid: int) -> None:
        self.images.append(images)
        self.resident.append(resident_bytes(pid))

    def summary(self) -> dict[str, float]:
        """Return MiB after the warm-up and at the end, their difference, and KiB per 1,000 images."""
        images, resident = np.array(self.images, float), np.array(self.resident, float)
        settled = images >= 0.2 * images[-1]
        images, resident = images[settled], resident[settled]
        quarter = max(1, len(resident) // 4)
        first, last = np.median(resident[:quarter]), np.median(resident[-quarter:])
        slope = np.polyfit(images, resident, 1)[0] if np.ptp(images) else 0.0
        return {
            "first_mib": round(float(first / MIB), 2),
            "last_mib": round(float(last / MIB), 2),
            "growth_mib": round(float((last - first) / MIB), 2),
            "kib_per_1000_images": round(float(slope) * 1000 / 1024, 1),
        }


async def run(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    # Results live briefly, so that the queue too comes to rest.
    flags = [f"--bundle={options.bundle}", "--threads=1", "--log-level=warning", "--result-ttl-s=20"]
    factor = Bundle.open(options.bundle).manifest.factors[0]
    requests = reference_requests(factor.classes, factor.name, steps=options.steps)
    with scratch_folder() as folder:
        async with (
            running_cluster(Path(folder), Settings.parse(flags), workers=1) as cluster,
            opened(cluster.urls) as doors,
        ):
            requests = await with_images(doors, requests)
            outcomes: list[RequestOutcome] = []
            rng = random.Random(1)
            stop = asyncio.Event()
            clients = [
                LoadClient(doors, requests, random.Random(rng.random()), outcomes)
                for _ in range(options.clients)
            ]
            running = [asyncio.create_task(client.run(stop)) for client in clients]
            memory = await _watch(cluster, clients[0], options.images, progress)
            stop.set()
            await asyncio.gather(*running)
    return {
        "images": memory["api"].images[-1],
        "requests": len(outcomes),
        "wrong": sum(outcome.match == "wrong" or outcome.undocumented > 0 for outcome in outcomes),
        **{name: series.summary() for name, series in memory.items()},
    }


async def _watch(
    cluster: TestCluster, client: LoadClient, images: int, progress: Progress
) -> dict[str, MemorySeries]:
    """Sample the memory of the watched processes until all clients together have made that many images."""
    memory = {name: MemorySeries() for name in WATCHED}
    task, made = progress.add_task("images", total=images), 0
    while made < images:
        await asyncio.sleep(SAMPLE_S)
        done = [outcome for outcome in client.outcomes if outcome.end == "done"]
        made = sum(len(client.requests[outcome.request].images) for outcome in done)
        for name, series in memory.items():
            series.add(made, cluster.pid(name))
        progress.update(task, completed=made)
    return memory


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("soak", __doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--bundle", type=Path, default=report.SMALL_BUNDLE)
    parser.add_argument("--steps", type=int, default=1, help="of a plain request")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--allowed-mib", type=float, default=8.0, help="growth after the warm-up")
    parser.add_argument("--out", type=Path, help="file for the result, as JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if a process grew too much or an image was wrong."""
    options, background = parse(arguments), report.BackgroundLoad()
    result: dict[str, Any] = {}

    def work() -> None:
        columns = (TextColumn("{task.completed} images"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            result.update(asyncio.run(run(options, progress)))
        Console().print_json(data=result)
        if options.out:
            report.write_json(options.out, report.record(options, background, result))

    if status := report.run_command("soak", work):
        return status
    grown = [name for name in WATCHED if result[name]["growth_mib"] > options.allowed_mib]
    return 1 if grown or result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
