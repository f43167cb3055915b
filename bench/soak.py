"""Does the service's memory stay where it is? Many images through an API and a worker, and what both hold meanwhile.

    python -m bench.soak [--images 10000] [--bundle model/zoo/tiny] [--steps 1] [--clients 4] [--out bench/results/soak.json]

The first fifth is warm-up. Of the rest the growth is told by the median of its last quarter over that of its first, and per image by
a straight line through all of it. Ends with status 1 if a process grew by more than `--allowed-mib`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ditserve.bench.chaos import references, write
from ditserve.bench.clients import Client, Outcome, connected, recipes
from ditserve.bench.site import Site, opened, resident_bytes
from ditserve.model.spec.bundle import Bundle
from ditserve.service.settings import Settings

MIB = 1 << 20
LOOK_S = 0.25
WATCHED = ("api", "worker-0")


@dataclass(slots=True)
class Memory:
    """What a process held, by images made."""

    images: list[int] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)

    def look(self, images: int, pid: int) -> None:
        self.images.append(images)
        self.resident.append(resident_bytes(pid))

    def summary(self) -> dict[str, float]:
        """MiB at the start and end of what follows the warm-up, its growth, and the slope in KiB per 1,000 images."""
        images, resident = np.array(self.images, float), np.array(self.resident, float)
        settled = images >= 0.2 * images[-1]
        images, resident = images[settled], resident[settled]
        quarter = max(1, len(resident) // 4)
        first, last = np.median(resident[:quarter]), np.median(resident[-quarter:])
        slope = np.polyfit(images, resident, 1)[0] if np.ptp(images) else 0.0
        figures = {"first_mib": first / MIB, "last_mib": last / MIB, "growth_mib": (last - first) / MIB}
        return {
            **{name: round(float(value), 2) for name, value in figures.items()},
            "kib_per_1000_images": round(float(slope) * 1000 / 1024, 1),
        }


async def run(arguments: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    manifest = Bundle.open(arguments.bundle).manifest
    # A short life of results, so that the queue too comes to rest.
    flags = [f"--bundle={arguments.bundle}", "--threads=1", "--log-level=warning", "--result-ttl-s=20"]
    factor = manifest.factors[0]
    plain = recipes(factor.classes, factor.name, steps=arguments.steps)
    with tempfile.TemporaryDirectory(prefix="dit-") as folder:
        async with (
            opened(Path(folder), Settings.parse(flags), workers=1) as site,
            connected(site.url) as http,
        ):
            known = await references(http, plain)
            outcomes: list[Outcome] = []
            rng = random.Random(1)
            stop = asyncio.Event()
            clients = [
                Client(http, known, random.Random(rng.random()), outcomes) for _ in range(arguments.clients)
            ]
            running = [asyncio.create_task(client.run(stop)) for client in clients]
            memories = await _watch(site, clients[0], arguments.images, progress)
            stop.set()
            await asyncio.gather(*running)
    wrong = sum(each.match == "wrong" or each.unexplained > 0 for each in outcomes)
    return {
        "images": memories["api"].images[-1],
        "requests": len(outcomes),
        "wrong": wrong,
        **{name: memory.summary() for name, memory in memories.items()},
    }


async def _watch(site: Site, client: Client, images: int, progress: Progress) -> dict[str, Memory]:
    memories = {name: Memory() for name in WATCHED}
    task, done = progress.add_task("images", total=images), 0
    while done < images:
        await asyncio.sleep(LOOK_S)
        ended = [each for each in client.outcomes if each.end == "done"]
        done = sum(len(client.recipes[each.recipe].images) for each in ended)
        for name, memory in memories.items():
            memory.look(done, site.pid(name))
        progress.update(task, completed=done)
    return memories


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--bundle", type=Path, default=Path("model/zoo/tiny"))
    parser.add_argument("--steps", type=int, default=1, help="of a plain request")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--allowed-mib", type=float, default=8.0, help="growth after the warm-up")
    parser.add_argument("--out", type=Path, help="file for the result, as JSON")
    arguments = parser.parse_args(argv)
    columns = (TextColumn("{task.completed} images"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        result = asyncio.run(run(arguments, progress))
    Console().print_json(data=result)
    if arguments.out:
        write(arguments, result)
    grown = [name for name in WATCHED if result[name]["growth_mib"] > arguments.allowed_mib]
    return 1 if grown or result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
