"""Offer more than the machine can do, with deadlines, and count the promises that the service breaks.

    python -m bench.promises [--workers 1 2 4] [--neighbours 0 8] [--loads 1.5 3] [--seconds 20]
        [--seeds 1 2 3] [--bundle model/zoo/tiny] [--steps 50] [--deadline-s 4]
        [--report bench/results/promises-real.md]

For each number of workers and of neighbours, which burn processor time in bursts, the real service is
started. Closed-loop clients with a deadline that is no matter to them measure what it can do. Then requests
for guided images come at each multiple of that, whatever became of the others; half of them forbid fewer
steps. At the largest load they come a second time, by clients that return when `Retry-After` tells them.
A row counts the requests of all seeds together, because a stall of the machine comes in one run or in none.
An answer counts from when its request was sent to when it came, however late the client reads it.
Prints a table, and writes it to the report with the load average of the machine before.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import Popen

import numpy as np
from rich.console import Console

from ditserve.bench import report
from ditserve.bench.load.cluster import served
from ditserve.bench.load.stamped import StampedConnection
from ditserve.bench.load.wire import post
from ditserve.model.spec.bundle import write_atomic
from ditserve.model.spec.errors import ModelError

CLIENTS = 16  # closed-loop clients a worker: enough for full batches
PATIENT_S = 60.0  # their deadline
RETURNS = 3  # how often a refused client comes back
COLUMNS = (
    *("workers", "neighbours", "load", "requests", "refused", "broken of the accepted", "in time/s"),
    *("of the closed loop", "degraded", "taken on first return"),
)


@dataclass(frozen=True, slots=True)
class Wish:
    """A request for one image within `within_s` seconds."""

    seed: int
    within_s: float
    degradable: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of one request, `ended_s` seconds after the first was sent.

    `steps` were taken for the image, None if there is none. `returns` counts how often its client came back;
    `on_first` says whether it was taken when it first did.
    """

    status: int
    in_time: bool
    steps: int | None = None
    ended_s: float = 0.0
    returns: int = 0
    on_first: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table, of several runs. `closed_per_s` is what the closed loop did, in images a second.

    Rates are of the time of each run from `since_s`, when answers are as many as requests, to the last
    arrival.
    """

    workers: int
    neighbours: int
    load: float
    since_s: float
    until_s: float
    closed_per_s: float
    steps: int
    outcomes: tuple[Outcome, ...]
    runs: int = 1

    @property
    def refused(self) -> int:
        return sum(outcome.status in (429, 503) for outcome in self.outcomes)

    @property
    def accepted(self) -> int:
        return len(self.outcomes) - self.refused

    @property
    def broken(self) -> float:
        """The share of the accepted that were not answered in time."""
        return 1.0 - self.in_time / self.accepted if self.accepted else 0.0

    @property
    def in_time(self) -> int:
        return sum(outcome.in_time for outcome in self.outcomes)

    @property
    def in_time_per_s(self) -> float:
        return len(self._answered_steps) / self._seconds

    @property
    def used(self) -> float:
        """The steps of the images in time, as a share of those that the closed loop would have made."""
        return sum(self._answered_steps) / (self.steps * self.closed_per_s * self._seconds)

    @property
    def _seconds(self) -> float:
        return self.runs * (self.until_s - self.since_s)

    @property
    def _answered_steps(self) -> list[int]:
        return [
            outcome.steps or 0
            for outcome in self.outcomes
            if outcome.in_time and self.since_s <= outcome.ended_s <= self.until_s
        ]

    @property
    def degraded(self) -> float:
        fewer = sum(outcome.steps != self.steps for outcome in self.outcomes if outcome.in_time)
        return fewer / max(1, self.in_time)

    @property
    def taken_on_return(self) -> float | None:
        """The share of those who came back that were taken at once; None where nobody came back."""
        returned = [outcome for outcome in self.outcomes if outcome.returns]
        return sum(outcome.on_first for outcome in returned) / len(returned) if returned else None

    def row(self) -> list[str]:
        taken = "" if self.taken_on_return is None else f"{self.taken_on_return:.0%}"
        figures = (self.workers, self.neighbours, f"{self.load:g}", len(self.outcomes))
        shares = (f"{self.refused / len(self.outcomes):.0%}", f"{self.broken:.1%}")
        rates = (f"{self.in_time_per_s:.1f}", f"{self.used:.0%}", f"{self.degraded:.0%}")
        return [str(value) for value in (*figures, *shares, *rates, taken)]


class HastyClient:
    """A client of the service at a port, which asks for images of `steps` guided steps."""

    def __init__(self, port: int, steps: int) -> None:
        self._port, self._steps = port, steps
        self._seeds = itertools.count()
        self._idle: list[StampedConnection] = []

    def close(self) -> None:
        for connection in self._idle:
            connection.close()

    async def ask(self, request: Wish) -> tuple[Outcome, float | None]:
        """Send one request; return its end, and the seconds after which a refused one may come back."""
        body = {
            "condition": {"label": 0},
            "steps": self._steps,
            "guidance_scale": 2.0,
            "seed": request.seed,
            "deadline_ms": round(1000 * request.within_s),
            "allow_degraded": request.degradable,
        }
        connection = await self._connection()
        answer = await connection.ask(post("/generate", body, accept="image/png"))
        self._idle.append(connection)
        drawn = answer.status == 200
        in_time = drawn and answer.seconds <= request.within_s
        steps = int(answer.headers["x-steps-used"]) if drawn else None
        retry_s = answer.headers.get("retry-after") if answer.status == 503 else None
        return Outcome(answer.status, in_time, steps), None if retry_s is None else float(retry_s)

    async def _connection(self) -> StampedConnection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.ended:
                return connection
            connection.close()
        return await StampedConnection.open(self._port)

    async def ask_again(self, request: Wish) -> Outcome:
        """Send a request, and again whenever it is told to, up to `RETURNS` times."""
        outcome, retry_s = await self.ask(request)
        on_first, returns = False, 0
        while retry_s is not None and returns < RETURNS:
            await asyncio.sleep(retry_s)
            returns += 1
            outcome, retry_s = await self.ask(request)
            on_first |= returns == 1 and outcome.status != 503
        return replace(outcome, returns=returns, on_first=on_first)

    async def closed_loop(self, clients: int, seconds: float) -> float:
        """Return the images a second that so many clients are given which ask again for so many seconds."""
        clock = asyncio.get_running_loop().time
        began, made = clock(), 0

        async def keep_asking() -> None:
            nonlocal made
            while clock() < began + seconds:
                outcome, _ = await self.ask(Wish(next(self._seeds), PATIENT_S))
                made += outcome.in_time

        await asyncio.gather(*(keep_asking() for _ in range(clients)))
        return made / (clock() - began)

    async def open_loop(
        self, rate: float, seconds: float, within_s: float, *, returning: bool, seed: int = 1
    ) -> tuple[Outcome, ...]:
        """Send Poisson arrivals at `rate` a second, half of which forbid fewer steps; return their ends."""
        gaps = np.random.default_rng(seed).exponential(1.0 / rate, max(1, round(rate * seconds)))
        clock = asyncio.get_running_loop().time
        zero, running = clock(), []

        async def end(request: Wish) -> Outcome:
            outcome = await self.ask_again(request) if returning else (await self.ask(request))[0]
            return replace(outcome, ended_s=clock() - zero)

        async with asyncio.TaskGroup() as tasks:
            for number, at in enumerate(np.cumsum(gaps)):
                await asyncio.sleep(zero + float(at) - clock())
                request = Wish(next(self._seeds), within_s, degradable=number % 2 == 0)
                running.append(tasks.create_task(end(request)))
        return tuple(task.result() for task in running)


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Have `count` processes burn processor time in bursts."""
    module = "ditserve.bench.load.neighbour"
    # Each in a session of its own: Linux shares processor time among sessions first (autogroups), and all of
    # them in one would take as much as one process of the service.
    burning = [
        Popen([sys.executable, "-m", module, str(seed)], start_new_session=True) for seed in range(count)
    ]
    try:
        yield
    finally:
        for process in burning:
            process.kill()
            process.wait()


