"""What our generators of load measure, beside what those of others do, in turns against the same servers.

    apt-get install wrk && npm install --ignore-scripts --prefix .artillery artillery@2
    python -m bench.crosscheck [--artillery .artillery/node_modules/.bin/artillery] [--bundle model/zoo/emoji] [--rounds 3]

`bench.wire`, which `bench.overhead_http` asks with, beside wrk: so many clients, each asking again as soon as it is answered, of a
service whose network computes nothing. `bench.load`, which the headline asks with, beside Artillery: requests at even distances
that wait for no answer, of the service with its network. Writes bench/results/crosscheck.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ditserve.bench import overhead_http
from ditserve.bench.adapters import ADAPTERS
from ditserve.bench.load import connect, offer, sender
from ditserve.bench.record import Neighbours, save
from ditserve.bench.site import opened
from ditserve.bench.wire import exchange, post
from ditserve.bench.workload import Asked, Kind
from ditserve.model.spec.errors import ModelError
from ditserve.service.settings import Settings

ADAPTER = ADAPTERS["service-undated"]
BUSY, CALM = "asking again when answered", "evenly, without waiting"
STEPS = 20
WARM = 200  # requests of the service without a network
Figures = dict[str, float]  # requests a second, and milliseconds
Found = dict[str, Any]  # these, and of which load and tool
Tools = dict[str, Callable[[], Awaitable[Figures]]]

WRK = """\
wrk.method, wrk.body = "POST", %s
wrk.headers["content-type"], wrk.headers["accept"] = "application/json", "image/png"
function done(summary, latency, requests)
  local wrong = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status + summary.errors.timeout
  io.stderr:write(string.format('{"per_s": %%f, "p50_ms": %%f, "p95_ms": %%f, "wrong": %%d}',
    summary.requests / summary.duration * 1e6, latency:percentile(50) / 1e3, latency:percentile(95) / 1e3, wrong))
end
"""


class ToolFailed(ModelError):
    """Another's generator is not there or ended in error, or requests were not answered; the message is one sentence."""


def body(steps: int) -> Mapping[str, Any]:
    return ADAPTER.body(Asked(0.0, Kind(steps, True), 0, 0), None)


def wrk(url: str, folder: Path, *, connections: int, seconds: float) -> Figures:
    """Raises `ToolFailed`."""
    script = folder / "post.lua"
    script.write_text(WRK % json.dumps(json.dumps(body(1))))
    words = ["-t1", f"-c{connections}", f"-d{seconds:g}s", "-s", str(script), f"{url}/generate"]
    return _clean("wrk", json.loads(_run("wrk", words).stderr))


def artillery(tool: str, url: str, folder: Path, *, rate: float, requests: int) -> Figures:
    """Raises `ToolFailed`."""
    script, out = folder / "evenly.json", folder / "found.json"
    ask = {"url": ADAPTER.path, "json": body(STEPS), "headers": dict(ADAPTER.headers)}
    config = {
        "target": url,
        "phases": [{"duration": requests / rate, "arrivalRate": rate}],
        "http": {"timeout": 120},
    }
    script.write_text(json.dumps({"config": config, "scenarios": [{"flow": [{"post": ask}]}]}))
    _run(tool, ["run", "--quiet", "--output", str(out), str(script)])
    found = json.loads(out.read_text())["aggregate"]
    counted, times = found["counters"], found["summaries"]["http.response_time"]
    wrong = counted["vusers.created"] - counted.get("http.codes.200", 0)
    return _clean(
        "Artillery", {"per_s": rate, "p50_ms": times["p50"], "p95_ms": times["p95"], "wrong": wrong}
    )


