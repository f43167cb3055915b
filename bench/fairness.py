"""Measure how long one caller's short requests take beside another caller's load, on a real service.

    python -m bench.fairness [--bundle model/zoo/emoji64] [--steps 5] [--requests 20]
        [--report bench/results/fairness-real.md]

One worker, two callers. The first asks for images of a few steps, one after another: alone, and then beside
each of the other's loads. Its fair time is twice its time alone: half of the machine is its own. Prints a
table, and writes it to the report with the load average of the machine before.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from ditserve.bench import report
from ditserve.bench.load.cluster import served
from ditserve.commands import command_line
from ditserve.model.spec.bundle import write_atomic
from ditserve.model.spec.command_line import positive

# What the other caller has running: number of requests, and the fields of each.
LOADS: dict[str, tuple[int, dict[str, Any]]] = {
    "one image of 1000 steps": (1, {"steps": 1000}),
    "four images of 1000 steps": (1, {"steps": 1000, "n": 4}),
    "a flood of 250 images of 50 steps": (250, {"steps": 50}),
}
COLUMNS = ("beside", "mean s", "worst s", "worst of the fair time")


@dataclass(frozen=True, slots=True)
class Times:
    """The seconds that requests took, one after another, beside a load; "" is none."""

    load: str
    seconds: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.seconds) / len(self.seconds)

    def row(self, alone: Times) -> str:
        share = max(self.seconds) / (2 * alone.mean)
        return f"| {self.load} | {self.mean:.2f} | {max(self.seconds):.2f} | {share:.1f}× |"


def body(steps: int, **fields: Any) -> dict[str, Any]:
    """Return the body of a request for a guided image that must have all its steps."""
    return {"condition": {}, "guidance_scale": 2.0, "allow_degraded": False, "steps": steps, **fields}


async def ask_in_turn(http: httpx.AsyncClient, load: str, steps: int, requests: int) -> Times:
    """Time requests of the first caller, each sent when the one before is answered."""
    seconds = []
    for seed in range(requests):
        began = time.perf_counter()
        headers = {"x-forwarded-for": "10.0.0.1", "accept": "image/png"}
        answer = await http.post("/generate", json=body(steps, seed=seed), headers=headers)
        answer.raise_for_status()
        seconds.append(time.perf_counter() - began)
    return Times(load, tuple(seconds))


async def occupy(http: httpx.AsyncClient, count: int, fields: dict[str, Any]) -> list[str]:
    """Submit requests of the second caller; return the paths of their jobs."""
    headers = {"x-forwarded-for": "10.0.0.2", "prefer": "respond-async"}
    paths = []
    for seed in range(count):
        answer = await http.post("/generate", json=body(**fields, seed=seed), headers=headers)
        answer.raise_for_status()
        paths.append(answer.headers["location"])
    return paths


async def measure(options: argparse.Namespace) -> list[Times]:
    """Return the times of the first caller alone, and beside each load."""
    async with served(options.bundle, "--trusted-proxies=127.0.0.1", workers=1) as http:
        await ask_in_turn(http, "", options.steps, 3)
        measured = [await ask_in_turn(http, "nothing", options.steps, options.requests)]
        for load, (count, fields) in LOADS.items():
            jobs = await occupy(http, count, fields)
            measured.append(await ask_in_turn(http, load, options.steps, options.requests))
            for job in jobs:
                await http.delete(job, headers={"x-forwarded-for": "10.0.0.2"})
        return measured


def markdown(measured: Sequence[Times], options: argparse.Namespace, load_average: float) -> str:
    """Return the table with what it needs to be read."""
    lines = [
        "# Fairness on a real machine",
        "",
        f"Made by `python -m bench.fairness` with `{options.bundle}`: {options.requests} guided images of "
        f"{options.steps} steps, one after another,",
        f"beside another caller's load on one worker; {os.cpu_count()} cores, load average before "
        f"{load_average:.1f}. The fair time is twice the mean time alone.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" + "|---:" * (len(COLUMNS) - 1) + "|",
    ]
    return "\n".join([*lines, *(times.row(measured[0]) for times in measured)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write it to the report if one is asked for."""
    parser = argparse.ArgumentParser(prog=command_line("bench.fairness"), description="Measure fairness.")
    parser.add_argument("--bundle", type=Path, default=report.DEFAULT_BUNDLE)
    parser.add_argument("--steps", type=positive, default=5, help="of each request")
    parser.add_argument("--requests", type=positive, default=20, help="of each row")
    parser.add_argument("--report", type=Path, help="file for the table, as Markdown")
    options = parser.parse_args(arguments)

    def work() -> None:
        load_average = os.getloadavg()[0]
        text = markdown(asyncio.run(measure(options)), options, load_average)
        print(text)
        if options.report:
            write_atomic(options.report, text.encode())

    return report.run_command("fairness", work)


if __name__ == "__main__":
    sys.exit(main())
