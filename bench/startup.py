"""Measure the time from nothing to the first image, and the memory that the processes then hold.

    python -m bench.startup [--bundle model/zoo/emoji64] [--rounds 5] [--images 100] [--steps 20]

It starts `python -m service` as a user would, with a private queue, and asks until it answers: first until it
is ready, then until the first PNG is there. In the last round the memory is measured when idle and after
`--images` images. Files are in the page cache after the first round, which counts like the others. Writes
bench/results/startup.{json,png}.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ditserve.bench import report
from ditserve.bench.load.processes import free_port, process_tree, resident_bytes
from ditserve.bench.load.wire import Wire, exchange, post
from ditserve.bench.plots import draw_bars
from ditserve.bench.report import MIB
from ditserve.commands import command_line
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.manifest import Manifest
from ditserve.service.launch.child_process import Child

GOAL_S = 5.0
PATIENCE_S = 120.0
POLL_S = 0.01
# Words of a command line → the role of its process.
ROLES = {"service api": "API", "service worker": "worker", "valkey": "Valkey", "service --port": "supervisor"}
READY = b"GET /readyz HTTP/1.1\r\nhost: localhost\r\n\r\n"

Memory = dict[str, dict[str, float]]  # MiB by moment and role


@dataclass(frozen=True, slots=True)
class StartTimes:
    """Seconds from the start of the command."""

    ready_s: float
    image_s: float


def image_request(manifest: Manifest, *, steps: int, seed: int = 0) -> bytes:
    """Return a request for one image of the first class, or of a prompt for a model without classes."""
    body: dict[str, Any] = {"prompt": "a red fox", "seed": seed, "steps": steps}
    if manifest.factors:
        factor = manifest.factors[0]
        body = {"condition": {factor.name: factor.classes[0]}, "seed": seed, "steps": steps}
    return post("/generate", body, accept="image/png")


@asynccontextmanager
async def started_service(
    bundle: Path, port: int, *flags: str, patience_s: float = PATIENCE_S
) -> AsyncIterator[tuple[Child, float]]:
    """Run the service with more `flags`, and yield its supervisor and the seconds until it was ready.

    Raises:
        RuntimeError: the service does not come up.
    """
    words = [
        sys.executable,
        "-m",
        "ditserve.service",
        f"--port={port}",
        f"--bundle={bundle}",
        "--log-level=warning",
    ]
    words += flags
    began = time.perf_counter()
    child = await Child.start("service", ["/bin/sh", "-c", 'exec "$@" >/dev/null', "service", *words])
    try:
        yield child, await _seconds_until_ready(port, child, began, patience_s)
    finally:
        await child.stop(20.0)


async def cold_start(bundle: Path, request: bytes, *, images: int = 0) -> tuple[StartTimes, Memory]:
    """Start the service once; with `images`, also measure the memory when idle and after that many images.

    Raises:
        RuntimeError: the service does not come up.
    """
    port, memory = free_port(), Memory()
    async with started_service(bundle, port) as (child, ready_s):
        ready = time.perf_counter()
        async with asyncio.timeout(PATIENCE_S):
            await exchange(port, iter([request]), connections=1, n=1)
        times = StartTimes(ready_s, ready_s + time.perf_counter() - ready)
        if images:
            memory["idle"] = resident_mib(child.pid)
            await exchange(port, iter([request] * images), connections=4, n=images)
            memory[f"after {images} images"] = resident_mib(child.pid)
    return times, memory


async def _seconds_until_ready(port: int, child: Child, began: float, patience_s: float) -> float:
    while time.perf_counter() - began < patience_s and child.running:
        try:
            wire = await Wire.open(port)
            try:
                await wire.ask(READY)
                return time.perf_counter() - began
            finally:
                await wire.aclose()
        except (OSError, RuntimeError, asyncio.IncompleteReadError):
            await asyncio.sleep(POLL_S)
    raise RuntimeError(f"the service did not come up: try `{command_line('service')}`")


def resident_mib(pid: int) -> dict[str, float]:
    """Return the MiB of a running service by the role of its processes."""
    by_role: dict[str, float] = {}
    for member in process_tree(pid):
        words = Path(f"/proc/{member}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        role = next((role for sign, role in ROLES.items() if sign in words), None)
        if role is not None:
            by_role[role] = by_role.get(role, 0.0) + resident_bytes(member) / MIB
    return {role: round(by_role[role], 1) for role in ROLES.values() if role in by_role}


async def measure(options: argparse.Namespace, console: Console) -> tuple[list[StartTimes], Memory]:
    manifest = Bundle.open(options.bundle, verify=False).manifest
    request = image_request(manifest, steps=options.steps)
    starts: list[StartTimes] = []
    memory: Memory = {}
    for k in track(range(options.rounds), "starts", console=console, transient=True):
        images = options.images if k == options.rounds - 1 else 0
        times, memory = await cold_start(options.bundle, request, images=images)
        starts.append(times)
    return starts, memory


def times_table(starts: Sequence[StartTimes]) -> Table:
    title = f"cold start, seconds, of {len(starts)}; goal: first image within {GOAL_S:g} s"
    rows = []
    for name, shown in (("ready_s", "ready"), ("image_s", "first image")):
        values = [getattr(times, name) for times in starts]
        rows.append([shown, *(f"{value:.2f}" for value in (np.median(values), min(values), max(values)))])
    return report.table(title, ["", "median", "least", "most"], rows, text={""})


def memory_table(memory: Mapping[str, Mapping[str, float]]) -> Table:
    roles = list(dict.fromkeys(role for processes in memory.values() for role in processes))
    rows = [
        [moment, *(f"{processes.get(role, 0.0):.0f}" for role in roles)]
        for moment, processes in memory.items()
    ]
    return report.table("resident MiB", ["", *roles], rows, text={""})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("startup", __doc__)
    parser.add_argument("--bundle", type=Path, default=report.DEFAULT_BUNDLE)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=100, help="between the two looks at memory")
    parser.add_argument("--steps", type=int, default=20, help="of an image")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, console, background = parse(arguments), Console(), report.BackgroundLoad()

    def work() -> None:
        starts, memory = asyncio.run(measure(options, console))
        console.print(times_table(starts))
        console.print(memory_table(memory))
        medians = {
            name: float(np.median([getattr(times, name) for times in starts]))
            for name in ("ready_s", "image_s")
        }
        figures = {"medians": medians, "starts": [asdict(times) for times in starts], "resident_mib": memory}
        report.save("startup", options, background, figures)
        bars = {f"{role}, {moment}": mib for moment, held in memory.items() for role, mib in held.items()}
        draw_bars(bars, "resident MiB", report.result_path("startup.png"))

    return report.run_command("startup", work)


if __name__ == "__main__":
    sys.exit(main())
