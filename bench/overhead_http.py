"""What the service costs beside the network: requests through HTTP, Redis and a worker whose network computes nothing.

    python -m bench.overhead_http [--bundle model/zoo/emoji] [--rounds 5] [--requests 1000] [--connections 16] [--steps 1]

A real API process, a Valkey that keeps nothing on disk, as in the all-in-one, and a worker with everything but a network
(`bench.noop_worker`). In every round one client asks by itself for the latency, then so many clients at once for the throughput; the
same is asked of a plain ASGI application under the same server (`bench.echo`), so that the ratio says what the machine cannot.
Writes bench/results/overhead_http.{json,png}.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ditserve.bench.plots import RESULTS, draw_shares
from ditserve.bench.record import Neighbours, save
from ditserve.bench.site import Site, free_port, opened, processor_seconds
from ditserve.bench.wire import Exchanges, Wire, exchange, post
from ditserve.model.spec.bundle import Bundle, Manifest
from ditserve.service.launch.child_process import Child
from ditserve.service.settings import Settings

NOOP, ECHO = "no-op service", "plain ASGI echo"
GOAL_MS, GOAL_PER_S = 3.0, 300.0
WARM = 200  # requests
TRIES = 500
PAUSE_S = 0.02


@dataclass(frozen=True, slots=True)
class Round:
    """One round against one server. Milliseconds are of one client alone; processor milliseconds are per request, by process."""

    server: str
    p50_ms: float
    p95_ms: float
    p99_ms: float
    per_s: float
    busy_p50_ms: float
    processor_ms: dict[str, float]


def requests(manifest: Manifest, *, steps: int, seed: int) -> Iterator[bytes]:
    """An endless mix of conditions and seeds, each for one small image file."""
    rng, factor = random.Random(seed), manifest.factors[0]
    while True:
        body = {
            "condition": {factor.name: rng.choice(factor.classes)},
            "seed": rng.randrange(2**31),
            "steps": steps,
            "guidance_scale": 1.0,
        }
        yield post("/generate", body, accept="image/png")


async def measure(
    server: str,
    port: int,
    pids: dict[str, int],
    asking: Iterator[bytes],
    *,
    n: int,
    connections: int,
) -> Round:
    """`n` requests by one client, then `n` by so many at once."""
    alone = await exchange(port, asking, connections=1, n=n)
    before = {name: processor_seconds(pid) for name, pid in pids.items()}
    together = await exchange(port, asking, connections=connections, n=n)
    spent = {name: 1e3 * (processor_seconds(pid) - before[name]) / n for name, pid in pids.items()}
    return _round(server, alone, together, spent)


def _round(server: str, alone: Exchanges, together: Exchanges, spent: dict[str, float]) -> Round:
    p50, p95, p99 = (alone.milliseconds(percent) for percent in (50, 95, 99))
    return Round(server, p50, p95, p99, together.per_s, together.milliseconds(50), spent)


@asynccontextmanager
async def echoing() -> AsyncIterator[tuple[int, Child]]:
    """The plain application on a port of its own."""
    port = free_port()
    flags = ["--port", str(port), "--no-access-log", "--log-level", "warning"]
    child = await Child.start("echo", [sys.executable, "-m", "uvicorn", "ditserve.bench.echo:app", *flags])
    try:
        for _ in range(TRIES):
            try:
                await (await Wire.open(port)).aclose()
                break
            except OSError:
                await asyncio.sleep(PAUSE_S)
        yield port, child
    finally:
        await child.stop(5.0)


@asynccontextmanager
async def serving(bundle: Path, *, workers: int = 1) -> AsyncIterator[Site]:
    """The service with workers whose network computes nothing."""
    settings = Settings.parse([f"--bundle={bundle}", "--log-level=warning", "--no-verify"])
    with tempfile.TemporaryDirectory(prefix="dit-") as folder:
        async with opened(
            Path(folder), settings, workers=workers, durable=False, worker=("ditserve.bench.noop_worker",)
        ) as site:
            yield site


async def run(options: argparse.Namespace, console: Console) -> list[Round]:
    manifest = Bundle.open(options.bundle, verify=False).manifest
    asking = requests(manifest, steps=options.steps, seed=options.seed)
    rounds = []
    async with serving(options.bundle) as site, echoing() as (echo_port, echo):
        port = int(site.url.rpartition(":")[2])
        pids = {"API": site.pid("api"), "worker": site.pid("worker-0"), "Valkey": site.pid("valkey")}
        servers = {NOOP: (port, pids), ECHO: (echo_port, {"server": echo.pid})}
        for place, _ in servers.values():
            await exchange(place, asking, connections=1, n=WARM)
        for _ in track(range(options.rounds), "rounds", console=console, transient=True):
            for server, (place, processes) in servers.items():
                rounds.append(
                    await measure(
                        server,
                        place,
                        processes,
                        asking,
                        n=options.requests,
                        connections=options.connections,
                    )
                )
    return rounds


def summary(rounds: Sequence[Round]) -> dict[str, dict[str, float]]:
    """Medians over the rounds by server, and of the ratios within each round."""
    found: dict[str, dict[str, float]] = {}
    for server in dict.fromkeys(each.server for each in rounds):
        mine = [each for each in rounds if each.server == server]
        names = ("p50_ms", "p95_ms", "p99_ms", "per_s", "busy_p50_ms")
        found[server] = {name: float(np.median([getattr(each, name) for each in mine])) for name in names}
        for process in mine[0].processor_ms:
            share = float(np.median([each.processor_ms[process] for each in mine]))
            found[server][f"{process} processor ms"] = share
    pairs = zip(rounds[::2], rounds[1::2], strict=True)
    found["ratio"] = {"per_s": float(np.median([noop.per_s / echo.per_s for noop, echo in pairs]))}
    return found


def _table(found: dict[str, dict[str, float]], options: argparse.Namespace) -> Table:
    table = Table(
        title=f"{options.requests} requests of {options.steps} step(s), medians of {options.rounds} rounds; "
        f"goals: p50 ≤ {GOAL_MS:g} ms alone, ≥ {GOAL_PER_S:g} requests/s"
    )
    for column in ("", NOOP, ECHO):
        table.add_column(column, justify="right" if column else "left")
    rows = {"p50_ms": "alone: p50 ms", "p95_ms": "p95 ms", "p99_ms": "p99 ms"}
    rows |= {"per_s": f"{options.connections} clients: requests/s", "busy_p50_ms": "p50 ms"}
    rows |= {name: f"{name} a request" for name in found[NOOP] if name.endswith("processor ms")}
    for name, title in rows.items():
        table.add_row(
            title, *(f"{found[each][name]:.2f}" if name in found[each] else "" for each in (NOOP, ECHO))
        )
    return table


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.overhead_http", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--bundle", type=Path, default=Path("model/zoo/emoji"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1000, help="of a measurement; a p99 needs 459")
    parser.add_argument("--connections", type=int, default=16, help="clients at once, for the throughput")
    parser.add_argument("--steps", type=int, default=1, help="of a request")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, console, neighbours = parse(arguments), Console(), Neighbours()
    rounds = asyncio.run(run(options, console))
    found = summary(rounds)
    console.print(_table(found, options))
    figures = {"medians": found, "rounds": [asdict(each) for each in rounds]}
    save("overhead_http", vars(options), neighbours, figures)
    processes = {
        name.removesuffix(" processor ms"): value
        for name, value in found[NOOP].items()
        if "processor" in name
    }
    draw_shares(processes, "processor ms a request", RESULTS / "overhead_http.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
