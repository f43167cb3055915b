"""Measure what the service costs beside the network, with a network that computes nothing.

    python -m bench.overhead_http [--bundle model/zoo/emoji64] [--rounds 5] [--requests 1000] [--steps 1]
        [--connections 16]

A real API process, a Valkey that keeps nothing on disk, as in the all-in-one service, and a worker with
everything but a network (`bench.load.noop_worker`). In every round one client asks by itself for the latency,
then `--connections` clients at once for the throughput. The same is asked of a plain ASGI application under
the same server (`bench.load.echo`), so that the ratio leaves the machine's speed out. Writes
bench/results/overhead_http.{json,png}.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ditserve.bench import report
from ditserve.bench.load.cluster import TestCluster, running_cluster
from ditserve.bench.load.processes import free_port, processor_seconds
from ditserve.bench.load.wire import Wire, exchange, post
from ditserve.bench.plots import draw_bars
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.manifest import Manifest
from ditserve.service.launch.child_process import Child
from ditserve.service.launch.valkey import scratch_folder
from ditserve.service.settings import Settings

NOOP, ECHO = "no-op service", "plain ASGI echo"
GOAL_MS, GOAL_PER_S = 3.0, 300.0
WARM_UP_REQUESTS = 200
READY_TRIES, POLL_S = 500, 0.02


@dataclass(frozen=True, slots=True)
class OverheadRound:
    """One round against one server.

    `p50_ms` to `p99_ms` are of one client alone, `per_s` and `busy_p50_ms` of many at once; `processor_ms` is
    per request, by process.
    """

    server: str
    p50_ms: float
    p95_ms: float
    p99_ms: float
    per_s: float
    busy_p50_ms: float
    processor_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class ServerProcesses:
    """A server's port, and its processes by name."""

    port: int
    pids: Mapping[str, int]


def mixed_requests(manifest: Manifest, *, steps: int, seed: int) -> Iterator[bytes]:
    """Yield an endless mix of conditions and seeds, each for one small image file."""
    rng, factor = random.Random(seed), manifest.factors[0]
    while True:
        body = {
            "condition": {factor.name: rng.choice(factor.classes)},
            "seed": rng.randrange(2**31),
            "steps": steps,
            "guidance_scale": 1.0,
        }
        yield post("/generate", body, accept="image/png")


async def measure_round(
    name: str, server: ServerProcesses, requests: Iterator[bytes], *, n: int, connections: int
) -> OverheadRound:
    """Send `n` requests by one client, then `n` by several at once."""
    alone = await exchange(server.port, requests, connections=1, n=n)
    before = {process: processor_seconds(pid) for process, pid in server.pids.items()}
    together = await exchange(server.port, requests, connections=connections, n=n)
    spent = {
        process: 1e3 * (processor_seconds(pid) - before[process]) / n for process, pid in server.pids.items()
    }
    p50, p95, p99 = (alone.milliseconds(percent) for percent in (50, 95, 99))
    return OverheadRound(name, p50, p95, p99, together.per_s, together.milliseconds(50), spent)


@asynccontextmanager
async def running_echo() -> AsyncIterator[ServerProcesses]:
    """Run the plain ASGI application on a port of its own."""
    port = free_port()
    flags = ["--port", str(port), "--no-access-log", "--log-level", "warning"]
    words = [sys.executable, "-m", "uvicorn", "ditserve.bench.load.echo:app", *flags]
    child = await Child.start("echo", words)
    try:
        for _ in range(READY_TRIES):
            try:
                await (await Wire.open(port)).aclose()
                break
            except OSError:
                await asyncio.sleep(POLL_S)
        yield ServerProcesses(port, {"server": child.pid})
    finally:
        await child.stop(5.0)


@asynccontextmanager
async def running_noop_service(bundle: Path, *pace: str, workers: int = 1) -> AsyncIterator[TestCluster]:
    """Run the service with workers whose network computes nothing; `pace` are flags of `noop_worker`."""
    settings = Settings.parse([f"--bundle={bundle}", "--log-level=warning", "--no-verify"])
    worker = ("ditserve.bench.load.noop_worker", *pace)
    with scratch_folder() as name:
        folder = Path(name)
        async with running_cluster(
            folder, settings, workers=workers, durable=False, worker=worker
        ) as cluster:
            yield cluster


