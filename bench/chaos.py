"""Breaks the service while it works, and checks what it promises: every accepted job ends exactly once, with the right image or the truth.

    python -m bench.chaos [--seconds 60] [--seed 1] [--clients 6] [--workers 2] [--bundle model/zoo/emoji] [--out bench/results/chaos.json]

A durable Valkey, an API and workers run as processes of their own. Clients send jobs of every kind and pursue each to its end, while
workers, the API and Valkey are killed, frozen and drained, in an order that the seed decides. Each image is compared with that of the
same request run alone and undisturbed. Ends with status 1 if a job was lost, answered twice, or answered with a wrong image.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ditserve.bench.clients import Client, Outcome, Recipe, connected, recipes
from ditserve.bench.site import Site, opened
from ditserve.model.spec.bundle import Bundle
from ditserve.service.queue.broker import Broker
from ditserve.service.settings import Settings

LEASE_S = 2.0
DRAIN_S = 0.3
CALM = 0.8  # of all faults, those that are recovered from before the next
PATIENCE_S = 120.0  # after the last fault, for everything to end
REFUSED = {"overloaded"}  # before it was accepted
TERMINAL = {"done", "failed", "cancelled"}


async def _kill_worker(site: Site, rng: random.Random) -> None:
    """As a fault in a native library would; its jobs wait for their leases to end."""
    site.signal(rng.choice(site.workers), signal.SIGKILL)


async def _drain_worker(site: Site, rng: random.Random) -> None:
    """As a new release would; it hands its jobs over with what is done of them."""
    site.signal(rng.choice(site.workers), signal.SIGTERM)


async def _freeze_worker(site: Site, rng: random.Random) -> None:
    """For longer than its leases: others take its jobs, and what it still says is too late."""
    name = rng.choice(site.workers)
    site.signal(name, signal.SIGSTOP)
    await asyncio.sleep(LEASE_S * (1.2 + rng.random()))
    site.signal(name, signal.SIGCONT)


async def _kill_valkey(site: Site, rng: random.Random) -> None:
    site.signal("valkey", signal.SIGKILL)


async def _freeze_valkey(site: Site, rng: random.Random) -> None:
    """Connections stand, and nothing comes."""
    site.signal("valkey", signal.SIGSTOP)
    await asyncio.sleep(1 + 3 * rng.random())
    site.signal("valkey", signal.SIGCONT)


async def _kill_api(site: Site, rng: random.Random) -> None:
    site.signal("api", signal.SIGKILL)


async def _restart_api(site: Site, rng: random.Random) -> None:
    site.signal("api", signal.SIGTERM)


Fault = Callable[[Site, random.Random], Awaitable[None]]
FAULTS: dict[str, tuple[Fault, int]] = {  # and how often, relative to the others
    "worker killed": (_kill_worker, 4),
    "worker drained": (_drain_worker, 3),
    "worker frozen": (_freeze_worker, 2),
    "Valkey killed": (_kill_valkey, 2),
    "Valkey frozen": (_freeze_valkey, 2),
    "API killed": (_kill_api, 2),
    "API restarted": (_restart_api, 1),
}


@dataclass(slots=True)
class Record:
    """What happened: faults by time, and every request."""

    faults: list[tuple[float, str]] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    duplicated: int = 0
    attempts: Counter[int] = field(default_factory=Counter)

    @property
    def accepted(self) -> list[Outcome]:
        return [each for each in self.outcomes if each.end not in REFUSED]

    def open_after(self) -> list[float]:
        """For every fault, the seconds until all requests open at that moment had their answer."""
        waits = []
        for at, _ in self.faults:
            ends = [each.ended_at for each in self.outcomes if each.asked_at < at < each.ended_at]
            waits.append(max(ends, default=at) - at)
        return waits

    def summary(self) -> dict[str, Any]:
        matches = Counter(each.match for each in self.outcomes if each.end == "done")
        recovery = self.open_after() or [0.0]
        percentiles = {f"p{q}": round(float(np.percentile(recovery, q)), 2) for q in (50, 90, 99)}
        return {
            "requests": len(self.outcomes),
            "accepted": len(self.accepted),
            "lost": sum(each.end == "lost" for each in self.accepted),
            "duplicated": self.duplicated,
            "wrong_images": matches["wrong"],
            "unexplained_answers": sum(each.unexplained for each in self.outcomes),
            "ends": dict(Counter(each.end for each in self.outcomes).most_common()),
            "images": dict(matches),
            "ways": dict(Counter(each.way for each in self.outcomes)),
            "attempts": {str(n): count for n, count in sorted(self.attempts.items())},
            "faults": dict(Counter(name for _, name in self.faults).most_common()),
            "recovery_s": {**percentiles, "max": round(max(recovery), 2)},
        }


async def disturb(site: Site, record: Record, rng: random.Random, seconds: float) -> None:
    """One fault after another, one of each kind first. Mostly the next waits until all processes are up and have worked a little;
    now and then it does not."""
    until = time.monotonic() + seconds
    weights = [weight for _, weight in FAULTS.values()]
    ahead = rng.sample(list(FAULTS), len(FAULTS))
    while time.monotonic() < until:
        name = ahead.pop() if ahead else rng.choices(list(FAULTS), weights)[0]
        record.faults.append((time.time(), name))
        await FAULTS[name][0](site, rng)
        if rng.random() < CALM:
            await site.ready()
        await asyncio.sleep(0.5 + 3 * rng.random())


async def audit(site: Site, record: Record) -> None:
    """Count the jobs that ended more than once, and how often each was begun."""
    broker = await Broker.connect(site.redis_url)
    try:
        for outcome in record.accepted:
            status = await broker.status(outcome.job) if outcome.job else None
            if status is None:
                continue
            ends = [event.kind async for event in broker.events(status.id) if event.kind in TERMINAL]
            record.duplicated += len(ends) != 1
            record.attempts[status.attempt] += 1
        load = await broker.load()
        if load.queued_jobs:
            raise RuntimeError(f"{load.queued_jobs} jobs are still queued")
    finally:
        await broker.aclose()


async def run(arguments: argparse.Namespace, progress: Progress) -> Record:
    manifest = Bundle.open(arguments.bundle).manifest
    flags = [
        f"--bundle={arguments.bundle}",
        "--threads=1",
        "--precision=fp32",
        f"--lease-s={LEASE_S}",
        f"--drain-s={DRAIN_S}",
    ]
    settings = Settings.parse([*flags, "--log-level=warning", f"--ready-workers={arguments.workers}"])
    record, rng = Record(), random.Random(arguments.seed)
    factor = manifest.factors[0]
    plain = recipes(factor.classes, factor.name, steps=arguments.steps)
    with tempfile.TemporaryDirectory(prefix="dit-") as folder:
        async with (
            opened(Path(folder), settings, workers=arguments.workers) as site,
            connected(site.url) as http,
        ):
            known = await references(http, plain)
            seeds = [rng.random() for _ in range(arguments.clients)]
            clients = [Client(http, known, random.Random(seed), record.outcomes) for seed in seeds]
            showing = asyncio.create_task(_show(progress, record, arguments.seconds))
            await _suffer(site, clients, record, rng, arguments.seconds)
            showing.cancel()
            await audit(site, record)
    return record


async def _suffer(
    site: Site, clients: Sequence[Client], record: Record, rng: random.Random, seconds: float
) -> None:
    """Clients at work while faults happen, and until all they asked for has ended, or patience has."""
    stop = asyncio.Event()
    running = [asyncio.create_task(client.run(stop)) for client in clients]
    await disturb(site, record, rng, seconds)
    stop.set()
    _, left = await asyncio.wait(running, timeout=PATIENCE_S)
    for each in left:
        each.cancel()
    for each, error in zip(running, await asyncio.gather(*running, return_exceptions=True), strict=True):
        if each not in left and isinstance(error, BaseException):
            raise RuntimeError(f"a client met what it did not expect: {error!r}\n{site.logs()}") from error


async def references(http: httpx.AsyncClient, plain: list[Recipe]) -> list[Recipe]:
    """The recipes with their images, each made alone."""
    client = Client(http, plain, random.Random(0), [])
    return [await client.reference(recipe) for recipe in plain]


async def _show(progress: Progress, record: Record, seconds: float) -> None:
    task, began = progress.add_task("", total=seconds), time.monotonic()
    while True:
        last = record.faults[-1][1] if record.faults else "…"
        text = f"{len(record.outcomes)} requests, {len(record.faults)} faults ({last})"
        progress.update(task, completed=time.monotonic() - began, description=text)
        await asyncio.sleep(0.2)


def report(summary: dict[str, Any], console: Console) -> None:
    table = Table(show_header=False, box=None)
    for name, value in summary.items():
        shown = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(name.replace("_", " "), shown)
    console.print(table)


def write(arguments: argparse.Namespace, figures: dict[str, Any]) -> None:
    """The figures as JSON, with what they were measured by and on."""
    options = {name: value for name, value in vars(arguments).items() if name not in ("out", "bundle")}
    options["bundle"] = arguments.bundle.name
    machine = {
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    result = {"options": options, "machine": machine, **figures}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long faults go on")
    parser.add_argument("--seed", type=int, default=1, help="of faults and requests")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="of a plain request")
    parser.add_argument("--bundle", type=Path, default=Path("model/zoo/emoji"))
    parser.add_argument("--out", type=Path, help="file for the result, as JSON")
    arguments = parser.parse_args(argv)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        record = asyncio.run(run(arguments, progress))
    summary = record.summary()
    report(summary, Console())
    if arguments.out:
        write(arguments, summary)
    return 1 if summary["lost"] or summary["duplicated"] or summary["wrong_images"] else 0


if __name__ == "__main__":
    sys.exit(main())
