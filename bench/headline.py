"""The figures that decide: our service against others on this machine, on one model, one traffic and one promise.

    python -m bench.peers.model MODEL          once: the model that all serve
    python -m bench.headline MODEL --peers .peers/bin/python [--minutes 25] [--requests 163] [--seeds 1 2 3] [--loads .7 1.1 1.4 2 .9]
                             [--arms planner EDF …] [--threads 2] [--slo 3] [--name headline] [--fresh]

The pace of the machine is taken before and after every cell by passes through the model in this process, and all is told, offered
and promised in seconds of the first pace: where a pass takes 1.2 times as long, requests come 1.2 times as far apart and may take
1.2 times as long. A shared machine drifts by more than arms differ. Where it changed by 1.3 times in one cell, the cell is void.

Goes on where it was stopped: every cell is written as it ends to bench/results/<name>.json, and `--minutes` bounds one sitting, which
ends with the tables, on the terminal and in <name>.md, and <name>.png. Every cell has a fresh server. A load of 1 is the images
a second that our own service makes undegraded ("step FIFO", saturated), as found before any load was offered. The promise to every client is `--slo` times what `--promise-of` needs for such
a request alone: "diffusers + lock", or "step FIFO" for a promise that is easy to nobody. Peers are tuned first, on traffic of its
own: batch and wait at load 0.7, then the cap at 1.1. Latencies of the seeds are pooled: three runs of 163, 10 of which warm up,
are enough to tell a p99.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ditserve.bench.answers import Exchange, Promise, Summary
from ditserve.bench.cells import BASIS, CAPACITY, CROWD, REFERENCE, SAME, Cell, caps, grid, measured, packed
from ditserve.bench.consumption import Consumption
from ditserve.bench.findings import Findings, Mismatch
from ditserve.bench.headline_tables import View, curves, markdown, tables
from ditserve.bench.load import Unreachable, connect, qualities, sender, unloaded, watched
from ditserve.bench.pace import Pace
from ditserve.bench.plots import RESULTS, draw_headline
from ditserve.bench.record import Neighbours
from ditserve.bench.servers import ARMS, Place, ServerFailed, Serving, serving
from ditserve.bench.workload import Workload
from ditserve.model.spec.bundle import Bundle, BundleError, write_atomic

LADDER = "emoji"  # whose rungs, and what they cost in quality, the model was given
WARM_UP = 10  # requests of every run that do not count
TRIAL = 34  # requests of a run that tunes
SATURATED, IN_FLIGHT = 48, 8  # requests, and how many of them at once
REQUESTS = {"tuning": TRIAL, "at once": CROWD, "saturated": SATURATED, "alone": 24}
LAG_MS = 20.0  # the 99th percentile of a run's delays, which count as the server's, of about a second each
DRIFT = 1.3  # a run in which the machine's pace changed by more is void
START_S = 20.0  # a guess of what a server takes to come and go


class Sitting:
    """Measures cells until its time is up."""

    def __init__(self, options: argparse.Namespace, findings: Findings, console: Console) -> None:
        self._options, self._findings, self._console = options, findings, console
        self._place = Place(options.model.absolute(), options.peers, options.threads)
        manifest = Bundle.open(options.model / "bundle").manifest
        self._classes = len(manifest.factors[0].classes)
        self._distance, self._frechet = qualities(manifest, LADDER)
        self._until = time.monotonic() + 60.0 * options.minutes

    async def run(self) -> bool:
        """False if there was no time for all."""
        options = self._options
        for cell in BASIS:
            if not await self._measure(cell):
                return False
        for name in options.arms:
            if not await self._tune(name):
                return False
        for cell in measured(options.arms, options.loads, options.seeds):
            if not await self._measure(cell):
                return False
        return True

    async def _tune(self, name: str) -> bool:
        cells = grid(name, ARMS[name].grid)
        if not cells or name in self._findings.tuned:
            return True
        for cell in cells:
            if not await self._measure(cell):
                return False
        batch, wait_s, _ = self._best(cells)
        cells = caps(name, batch, wait_s)
        for cell in cells:
            if not await self._measure(cell):
                return False
        self._findings.tuned[name] = self._best(cells)
        self._findings.write()
        return True

    def _best(self, cells: Sequence[Cell]) -> tuple[int, float, int]:
        """The choice that answers most in time; of equals the one that is sooner at the 99th percentile."""

        def worth(cell: Cell) -> tuple[float, float]:
            summary = self.summary([cell])
            return (summary.attainment, -(summary.share_p99 or math.inf)) if summary else (-1.0, 0.0)

        best = max(cells, key=worth)
        assert best.choice is not None
        return best.choice

    def summary(self, cells: Sequence[Cell]) -> Summary | None:
        """What the exchanges of these cells come to, as far as they are there."""
        runs = self._findings.runs(cells)
        return (
            Summary.of(runs, self.promise, distance=self._distance, frechet=self._frechet) if runs else None
        )

    @property
    def promise(self) -> Promise:
        return Promise(self._findings.alone(self._options.promise_of), self._options.slo)

    @cached_property
    def _pace(self) -> Pace:
        return Pace(Bundle.open(self._options.model / "bundle"), threads=self._options.threads)

    def _slow(self) -> float:
        """How many times as long as at first this machine takes now."""
        now = self._pace.pass_s()
        self._findings.pass_s = self._findings.pass_s or now
        return now / self._findings.pass_s

    async def _measure(self, cell: Cell) -> bool:
        """False if there is no time for it."""
        if cell.key in self._findings.cells:
            return True
        scale = self._scale(cell)
        if cell.load and not self._findings.unit(scale):
            if not await self._measure(Cell("saturated", scale, seed=1)):
                return False
            if not self._findings.unit(scale):
                self._console.print(f"{cell.key}: left out, for the capacity of {scale} could not be told")
                return True
        if time.monotonic() + self._expected(cell) > self._until:
            return False
        self._findings.require_machine()
        try:
            found = await self._cell(cell)
            if found["void"]:
                found = await self._cell(cell)  # once more; then the next sitting may try
        except (ServerFailed, Unreachable) as error:
            found = {"failed": str(error), "void": True}
        self._findings.add(cell, found)
        self._console.print(f"{cell.key}: {self._line(cell, found)}")
        return True

    def _expected(self, cell: Cell) -> float:
        return START_S + self._requests(cell) / self._rate(cell)

    def _scale(self, cell: Cell) -> str:
        """The arm in whose capacity the cell's load is told."""
        return cell.arm if cell.situation == "own" and cell.arm not in SAME else CAPACITY

    def _rate(self, cell: Cell) -> float:
        """Requests a second to offer; a guess for cells without a load."""
        return (cell.load or 1.0) * (self._findings.unit(self._scale(cell)) or 1.0)

    def _requests(self, cell: Cell) -> int:
        asked: int = self._options.requests
        return REQUESTS.get(cell.situation, asked)

    async def _cell(self, cell: Cell) -> dict[str, Any]:
        arm = ARMS[cell.arm]
        choice = cell.choice or self._findings.tuned.get(cell.arm)
        if choice:
            batch, wait_s, cap = choice
            arm = replace(arm, batch=batch, wait_s=wait_s, cap=cap)
        if cell.situation in ("alone", "saturated", "own", "at once"):
            arm = replace(arm, cap=CROWD)  # the cap is for more than can be served
        neighbours, slow = Neighbours(), self._slow()
        async with serving(arm, self._place) as served:
            workload = cell.workload(self._classes)
            match cell.situation:
                case "alone":
                    found = await self._alone(served, workload)
                case "saturated":
                    found = await self._saturated(served, workload, cell.seed)
                case _:
                    found = await self._offered(served, workload, cell, slow)
        after = self._slow()
        drifted = max(slow, after) > DRIFT * min(slow, after)
        # What was sent by the clock went at the pace before; the rest counts at the mean of both.
        found = found if "exchanges" in found else paced(found, (slow + after) / 2)
        paces = [round(slow, 3), round(after, 3)]
        void = found["void"] or drifted
        return {**found, "void": void, "slow": paces, "neighbours": neighbours.told()}

    async def _alone(self, served: Serving, workload: Workload) -> dict[str, Any]:
        async with connect(served.url) as http:
            found = await unloaded(workload, sender(http, served.adapter, None))
        times = [[kind.steps, kind.guided, seconds] for kind, seconds in found.items()]
        return {"alone": times, "void": False}

    async def _saturated(self, served: Serving, workload: Workload, seed: int) -> dict[str, Any]:
        """Images a second with so many requests in flight that the machine never waits for one."""
        asked = iter(workload.draw(SATURATED + IN_FLIGHT, 1.0, seed))
        async with connect(served.url) as http:
            send = sender(http, served.adapter, None)

            async def client(ends: list[float]) -> None:
                for each in asked:
                    status, _ = await send(each)
                    if not 200 <= status < 300:
                        raise Unreachable(f"a saturated server answered {status}")
                    ends.append(time.perf_counter())

            await send(next(asked))
            before, began = Consumption.of(served.pid), time.perf_counter()
            ends: list[float] = []
            await asyncio.gather(*(client(ends) for _ in range(IN_FLIGHT)))
            after = Consumption.of(served.pid)
        # From the first moment to the last at which all were in flight: the end, when fewer are, says nothing.
        steady = sorted(ends)[-IN_FLIGHT]
        return {
            "images_per_s": (len(ends) - IN_FLIGHT + 1) / (steady - began),
            "processor_s_per_image": (after.processor_s - before.processor_s) / len(ends),
            "resident_mib": after.resident_mib,
            "void": False,
        }

    async def _offered(self, served: Serving, workload: Workload, cell: Cell, slow: float) -> dict[str, Any]:
        rate = self._rate(cell)
        warm_up = 0 if cell.situation == "at once" else WARM_UP
        asked = workload.draw(self._requests(cell), rate / slow, cell.seed)
        promise = replace(self.promise, factor=self._options.slo * slow)
        async with connect(served.url) as http:
            await unloaded(workload, sender(http, served.adapter, None), probes=1)
            exchanges, used = await watched(http, served.adapter, asked, promise, pid=served.pid)
        kept = exchanges[warm_up:]
        lag = late(kept)
        return {
            "rate": round(rate, 4),
            **used,
            "void": lag > self._options.max_lag_ms,
            "lag_p99_ms": lag,
            "exchanges": [packed(each, slow) for each in kept],
        }

    def _line(self, cell: Cell, found: dict[str, Any]) -> str:
        if "failed" in found:
            return f"failed: {found['failed'].splitlines()[-1]}"
        if found["void"]:
            lag = f", requests left {found['lag_p99_ms']:.1f} ms late" if "lag_p99_ms" in found else ""
            return f"void: the pace went from {found['slow'][0]} to {found['slow'][1]}{lag}"
        if summary := self.summary([cell]):
            p50 = "–" if summary.p50 is None else f"{summary.p50:.2f} s"
            return f"{summary.attainment:.1%} in time, {summary.refused:.1%} refused, p50 {p50}"
        return str(found.get("alone") or f"{found['images_per_s']:.2f} images/s")


