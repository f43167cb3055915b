"""The faults, and the log of a run in which they happen."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ditserve.bench.chaos.clients import RequestOutcome
from ditserve.bench.load.cluster import TestCluster

LEASE_S = 2.0
RECOVERED_SHARE = 0.8  # of the faults are recovered from before the next one
REFUSED = {"overloaded"}  # ends of requests that were never accepted


async def _kill_worker(cluster: TestCluster, rng: random.Random) -> None:
    """Kill a worker as a fault in a native library would: its jobs wait for their leases to end."""
    cluster.signal(rng.choice(cluster.workers), signal.SIGKILL)


async def _drain_worker(cluster: TestCluster, rng: random.Random) -> None:
    """Stop a worker as a new release would: it hands its jobs back with what is done of them."""
    cluster.signal(rng.choice(cluster.workers), signal.SIGTERM)


async def _freeze_worker(cluster: TestCluster, rng: random.Random) -> None:
    """Freeze a worker for longer than its leases: others take its jobs, and its reports come too late."""
    await _freeze(cluster, rng.choice(cluster.workers), LEASE_S * (1.2 + rng.random()))


async def _kill_valkey(cluster: TestCluster, rng: random.Random) -> None:
    cluster.signal("valkey", signal.SIGKILL)


async def _freeze_valkey(cluster: TestCluster, rng: random.Random) -> None:
    """Freeze the queue: connections stay open, and no answers come."""
    await _freeze(cluster, "valkey", 1 + 3 * rng.random())


async def _kill_api(cluster: TestCluster, rng: random.Random) -> None:
    cluster.signal("api", signal.SIGKILL)


async def _restart_api(cluster: TestCluster, rng: random.Random) -> None:
    cluster.signal("api", signal.SIGTERM)


async def _freeze(cluster: TestCluster, name: str, seconds: float) -> None:
    cluster.signal(name, signal.SIGSTOP)
    await asyncio.sleep(seconds)
    cluster.signal(name, signal.SIGCONT)


Fault = Callable[[TestCluster, random.Random], Awaitable[None]]
# Faults by name, each with its frequency relative to the others.
FAULTS: dict[str, tuple[Fault, int]] = {
    "worker killed": (_kill_worker, 4),
    "worker drained": (_drain_worker, 3),
    "worker frozen": (_freeze_worker, 2),
    "Valkey killed": (_kill_valkey, 2),
    "Valkey frozen": (_freeze_valkey, 2),
    "API killed": (_kill_api, 2),
    "API restarted": (_restart_api, 1),
}


@dataclass(slots=True)
class ChaosLog:
    """Everything that happened: the faults by time, every request, and what the audit of the jobs found."""

    faults: list[tuple[float, str]] = field(default_factory=list)
    outcomes: list[RequestOutcome] = field(default_factory=list)
    duplicated: int = 0
    attempts: Counter[int] = field(default_factory=Counter)

    @property
    def accepted(self) -> list[RequestOutcome]:
        return [outcome for outcome in self.outcomes if outcome.end not in REFUSED]

    def recovery_seconds(self) -> list[float]:
        """Return, for every fault, the seconds until all requests open at that moment had their answer."""
        waits = []
        for at, _ in self.faults:
            ends = [o.ended_at for o in self.outcomes if o.asked_at < at < o.ended_at]
            waits.append(max(ends, default=at) - at)
        return waits

    def summary(self) -> dict[str, Any]:
        matches = Counter(outcome.match for outcome in self.outcomes if outcome.end == "done")
        recovery = self.recovery_seconds() or [0.0]
        percentiles = {f"p{q}": round(float(np.percentile(recovery, q)), 2) for q in (50, 90, 99)}
        return {
            "requests": len(self.outcomes),
            "accepted": len(self.accepted),
            "lost": sum(outcome.end == "lost" for outcome in self.accepted),
            "duplicated": self.duplicated,
            "wrong_images": matches["wrong"],
            "unexplained_answers": sum(outcome.unexplained for outcome in self.outcomes),
            "ends": dict(Counter(outcome.end for outcome in self.outcomes).most_common()),
            "images": dict(matches),
            "ways": dict(Counter(outcome.way for outcome in self.outcomes)),
            "attempts": {str(n): count for n, count in sorted(self.attempts.items())},
            "faults": dict(Counter(name for _, name in self.faults).most_common()),
            "recovery_s": {**percentiles, "max": round(max(recovery), 2)},
        }


async def cause_faults(cluster: TestCluster, log: ChaosLog, rng: random.Random, seconds: float) -> None:
    """Cause one fault after another, one of each kind first.

    Mostly the next fault waits until all processes are up and have worked a little; now and then it does not.
    """
    until = time.monotonic() + seconds
    weights = [weight for _, weight in FAULTS.values()]
    first = rng.sample(list(FAULTS), len(FAULTS))
    while time.monotonic() < until:
        name = first.pop() if first else rng.choices(list(FAULTS), weights)[0]
        log.faults.append((time.time(), name))
        await FAULTS[name][0](cluster, rng)
        if rng.random() < RECOVERED_SHARE:
            await cluster.wait_ready()
        await asyncio.sleep(0.5 + 3 * rng.random())
