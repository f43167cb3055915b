"""From nothing to the first image, and what the processes then hold.

    python -m bench.startup [--bundle model/zoo/emoji] [--rounds 5] [--images 100] [--steps 20]

Starts `python -m service` as a user would, with a private queue, and asks until it answers: when it is ready, and when the first
PNG is there. In the last round memory is told idle and after so many images. Files are in the page cache after the first round, which
counts like the others. Writes bench/results/startup.{json,png}.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ditserve.bench.consumption import family
from ditserve.bench.plots import RESULTS, draw_shares
from ditserve.bench.record import Neighbours, save
from ditserve.bench.site import free_port, resident_bytes
from ditserve.bench.wire import Wire, exchange, post
from ditserve.model.spec.bundle import Bundle, Manifest
from ditserve.service.launch.child_process import Child

GOAL_S = 5.0
PATIENCE_S = 120.0
POLL_S = 0.01
MIB = 1 << 20
ROLES = {"service api": "API", "service worker": "worker", "valkey": "Valkey", "service --port": "supervisor"}
READY = b"GET /readyz HTTP/1.1\r\nhost: localhost\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds from starting the command."""

    ready_s: float
    image_s: float


def request(manifest: Manifest, *, steps: int, seed: int = 0) -> bytes:
    """One image of the first class."""
    factor = manifest.factors[0]
    body = {"condition": {factor.name: factor.classes[0]}, "seed": seed, "steps": steps}
    return post("/generate", body, accept="image/png")


async def start(bundle: Path, image: bytes, *, images: int = 0) -> tuple[Start, dict[str, dict[str, float]]]:
    """One cold start; with `images`, also MiB by process, idle and after so many.

    Raises:
        RuntimeError: it does not come up.
    """
    port = free_port()
    words = [sys.executable, "-m", "service", f"--port={port}", f"--bundle={bundle}", "--log-level=warning"]
    began = time.perf_counter()
    child = await Child.start("service", ["/bin/sh", "-c", 'exec "$@" >/dev/null', "service", *words])
    try:
        ready_s = await _ready(port, child, began)
        async with asyncio.timeout(PATIENCE_S):
            await exchange(port, iter([image]), connections=1, n=1)
        started = Start(ready_s, time.perf_counter() - began)
        memory = {"idle": residents(child.pid)} if images else {}
        if images:
            await exchange(port, iter([image] * images), connections=4, n=images)
            memory[f"after {images} images"] = residents(child.pid)
        return started, memory
    finally:
        await child.stop(20.0)


async def _ready(port: int, child: Child, began: float) -> float:
    while time.perf_counter() - began < PATIENCE_S and child.running:
        try:
            wire = await Wire.open(port)
            try:
                await wire.ask(READY)
                return time.perf_counter() - began
            finally:
                await wire.aclose()
        except (OSError, RuntimeError, asyncio.IncompleteReadError):
            await asyncio.sleep(POLL_S)
    raise RuntimeError("the service did not come up: try `python -m service`")


def residents(pid: int) -> dict[str, float]:
    """MiB of each process of a running service, by its role."""
    found: dict[str, float] = {}
    for each in family(pid):
        words = Path(f"/proc/{each}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        role = next((role for sign, role in ROLES.items() if sign in words), None)
        if role is not None:
            found[role] = found.get(role, 0.0) + resident_bytes(each) / MIB
    return {role: round(found[role], 1) for role in ROLES.values() if role in found}


async def run(
    options: argparse.Namespace, console: Console
) -> tuple[list[Start], dict[str, dict[str, float]]]:
    image = request(Bundle.open(options.bundle, verify=False).manifest, steps=options.steps)
    starts: list[Start] = []
    memory: dict[str, dict[str, float]] = {}
    for k in track(range(options.rounds), "starts", console=console, transient=True):
        last = k == options.rounds - 1
        started, memory = await start(options.bundle, image, images=options.images if last else 0)
        starts.append(started)
    return starts, memory


def _tables(starts: Sequence[Start], memory: dict[str, dict[str, float]]) -> tuple[Table, Table]:
    times = Table(title=f"cold start, seconds, of {len(starts)}; goal: first image within {GOAL_S:g} s")
    for column in ("", "median", "least", "most"):
        times.add_column(column, justify="right" if column else "left")
    for name, title in (("ready_s", "ready"), ("image_s", "first image")):
        values = [getattr(each, name) for each in starts]
        times.add_row(title, *(f"{value:.2f}" for value in (np.median(values), min(values), max(values))))
    held = Table(title="resident MiB")
    held.add_column("")
    roles = dict.fromkeys(role for each in memory.values() for role in each)
    for role in roles:
        held.add_column(role, justify="right")
    for when, each in memory.items():
        held.add_row(when, *(f"{each.get(role, 0.0):.0f}" for role in roles))
    return times, held


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.startup", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--bundle", type=Path, default=Path("model/zoo/emoji"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=100, help="between the two looks at memory")
    parser.add_argument("--steps", type=int, default=20, help="of an image")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, console, neighbours = parse(arguments), Console(), Neighbours()
    starts, memory = asyncio.run(run(options, console))
    for table in _tables(starts, memory):
        console.print(table)
    medians = {
        name: float(np.median([getattr(each, name) for each in starts])) for name in ("ready_s", "image_s")
    }
    figures = {"medians": medians, "starts": [asdict(each) for each in starts], "resident_mib": memory}
    save("startup", vars(options), neighbours, figures)
    bars = {f"{role}, {when}": mib for when, each in memory.items() for role, mib in each.items()}
    draw_shares(bars, "resident MiB", RESULTS / "startup.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
