"""The faults of processes, and how faults of any kind are caused one after another."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from ditserve.bench.chaos.log import ChaosLog
from ditserve.bench.load.cluster import TestCluster

LEASE_S = 2.0
RECOVERED_SHARE = 0.8  # of the faults are recovered from before the next one


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
Faults = Mapping[str, tuple[Fault, int]]
CRASHES: Faults = {
    "worker killed": (_kill_worker, 4),
    "worker drained": (_drain_worker, 3),
    "worker frozen": (_freeze_worker, 2),
    "Valkey killed": (_kill_valkey, 2),
    "Valkey frozen": (_freeze_valkey, 2),
    "API killed": (_kill_api, 2),
    "API restarted": (_restart_api, 1),
}


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """The faults of a scenario, and the longest pause between two of them."""

    faults: Faults
    pause_s: float = 3.5


async def cause_faults(
    cluster: TestCluster, log: ChaosLog, rng: random.Random, seconds: float, plan: FaultPlan
) -> None:
    """Cause one fault after another, one of each kind first; without any just wait.

    Mostly the next fault waits until all processes are up and have worked a little; now and then it does not.
    """
    faults = plan.faults
    until = time.monotonic() + seconds
    weights = [weight for _, weight in faults.values()]
    first = rng.sample(list(faults), len(faults))
    while faults and time.monotonic() < until:
        name = first.pop() if first else rng.choices(list(faults), weights)[0]
        log.faults.append((time.time(), name))
        await faults[name][0](cluster, rng)
        if rng.random() < RECOVERED_SHARE:
            await cluster.wait_ready()
        await asyncio.sleep(plan.pause_s * rng.uniform(0.15, 1.0))
    await asyncio.sleep(max(0.0, until - time.monotonic()))
