"""Offer requests to an HTTP server on a fixed schedule, and report what became of them.

    python -m bench.load http://127.0.0.1:8000 --rate 3 [--requests 480] [--seed 1] [--slo 3] [--pid PID]
        [--process poisson|bursts|flash|at-once] [--bundle model/zoo/emoji64]
        [--prompts FILE]
        [--adapter service|service-undegraded|service-undated|peer|bentoml|ray]

Open loop: every request has its time, drawn before the start, and is sent then, whatever has become of the
others. 70 % ask for 20 steps and 30 % for 50, 70 % are guided, classes follow Zipf's law (`--steps`,
`--guided`). The promised latency is `--slo` times what each kind of request takes alone, which is measured
first. The first `--warm-up` requests do not count. A run whose own requests left late, by more than
`--max-lag-ms` at the 99th percentile, says nothing about the server: it is void, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ditserve.bench import report
from ditserve.bench.load import generator
from ditserve.bench.load.adapters import ADAPTERS, Drawing
from ditserve.bench.load.summary import LoadSummary, Promise
from ditserve.bench.load.workload import PROCESSES, STEPS_MIX, Workload
from ditserve.model.sampling.prompt import read_prompts
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.command_line import named_path
from ditserve.model.spec.manifest import Manifest

MAX_LAG_MS = 5.0


async def measure(options: argparse.Namespace, manifest: Manifest) -> dict[str, Any]:
    """Return the record of one run."""
    drawing = Drawing.of(manifest, read_prompts(options.prompts) if options.prompts else ())
    adapter = ADAPTERS[options.adapter](drawing)
    mix = tuple((steps, share) for steps, share in options.steps)
    workload = Workload(len(drawing.conditions), options.process, mix, options.guided, options.zipf)
    background = report.BackgroundLoad()
    async with generator.connect(options.url) as http:
        unloaded = await generator.unloaded(workload, generator.sender(http, adapter, None))
        promise = Promise(unloaded, options.slo)
        requests = workload.draw(options.requests + options.warm_up, options.rate, options.seed)
        exchanges, costs = await generator.offer_and_measure(
            http, adapter, requests, promise, pid=options.pid
        )
    qualities = generator.rung_qualities(manifest, manifest.name)
    summary = LoadSummary.of([exchanges[options.warm_up :]], promise, qualities)
    figures = {
        "promise_s": {
            f"{kind.steps} {'guided' if kind.guided else 'unguided'}": promise.within(kind)
            for kind in workload.kinds
        },
        "void": 1000 * summary.lag_p99 > options.max_lag_ms,
        **asdict(summary),
        **costs,
    }
    return report.record(options, background, figures)


def figures_table(result: dict[str, Any]) -> Table:
    table = Table(show_header=False)
    for name, value in result.items():
        if name not in ("options", "machine", "neighbours"):
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    return table


def steps_share(text: str) -> tuple[int, float]:
    """Parse `20:0.7` into a count of steps and its share."""
    steps, _, share = text.partition(":")
    return int(steps), float(share or 1.0)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("load", __doc__)
    parser.add_argument("url")
    parser.add_argument("--rate", type=float, required=True, help="requests a second, on average")
    parser.add_argument("--requests", type=int, default=480, help="that count; at least 459 for a p99")
    parser.add_argument("--warm-up", type=int, default=20, help="requests before them that do not count")
    parser.add_argument("--process", choices=list(PROCESSES), default="poisson")
    parser.add_argument("--steps", type=steps_share, nargs="+", default=STEPS_MIX, metavar="STEPS:SHARE")
    parser.add_argument("--guided", type=float, default=0.7, help="share of guided requests")
    parser.add_argument("--zipf", type=float, default=1.0, help="how uneven the classes are")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--adapter", choices=list(ADAPTERS), default="service")
    parser.add_argument("--slo", type=float, default=3.0, help="promised latency, in unloaded ones")
    parser.add_argument("--bundle", type=Path, default=report.DEFAULT_BUNDLE, help="what is served")
    parser.add_argument("--prompts", type=named_path, help="for a model of texts: a file with one a line")
    parser.add_argument("--pid", type=int, help="the server's process, to tell its processor time and memory")
    parser.add_argument("--max-lag-ms", type=float, default=MAX_LAG_MS)
    parser.add_argument("--out", type=Path, help="file for the result, as JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if the run is void."""
    options = parse(arguments)
    result: dict[str, Any] = {}

    def work() -> None:
        manifest = Bundle.open(options.bundle, verify=False).manifest
        result.update(asyncio.run(measure(options, manifest)))
        Console().print(figures_table(result))
        if options.out:
            report.write_json(options.out, result)

    if status := report.run_command("load", work):
        return status
    if result["void"]:
        print("void: requests left late, so this says nothing of the server", file=sys.stderr)
    return int(result["void"])


if __name__ == "__main__":
    sys.exit(main())
