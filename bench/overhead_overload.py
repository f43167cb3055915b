"""Measure the processor time that the service takes beside the network, where more is asked than can be done.

    python -m bench.overhead_overload [--bundle model/zoo/tiny] [--workers 2] [--rate 80] [--seconds 10]
        [--rounds 3] [--steps 50] [--deadline-s 4] [--pass-ms 2] [--row-ms 1]

The requests are those of `bench.promises`: guided images with deadlines, which come whatever became of the
others, and half of which forbid fewer steps. The workers' network takes time but no processor
(`bench.load.noop_worker`), so what each process spends is the cost of serving; for the workers also what
their event loops spend, without the engine and the encoding of images. By default 80 requests come in a
second, where about 20 can be drawn; at `--rate 15` all are. Writes bench/results/overhead_overload.json.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ditserve.bench import report
from ditserve.bench.load.cluster import TestCluster
from ditserve.bench.load.processes import main_thread_seconds, processor_seconds
from ditserve.bench.overhead_http import running_noop_service
from ditserve.bench.promises import HastyClient, Outcome


@dataclass(frozen=True, slots=True)
class OverloadRound:
    """One round: its requests, those refused and those in time, and processor milliseconds a request."""

    requests: int
    refused: int
    in_time: int
    processor_ms: dict[str, float]


def spent_seconds(cluster: TestCluster) -> dict[str, float]:
    """Return the processor time so far by process, the workers together."""
    workers = [cluster.pid(name) for name in cluster.workers]
    return {
        "API": processor_seconds(cluster.pid("api")),
        "Valkey": processor_seconds(cluster.pid("valkey")),
        "workers": sum(map(processor_seconds, workers)),
        "workers' event loops": sum(map(main_thread_seconds, workers)),
    }


def measured_round(
    outcomes: Sequence[Outcome], before: Mapping[str, float], after: Mapping[str, float]
) -> OverloadRound:
    """Return what a round cost, of the outcomes of its requests and the processor time before and after."""
    refused = sum(outcome.status in (429, 503) for outcome in outcomes)
    in_time = sum(outcome.in_time for outcome in outcomes)
    spent_ms = {process: 1e3 * (after[process] - before[process]) / len(outcomes) for process in before}
    return OverloadRound(len(outcomes), refused, in_time, spent_ms)


async def measure(options: argparse.Namespace, console: Console) -> list[OverloadRound]:
    rounds = []
    pace = (f"--pass-ms={options.pass_ms}", f"--row-ms={options.row_ms}")
    async with running_noop_service(options.bundle, *pace, workers=options.workers) as cluster:
        with closing(HastyClient(cluster.port, options.steps)) as client:
            # The costs of a step are learned, and the condition caches filled.
            await client.closed_loop(16, options.warm_up_s)
            for number in track(range(options.rounds), "rounds", console=console, transient=True):
                before = spent_seconds(cluster)
                outcomes = await client.open_loop(
                    options.rate, options.seconds, options.deadline_s, returning=False, seed=number
                )
                rounds.append(measured_round(outcomes, before, spent_seconds(cluster)))
    return rounds


def medians(rounds: Sequence[OverloadRound]) -> dict[str, float]:
    """Return the medians over the rounds: processor milliseconds a request, and shares of the requests."""
    spent = {
        process: float(np.median([measured.processor_ms[process] for measured in rounds]))
        for process in rounds[0].processor_ms
    }
    refused = float(np.median([measured.refused / measured.requests for measured in rounds]))
    in_time = float(np.median([measured.in_time / measured.requests for measured in rounds]))
    return {**spent, "refused": refused, "in time": in_time}


def medians_table(figures: Mapping[str, float], options: argparse.Namespace) -> Table:
    title = f"{options.rate:g} requests/s, {options.workers} worker(s), medians of {options.rounds} rounds"
    shares = ("refused", "in time")
    rows = [
        [name if name in shares else f"{name}: processor ms a request", f"{value:.2f}"]
        for name, value in figures.items()
    ]
    return report.table(title, ["", ""], rows, text={""})


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = report.parser("overhead_overload", __doc__)
    parser.add_argument("--bundle", type=Path, default=report.SMALL_BUNDLE)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rate", type=float, default=80.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50, help="of a request")
    parser.add_argument("--deadline-s", type=float, default=4.0)
    parser.add_argument("--pass-ms", type=float, default=2.0, help="of a forward pass, whatever its rows")
    parser.add_argument("--row-ms", type=float, default=1.0, help="of each row of a forward pass")
    parser.add_argument("--warm-up-s", type=float, default=3.0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, console, background = parse(arguments), Console(), report.BackgroundLoad()

    def work() -> None:
        rounds = asyncio.run(measure(options, console))
        figures = medians(rounds)
        console.print(medians_table(figures, options))
        kept = {"medians": figures, "rounds": [asdict(measured) for measured in rounds]}
        report.save("overhead_overload", options, background, kept)

    return report.run_command("overhead_overload", work)


if __name__ == "__main__":
    sys.exit(main())