async def measure(options: argparse.Namespace, console: Console) -> list[Cell]:
    """Return the cells of the table, and print each as it comes."""
    cells: list[Cell] = []
    for workers, burning in itertools.product(options.workers, options.neighbours):
        async with served(options.bundle, workers=workers) as http:
            port = http.base_url.port
            assert port is not None
            with closing(HastyClient(port, options.steps)) as client, neighbours(burning):
                loads = [(load, False) for load in options.loads] + [(max(options.loads), True)]
                closed_per_s = await client.closed_loop(CLIENTS * workers, options.seconds / 2)
                if not closed_per_s:
                    raise ModelError("the closed loop was given no image: raise --seconds")
                for load, returning in loads:
                    rate, runs = load * closed_per_s, []
                    for seed in options.seeds:
                        run = await client.open_loop(
                            rate, options.seconds, options.deadline_s, returning=returning, seed=seed
                        )
                        runs.append(run)
                    cell = Cell(
                        workers,
                        burning,
                        load,
                        since_s=options.deadline_s,
                        until_s=options.seconds,
                        closed_per_s=closed_per_s,
                        steps=options.steps,
                        outcomes=tuple(itertools.chain(*runs)),
                        runs=len(runs),
                    )
                    console.print(" | ".join(cell.row()))
                    cells.append(cell)
    return cells


def markdown(cells: Sequence[Cell], options: argparse.Namespace, load_average: float) -> str:
    """Return the table with what it needs to be read."""
    lines = [
        "# Promises on a real machine",
        "",
        f"Made by `python -m bench.promises` with `{options.bundle}`: {options.steps} guided steps within "
        f"{options.deadline_s:g} s,",
        f"half of the requests forbid fewer; {len(options.seeds)} run(s) of {options.seconds:g} s a row; "
        f"{os.cpu_count()} cores, load average before {load_average:.1f}.",
        "Load is in multiples of what closed-loop clients are given beside the same neighbours, which burn",
        "in bursts. In rows with a share of first returns the refused come back when they are told.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---:|" * len(COLUMNS),
    ]
    return "\n".join([*lines, *(f"| {' | '.join(cell.row())} |" for cell in cells)]) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("promises", __doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 8])
    parser.add_argument("--loads", type=float, nargs="+", default=[1.5, 3.0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one run of a row each")
    parser.add_argument("--bundle", type=Path, default=report.SMALL_BUNDLE)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--deadline-s", type=float, default=4.0)
    parser.add_argument("--report", type=Path, help="file for the table, as Markdown")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)

    def work() -> None:
        if options.seconds <= options.deadline_s:
            raise ModelError("--seconds must be more than --deadline-s")
        load_average = os.getloadavg()[0]
        cells = asyncio.run(measure(options, Console()))
        text = markdown(cells, options, load_average)
        print(text)
        if options.report:
            write_atomic(options.report, text.encode())

    return report.run_command("promises", work)


if __name__ == "__main__":
    sys.exit(main())