async def measure(options: argparse.Namespace, console: Console) -> list[OverheadRound]:
    """Measure both servers in turns."""
    manifest = Bundle.open(options.bundle, verify=False).manifest
    requests = mixed_requests(manifest, steps=options.steps, seed=options.seed)
    rounds = []
    async with running_noop_service(options.bundle) as cluster, running_echo() as echo:
        pids = {"API": cluster.pid("api"), "worker": cluster.pid("worker-0"), "Valkey": cluster.pid("valkey")}
        servers = {NOOP: ServerProcesses(cluster.port, pids), ECHO: echo}
        for server in servers.values():
            await exchange(server.port, requests, connections=1, n=WARM_UP_REQUESTS)
        for _ in track(range(options.rounds), "rounds", console=console, transient=True):
            for name, server in servers.items():
                measured = await measure_round(
                    name, server, requests, n=options.requests, connections=options.connections
                )
                rounds.append(measured)
    return rounds


def medians(rounds: Sequence[OverheadRound]) -> dict[str, dict[str, float]]:
    """Return the medians over the rounds by server, and the median of the ratios within each round."""
    by_server: dict[str, dict[str, float]] = {}
    for server in dict.fromkeys(measured.server for measured in rounds):
        mine = [measured for measured in rounds if measured.server == server]
        names = ("p50_ms", "p95_ms", "p99_ms", "per_s", "busy_p50_ms")
        by_server[server] = {name: float(np.median([getattr(r, name) for r in mine])) for name in names}
        for process in mine[0].processor_ms:
            median = float(np.median([measured.processor_ms[process] for measured in mine]))
            by_server[server][f"{process} processor ms"] = median
    pairs = zip(rounds[::2], rounds[1::2], strict=True)
    by_server["ratio"] = {"per_s": float(np.median([noop.per_s / echo.per_s for noop, echo in pairs]))}
    return by_server


def processor_times(by_server: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the processor milliseconds of a request to the no-op service, by process."""
    suffix = " processor ms"
    return {name.removesuffix(suffix): ms for name, ms in by_server[NOOP].items() if name.endswith(suffix)}


def medians_table(by_server: Mapping[str, Mapping[str, float]], options: argparse.Namespace) -> Table:
    title = (
        f"{options.requests} requests of {options.steps} step(s), medians of {options.rounds} rounds; "
        f"goals: p50 ≤ {GOAL_MS:g} ms alone, ≥ {GOAL_PER_S:g} requests/s"
    )
    names = {"p50_ms": "alone: p50 ms", "p95_ms": "p95 ms", "p99_ms": "p99 ms"}
    names |= {"per_s": f"{options.connections} clients: requests/s", "busy_p50_ms": "p50 ms"}
    names |= {name: f"{name} a request" for name in by_server[NOOP] if name.endswith("processor ms")}
    rows = [
        [
            shown,
            *(
                f"{by_server[server][name]:.2f}" if name in by_server[server] else ""
                for server in (NOOP, ECHO)
            ),
        ]
        for name, shown in names.items()
    ]
    return report.table(title, ["", NOOP, ECHO], rows, text={""})


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = report.parser("overhead_http", __doc__)
    parser.add_argument("--bundle", type=Path, default=report.DEFAULT_BUNDLE)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1000, help="of a measurement; a p99 needs 459")
    parser.add_argument("--connections", type=int, default=16, help="clients at once, for the throughput")
    parser.add_argument("--steps", type=int, default=1, help="of a request")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, console, background = parse(arguments), Console(), report.BackgroundLoad()

    def work() -> None:
        rounds = asyncio.run(measure(options, console))
        by_server = medians(rounds)
        console.print(medians_table(by_server, options))
        figures = {"medians": by_server, "rounds": [asdict(measured) for measured in rounds]}
        report.save("overhead_http", options, background, figures)
        figure = report.result_path("overhead_http.png")
        draw_bars(processor_times(by_server), "processor ms a request", figure)

    return report.run_command("overhead_http", work)


if __name__ == "__main__":
    sys.exit(main())
