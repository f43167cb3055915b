"""A session of the headline: it makes the runs that are missing until its time is up."""

from __future__ import annotations

import argparse
import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from rich.console import Console

from ditserve.bench.compare.results_store import Headline, PooledRuns, ResultsStore
from ditserve.bench.compare.runs import (
    BASIS,
    CAPACITY,
    CROWD,
    REFERENCE,
    SAME_CAPACITY,
    Run,
    Tuning,
    batch_tunings,
    cap_tunings,
    packed,
    planned_runs,
)
from ditserve.bench.compare.speed import SpeedReference
from ditserve.bench.compare.systems import (
    SYSTEMS,
    RunningServer,
    ServerFailed,
    ServerSetup,
    has_diffusers,
    running_server,
    served_bundle,
)
from ditserve.bench.load.adapters import Drawing
from ditserve.bench.load.generator import (
    ServerUnreachable,
    connect,
    offer_and_measure,
    rung_qualities,
    sender,
    unloaded,
)
from ditserve.bench.load.processes import Consumption
from ditserve.bench.load.summary import Exchange
from ditserve.bench.load.workload import Workload
from ditserve.bench.report import BackgroundLoad
from ditserve.model.sampling.prompt import read_prompts
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.network_config import own_config

LADDER = "emoji64"  # the ladder that `bench.peers.model` gives its bundle
# A run of offered requests lasts for so many of the longest promises, so that its start says little.
LEAST_PROMISES = 6
WARM_UP = 10  # requests of every run that do not count
SATURATED_REQUESTS, IN_FLIGHT = 48, 8
# Requests of a run by situation; the others have `--requests`.
REQUESTS = {"tuning": 34, "at once": CROWD, "saturated": SATURATED_REQUESTS, "alone": 24}
# The 99th percentile of a run's delays. They count as the server's latency, of about a second.
MAX_LAG_MS = 20.0
MAX_DRIFT = 1.3  # a run is void if the machine's speed changed by more
START_S = 20.0  # a guess of the seconds that a server takes to start and stop


