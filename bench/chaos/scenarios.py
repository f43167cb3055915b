"""The scenarios: faults, the circumstances in which processes run, and the work of clients meanwhile."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from ditserve.bench.chaos.clients import LoadClient
from ditserve.bench.chaos.faults import CRASHES, FaultPlan, Faults, cause_faults
from ditserve.bench.chaos.log import ChaosLog
from ditserve.bench.chaos.losses import EVICTION, LOST_RECORDS, OTHER_RELEASES
from ditserve.bench.load.cluster import Circumstances, TestCluster

PATIENCE_S = 120.0  # for all requests to end after the last fault
MEASURED_S, AT_ONCE = 5.0, 48  # for which, and by how many requests at a time, the capacity is measured
OVERLOAD = 2.0  # times the capacity
LINES_READ = 3  # of a log, before its reader goes away
# Only the clock of the day is wrong. Without the second, threads that wait for Python's lock spin.
FAKED = {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_FORCE_MONOTONIC_FIX": "0"}
FAKETIME = sorted(glob("/usr/lib/*/faketime/libfaketime.so.1"))

Unlike = Mapping[str, Circumstances]


@dataclass(frozen=True, slots=True)
class ScenarioRun:
    """One scenario under way: its processes, clients, log, random numbers and length."""

    cluster: TestCluster
    clients: Sequence[LoadClient]
    log: ChaosLog
    rng: random.Random
    seconds: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """One way in which things go wrong.

    Attributes:
        about: what happens, for a reader of the report.
        plan: the faults that are caused while the clients work.
        unlike: gives the circumstances of processes unlike the others, in a folder of the run.
        lacking: gives the reason why it cannot run here, empty if it can.
        overload: clients send more than there is capacity for, with deadlines, instead of one after another.
        redis_loses: Redis loses data that it was given.
    """

    about: str
    plan: FaultPlan
    unlike: Callable[[argparse.Namespace, Path], Unlike] = lambda options, folder: {}
    lacking: Callable[[argparse.Namespace], str] = lambda options: ""
    overload: bool = False
    redis_loses: bool = False

    async def drive(self, run: ScenarioRun) -> None:
        """Let clients work while faults happen, and then until their requests end or `PATIENCE_S` passes."""
        stop = asyncio.Event()
        work = [_exceed_capacity(run, stop)] if self.overload else [each.run(stop) for each in run.clients]
        running = [asyncio.create_task(client) for client in work]
        await cause_faults(run.cluster, run.log, run.rng, run.seconds, self.plan)
        stop.set()
        _, left = await asyncio.wait(running, timeout=PATIENCE_S)
        for task in left:
            task.cancel()
        for task, error in zip(running, await asyncio.gather(*running, return_exceptions=True), strict=True):
            if task not in left and isinstance(error, BaseException):
                logs = run.cluster.logs()
                raise RuntimeError(f"a client met what it did not expect: {error!r}\n{logs}") from error


async def _exceed_capacity(run: ScenarioRun, stop: asyncio.Event) -> None:
    """Measure what the workers make, and send `OVERLOAD` times as much, whoever is still waiting."""
    rate = await _measured_rate(run)
    async with asyncio.TaskGroup() as requests:
        while not stop.is_set():
            await asyncio.sleep(run.rng.expovariate(OVERLOAD * rate))
            requests.create_task(run.rng.choice(run.clients).send_one("promised"))


async def _measured_rate(run: ScenarioRun) -> float:
    """Return how many requests a second are answered while there are always enough for full batches."""
    began, made = time.monotonic(), 0

    async def work(client: LoadClient) -> None:
        nonlocal made
        while time.monotonic() < began + MEASURED_S:
            await client.send_one("waiting")
            made += 1

    await asyncio.gather(*(work(run.clients[k % len(run.clients)]) for k in range(AT_ONCE)))
    return made / (time.monotonic() - began)


def _clocks(**offsets_s: int) -> Callable[[argparse.Namespace, Path], Unlike]:
    """Return circumstances in which clocks of processes differ; `worker_0` is the process `worker-0`."""

    def unlike(options: argparse.Namespace, folder: Path) -> Unlike:
        return {
            name.replace("_", "-"): Circumstances(
                {"LD_PRELOAD": FAKETIME[0], "FAKETIME": f"{offset:+d}s", **FAKED}
            )
            for name, offset in offsets_s.items()
        }

    return unlike


def _without_faketime(options: argparse.Namespace) -> str:
    return "" if FAKETIME else "libfaketime is not here: apt-get install faketime"


def _bad_logs(options: argparse.Namespace, folder: Path) -> Unlike:
    """Let logs go to a full disk, and to pipes whose reader goes away."""
    talkative, full = {"DIT_LOG_LEVEL": "debug"}, Path("/dev/full")
    return {
        "api": Circumstances(talkative, log=full),
        "api-1": Circumstances(talkative, log=_pipe(folder / "api.pipe")),
        "worker-0": Circumstances(talkative, log=_pipe(folder / "worker.pipe")),
        "worker-1": Circumstances(talkative, log=full),
    }


def _pipe(path: Path) -> Path:
    """Make a pipe whose reader takes a few lines and goes away."""
    os.mkfifo(path)
    # Open for both, so that neither this nor the writer waits for the other end.
    reader = os.fdopen(os.open(path, os.O_RDWR), "rb", buffering=0)

    def read() -> None:
        with reader:
            for _ in range(LINES_READ):
                reader.readline()

    threading.Thread(target=read, daemon=True).start()
    return path


def _other_version(options: argparse.Namespace, folder: Path) -> Unlike:
    other = Circumstances(checkout=options.other_api)
    return {"api-1": other, "worker-0": other}


def _without_other_version(options: argparse.Namespace) -> str:
    return "" if options.other_api else "name a checkout of another version with --other-api"


_RESTARTED: Faults = {name: CRASHES[name] for name in ("worker drained", "API restarted", "API killed")}
NO_FAULTS, RESTARTS = FaultPlan({}), FaultPlan(_RESTARTED)
SCENARIOS: Mapping[str, Scenario] = {
    "crashes": Scenario("workers, API and Valkey killed, frozen, drained and restarted", FaultPlan(CRASHES)),
    "lost-records": Scenario(
        "records, indexes and leases deleted in Redis", FaultPlan(LOST_RECORDS, pause_s=0.5), redis_loses=True
    ),
    "eviction": Scenario("Redis evicts any keys for seconds", FaultPlan(EVICTION), redis_loses=True),
    "clocks-90s": Scenario(
        "the API's clock 90 s ahead, one worker's 90 s behind",
        NO_FAULTS,
        _clocks(api=90, worker_0=-90),
        _without_faketime,
    ),
    "clocks-3s": Scenario(
        "the API's clock 3 s behind, one worker's 3 s ahead",
        NO_FAULTS,
        _clocks(api=-3, worker_0=3),
        _without_faketime,
    ),
    "messages": Scenario(
        "fields added and versions raised in jobs, results and reports",
        FaultPlan(OTHER_RELEASES, pause_s=0.5),
    ),
    "two-apis": Scenario(
        "two APIs, either of which answers, restarted in turns with workers",
        RESTARTS,
        lambda options, folder: {"api-1": Circumstances()},
    ),
    "other-version": Scenario(
        "a second API and a worker of another version", RESTARTS, _other_version, _without_other_version
    ),
    "logs": Scenario("logs on a full disk, and on pipes that nobody reads", NO_FAULTS, _bad_logs),
    "overload": Scenario(
        "twice the capacity offered, due in 4 s, no fewer steps allowed", NO_FAULTS, overload=True
    ),
}