def paced(found: dict[str, Any], slow: float) -> dict[str, Any]:
    """What was found alone or saturated, as at the first pace."""
    if "alone" in found:
        return {
            **found,
            "alone": [[steps, guided, round(s / slow, 5)] for steps, guided, s in found["alone"]],
        }
    per_image = found["processor_s_per_image"] / slow
    return {**found, "images_per_s": found["images_per_s"] * slow, "processor_s_per_image": per_image}


def late(exchanges: Sequence[Exchange]) -> float:
    """By how many milliseconds the latest hundredth of requests left late."""
    lags = sorted(each.lag for each in exchanges)
    return 1000 * lags[min(len(lags) - 1, int(0.99 * len(lags)))]


def view(sitting: Sitting, findings: Findings, options: argparse.Namespace) -> View:
    order = [name for name in ARMS if name in {*options.arms, REFERENCE, CAPACITY}]
    return View(findings, sitting.summary, order, options.loads, options.seeds)


def report(found: Sequence[Table], name: str) -> str:
    """<name>.md."""
    head = [
        "# What `python -m bench.headline` found",
        f"Its docstring says what the words mean; every exchange is in [{name}.json]({name}.json).",
        f"![What became of requests over the load]({name}.png)",
    ]
    return "\n\n".join([*head, *map(markdown, found)]) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.headline", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder that bench.peers.model wrote")
    parser.add_argument(
        "--peers", type=Path, default=Path(".peers/bin/python"), help="the peers' interpreter"
    )
    parser.add_argument("--minutes", type=float, default=25.0, help="of this sitting")
    parser.add_argument("--requests", type=int, default=163, help=f"of a run, {WARM_UP} of them to warm up")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.7, 1.1, 1.4, 2.0, 0.9, 0.5])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--threads", type=int, default=2, help="compute threads of every server")
    parser.add_argument(
        "--slo", type=float, default=3.0, help="promised latency, in those of --promise-of alone"
    )
    parser.add_argument("--promise-of", choices=(REFERENCE, CAPACITY), default=REFERENCE)
    parser.add_argument("--max-lag-ms", type=float, default=LAG_MS, help="beyond this a run is void")
    parser.add_argument("--name", default="headline", help="of the files in bench/results")
    parser.add_argument("--fresh", action="store_true", help="forget what was found before")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, console = parse(arguments), Console(width=180)
    path = RESULTS / f"{options.name}.json"
    settings = {name: getattr(options, name) for name in ("requests", "threads", "slo", "promise_of")}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a server that runs is stopped on the way out
    try:
        findings = Findings(path, settings, fresh=options.fresh)
        sitting = Sitting(options, findings, Console(stderr=True, width=180))
        whole = asyncio.run(sitting.run())
    except (BundleError, Mismatch) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    shown = view(sitting, findings, options)
    for table in tables(shown):
        console.print(table)
    draw_headline(curves(shown), path.with_suffix(".png"))
    write_atomic(path.with_suffix(".md"), report(tables(shown), options.name).encode())
    if not whole:
        console.print("not all was measured: the same command goes on from here")
    return 0


if __name__ == "__main__":
    sys.exit(main())