class HeadlineSession:
    """Runs that are made, tuned and stored until `options.minutes` have passed."""

    def __init__(self, options: argparse.Namespace, store: ResultsStore, console: Console) -> None:
        self._options, self._store, self._console = options, store, console
        self._bundle = Bundle.open(served_bundle(options.model))
        manifest, own = self._bundle.manifest, not has_diffusers(options.model)
        own_config(manifest.name, manifest.config)
        drawing = Drawing.of(manifest, read_prompts(options.prompts) if options.prompts else ())
        self._setup = ServerSetup(options.model.absolute(), drawing, options.peers, options.threads)
        self._qualities = rung_qualities(manifest, manifest.name if own else LADDER)
        self._until = time.monotonic() + 60.0 * options.minutes

    async def run(self) -> bool:
        """Make all runs that are missing; return False if time was up before."""
        options = self._options
        for run in BASIS:
            if not await self._measure(run):
                return False
        for name in options.arms:
            if not await self._tune(name):
                return False
        for run in planned_runs(options.arms, options.loads, options.seeds):
            if not await self._measure(run):
                return False
        return True

    def headline(self) -> Headline:
        """Return the results so far."""
        options = self._options
        systems = [name for name in SYSTEMS if name in {*options.arms, REFERENCE, CAPACITY}]
        return self._store.headline(systems, options.loads, options.seeds, self._qualities)

    def pool(self, runs: Sequence[Run]) -> PooledRuns | None:
        return self._store.pool(runs, self._qualities)

    async def _tune(self, name: str) -> bool:
        """Choose a peer's batch and wait, then its cap; return False if time was up before."""
        runs = batch_tunings(name, SYSTEMS[name].tunings)
        if not runs or name in self._store.tuned:
            return True
        for run in runs:
            if not await self._measure(run):
                return False
        batch, wait_s, _ = self._best_tuning(runs)
        runs = cap_tunings(name, batch, wait_s)
        for run in runs:
            if not await self._measure(run):
                return False
        self._store.tuned[name] = self._best_tuning(runs)
        self._store.write()
        return True

    def _best_tuning(self, runs: Sequence[Run]) -> Tuning:
        """Return the tuning that answers most in time; among equals, the one with the lower p99."""

        def worth(run: Run) -> tuple[float, float]:
            if pool := self.pool([run]):
                return pool.summary.attainment, -(pool.summary.share_p99 or math.inf)
            return -1.0, 0.0

        best = max(runs, key=worth).tuning
        assert best is not None
        return best

    @cached_property
    def _speed(self) -> SpeedReference:
        return SpeedReference(self._bundle, threads=self._options.threads)

    def _slowdown(self) -> float:
        """Return the seconds of the reference pass now, divided by those of the first session."""
        now = self._speed.pass_s()
        self._store.pass_s = self._store.pass_s or now
        return now / self._store.pass_s

    async def _measure(self, run: Run) -> bool:
        """Make a missing run, after the run that gives its unit of load; return False if time is up."""
        if run.key in self._store.runs:
            return True
        scale = self._scale(run)
        if run.load and not self._store.unit(scale):
            if not await self._measure(Run("saturated", scale, seed=1)):
                return False
            if not self._store.unit(scale):
                self._console.print(f"{run.key}: left out, for the capacity of {scale} could not be told")
                return True
        if time.monotonic() + START_S + self._requests(run) / self._rate(run) > self._until:
            return False
        self._store.require_machine()
        try:
            figures = await self._execute(run)
            if figures["void"]:
                # One more try; after that it is for the next session.
                figures = await self._execute(run)
        except (ServerFailed, ServerUnreachable) as error:
            figures = {"failed": str(error), "void": True}
        self._store.add(run, figures)
        self._console.print(f"{run.key}: {self._description(run, figures)}")
        return True

    def _scale(self, run: Run) -> str:
        """Return the system whose capacity is a load of 1 for this run."""
        return run.system if run.situation == "own" and run.system not in SAME_CAPACITY else CAPACITY

    def _rate(self, run: Run) -> float:
        """Return the requests a second to offer; a guess for runs without a load."""
        return (run.load or 1.0) * (self._store.unit(self._scale(run)) or 1.0)

    def _requests(self, run: Run) -> int:
        """Return how many requests a run has; of a high load as many as come in some promised latencies."""
        asked: int = self._options.requests
        if run.situation in REQUESTS:
            return REQUESTS[run.situation]
        promised = self._store.promise()
        longest_s = max(map(promised.within, promised.unloaded), default=0.0)
        return max(asked, math.ceil(LEAST_PROMISES * longest_s * self._rate(run)))

    async def _execute(self, run: Run) -> dict[str, Any]:
        """Start a fresh server, measure it in the run's situation, and return the figures."""
        system = SYSTEMS[run.system]
        if tuning := run.tuning or self._store.tuned.get(run.system):
            batch, wait_s, cap = tuning
            system = replace(system, batch=batch, wait_s=wait_s, cap=cap)
        if run.situation in ("alone", "saturated", "own", "at once"):
            # The cap is for more requests than can be served.
            system = replace(system, cap=CROWD)
        background, before = BackgroundLoad(), self._slowdown()
        async with running_server(system, self._setup) as server:
            workload = run.workload(len(self._setup.drawing.conditions))
            match run.situation:
                case "alone":
                    figures = await _alone(server, workload)
                case "saturated":
                    figures = await _saturated(server, workload, run.seed)
                case _:
                    figures = await self._offered(server, workload, run, before)
        after = self._slowdown()
        if "exchanges" not in figures:
            # Offered requests went at the speed before the run; the rest counts at the mean of both speeds.
            figures = at_first_speed(figures, (before + after) / 2)
        drifted = max(before, after) > MAX_DRIFT * min(before, after)
        return {
            **figures,
            "void": figures["void"] or drifted,
            "slow": [round(before, 3), round(after, 3)],
            "neighbours": background.shares(),
        }

    async def _offered(
        self, server: RunningServer, workload: Workload, run: Run, slowdown: float
    ) -> dict[str, Any]:
        """Offer the run's requests, with times and promises stretched by the slowdown."""
        rate = self._rate(run)
        warm_up = 0 if run.situation == "at once" else WARM_UP
        requests = workload.draw(self._requests(run), rate / slowdown, run.seed)
        promise = replace(self._store.promise(), factor=self._options.slo * slowdown)
        async with connect(server.url) as http:
            await unloaded(workload, sender(http, server.adapter, None), probes=1)
            exchanges, costs = await offer_and_measure(
                http, server.adapter, requests, promise, pid=server.pid
            )
        counted = exchanges[warm_up:]
        lag = lag_p99_ms(counted)
        return {
            "rate": round(rate, 4),
            **costs,
            "void": lag > self._options.max_lag_ms,
            "lag_p99_ms": lag,
            "exchanges": [packed(exchange, slowdown) for exchange in counted],
        }

    def _description(self, run: Run, figures: dict[str, Any]) -> str:
        if "failed" in figures:
            return f"failed: {figures['failed'].splitlines()[-1]}"
        if figures["void"]:
            lag = f", requests left {figures['lag_p99_ms']:.1f} ms late" if "lag_p99_ms" in figures else ""
            return f"void: the pace went from {figures['slow'][0]} to {figures['slow'][1]}{lag}"
        if pool := self.pool([run]):
            summary = pool.summary
            p50 = "–" if summary.p50 is None else f"{summary.p50:.2f} s"
            return f"{summary.attainment:.1%} in time, {summary.refused:.1%} refused, p50 {p50}"
        return str(figures.get("alone") or f"{figures['images_per_s']:.2f} images/s")