def _run(tool: str, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = ["env", "ARTILLERY_DISABLE_TELEMETRY=true", tool, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ToolFailed(f"{tool} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return done


def _clean(tool: str, found: dict[str, float]) -> Figures:
    """Raises `ToolFailed` if a request was not answered with an image."""
    if wrong := found.pop("wrong"):
        raise ToolFailed(f"{tool}: {wrong:g} requests were not answered with an image")
    return found


async def ours_busy(port: int, *, connections: int, n: int) -> Figures:
    asking = repeat(post("/generate", body(1), accept="image/png"))
    found = await exchange(port, asking, connections=connections, n=n)
    return {"per_s": found.per_s, "p50_ms": found.milliseconds(50), "p95_ms": found.milliseconds(95)}


async def ours_evenly(url: str, *, rate: float, requests: int) -> Figures:
    """Raises `ToolFailed` if a request was not answered with an image."""
    asked = [Asked(k / rate, Kind(STEPS, True), 0, 0) for k in range(requests)]
    async with connect(url) as http:
        exchanges = await offer(asked, sender(http, ADAPTER, None))
    times = [1e3 * (each.ended - each.asked.at) for each in exchanges]
    p50, p95 = np.percentile(times, (50, 95)).tolist()
    wrong = sum(each.told is None for each in exchanges)
    return _clean("ditserve.bench.load", {"per_s": rate, "p50_ms": p50, "p95_ms": p95, "wrong": wrong})


async def run(options: argparse.Namespace, console: Console) -> list[Found]:
    with tempfile.TemporaryDirectory(prefix="dit-") as name:
        folder = Path(name)
        async with overhead_http.serving(options.bundle) as site:
            url, clients, seconds = site.url, options.connections, options.seconds
            port, n = int(url.rpartition(":")[2]), round(seconds * overhead_http.GOAL_PER_S)
            await ours_busy(port, connections=1, n=WARM)
            tools: Tools = {
                "ditserve.bench.wire": lambda: ours_busy(port, connections=clients, n=n),
                "wrk": lambda: asyncio.to_thread(wrk, url, folder, connections=clients, seconds=seconds),
            }
            found = await turns(BUSY, tools, options.rounds, console)
        settings = Settings.parse([f"--bundle={options.bundle}", "--log-level=warning"])
        async with opened(folder, settings, workers=1, durable=False) as site:
            url, evenly = site.url, {"rate": options.rate, "requests": options.requests}
            await ours_evenly(url, rate=1.0, requests=2)
            tools = {
                "ditserve.bench.load": lambda: ours_evenly(url, **evenly),
                "Artillery": lambda: asyncio.to_thread(artillery, options.artillery, url, folder, **evenly),
            }
            return found + await turns(CALM, tools, options.rounds, console)


async def turns(load: str, tools: Tools, rounds: int, console: Console) -> list[Found]:
    """What each tool measured in every round; the order of the tools turns from one to the next."""
    found: list[Found] = []
    for k in track(range(rounds), load, console=console, transient=True):
        for tool in list(tools)[:: -1 if k % 2 else 1]:
            figures = await tools[tool]()
            found.append({"load": load, "tool": tool, **figures})
    return found


def summary(found: Sequence[Found]) -> list[Found]:
    """Medians over the rounds, by load and tool."""
    pairs = sorted({(each["load"], each["tool"]) for each in found})
    return [
        {"load": load, "tool": tool}
        | {
            name: float(np.median([e[name] for e in found if (e["load"], e["tool"]) == (load, tool)]))
            for name in ("per_s", "p50_ms", "p95_ms")
        }
        for load, tool in pairs
    ]


def _table(medians: Sequence[Found], rounds: int) -> Table:
    table = Table(title=f"medians of {rounds} rounds")
    for column in ("clients", "tool", "requests/s", "p50 ms", "p95 ms"):
        table.add_column(column, justify="left" if column in ("clients", "tool") else "right")
    for each in medians:
        figures = (f"{each[name]:.1f}" for name in ("per_s", "p50_ms", "p95_ms"))
        table.add_row(each["load"], each["tool"], *figures)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.crosscheck", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--artillery", default=".artillery/node_modules/.bin/artillery", help="the program")
    parser.add_argument("--bundle", type=Path, default=Path("model/zoo/emoji"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=16, help="clients that ask again when answered")
    parser.add_argument("--seconds", type=float, default=5.0, help="that these ask, in each round")
    parser.add_argument("--rate", type=float, default=2.0, help="even requests a second")
    parser.add_argument("--requests", type=int, default=60, help="of these, in each round")
    options, console, neighbours = parser.parse_args(arguments), Console(), Neighbours()
    try:
        for tool in ("wrk", options.artillery):
            if shutil.which(tool) is None:
                raise ToolFailed(f"there is no {tool}: this module's docstring says how to install it")
        found = asyncio.run(run(options, console))
    except ToolFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    medians = summary(found)
    console.print(_table(medians, options.rounds))
    save("crosscheck", vars(options), neighbours, {"medians": medians, "rounds": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