async def _alone(server: RunningServer, workload: Workload) -> dict[str, Any]:
    """Return the seconds of each kind of request on the idle server."""
    async with connect(server.url) as http:
        times = await unloaded(workload, sender(http, server.adapter, None))
    return {"alone": [[kind.steps, kind.guided, seconds] for kind, seconds in times.items()], "void": False}


async def _saturated(server: RunningServer, workload: Workload, seed: int) -> dict[str, Any]:
    """Return the images a second with so many requests in flight that the machine never waits for one."""
    requests = iter(workload.draw(SATURATED_REQUESTS + IN_FLIGHT, 1.0, seed))
    ends: list[float] = []
    async with connect(server.url) as http:
        send = sender(http, server.adapter, None)

        async def client() -> None:
            for request in requests:
                status, _ = await send(request)
                if not 200 <= status < 300:
                    raise ServerUnreachable(f"a saturated server answered {status}")
                ends.append(time.perf_counter())

        await send(next(requests))
        before, began = Consumption.of(server.pid), time.perf_counter()
        await asyncio.gather(*(client() for _ in range(IN_FLIGHT)))
        after = Consumption.of(server.pid)
    # The end, when fewer requests are in flight, is left out.
    steady = sorted(ends)[-IN_FLIGHT]
    return {
        "images_per_s": (len(ends) - IN_FLIGHT + 1) / (steady - began),
        "processor_s_per_image": (after.processor_s - before.processor_s) / len(ends),
        "resident_mib": after.resident_mib,
        "void": False,
    }


def at_first_speed(figures: dict[str, Any], slowdown: float) -> dict[str, Any]:
    """Return the figures of an "alone" or "saturated" run at the speed of the first session."""
    if "alone" in figures:
        times = [[steps, guided, round(s / slowdown, 5)] for steps, guided, s in figures["alone"]]
        return {**figures, "alone": times}
    per_image = figures["processor_s_per_image"] / slowdown
    images_per_s = figures["images_per_s"] * slowdown
    return {**figures, "images_per_s": images_per_s, "processor_s_per_image": per_image}


def lag_p99_ms(exchanges: Sequence[Exchange]) -> float:
    """Return the milliseconds by which the latest hundredth of the requests left late."""
    lags = sorted(exchange.lag for exchange in exchanges)
    return 1000 * lags[min(len(lags) - 1, int(0.99 * len(lags)))]
