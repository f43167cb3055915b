"""Compare this service with others on this machine: one model, one traffic, one promised latency.

    python -m bench.headline BUNDLE --peers .peers/bin/python [--prompts FILE] [--minutes 25] [--requests 163]
        [--seeds 1 2 3] [--loads .5 .9 1.1 1.4 2 3 5 8] [--arms planner EDF …] [--threads 2] [--slo 3]
        [--name headline] [--fresh]

Model. Of any bundle of our own networks, peers serve the same network in PyTorch, or around our graphs, with
the same solver, steps, text encoder and decoder. A model of texts is asked with the prompts of a file, one a
line. `python -m bench.peers.model FOLDER` makes a model that diffusers can hold, and given FOLDER for BUNDLE
the peers serve diffusers' own network. Run `python -m bench.ladder BUNDLE --data … --classifier …` first: the
distances to real pictures that it leaves in bench/results are shown beside every load.

Speed. A shared machine drifts by more than systems differ. So the speed of the machine is taken before and
after every run, by passes through the model in this process, and all times are given, offered and promised at
the speed of the first session: where a pass takes 1.2 times as long, requests come 1.2 times as far apart and
may take 1.2 times as long. A run during which the speed changed by more than 1.3 times is void.

Sessions. Every run is stored as it ends, in bench/results/raw/<name>.json, and the same command goes on from
there. `--minutes` bounds one session, which ends with the tables, on the terminal and in
bench/results/<name>.md, the figure in <name>.png, and all of that as numbers in <name>.json. Every run has a
fresh server.

Load. A load of 1 is the images a second that our own service makes undegraded ("step FIFO", saturated), as
measured before any load was offered. The promise to every client is `--slo` times what `--promise-of` needs
for such a request alone: "diffusers + lock", or "step FIFO" for a promise that is easy to nobody. Peers are
tuned first, on traffic of its own: batch and wait at load 0.7, then the cap at 1.1. Latencies of the seeds
are pooled: three runs of 163, 10 of which warm up, are enough for a p99.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ditserve.bench import report
from ditserve.bench.compare import tables
from ditserve.bench.compare.results_store import Headline, ResultsStore
from ditserve.bench.compare.runs import CAPACITY, REFERENCE
from ditserve.bench.compare.session import MAX_LAG_MS, WARM_UP, HeadlineSession
from ditserve.bench.compare.systems import SYSTEMS, has_diffusers
from ditserve.bench.plots import draw_panels
from ditserve.model.spec.bundle import write_atomic

INTERRUPTED = 130


def publish(headline: Headline, name: str, console: Console) -> None:
    """Print the tables, and write <name>.json, <name>.md and <name>.png."""
    made = tables.tables(headline)
    for table in made:
        console.print(table)
    headline.write(report.result_path(f"{name}.json"))
    write_atomic(report.result_path(f"{name}.md"), tables.document(made, name).encode())
    figure = report.result_path(f"{name}.png")
    panels = tables.panels(headline)
    draw_panels([panels], figure, size=(4.4 * len(panels), 4.2), legend_columns=8, dpi=100)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("headline", __doc__)
    parser.add_argument("model", type=Path, help="a bundle, or the folder that bench.peers.model wrote")
    parser.add_argument("--prompts", type=Path, help="for a model of texts: a file with one a line")
    parser.add_argument(
        "--peers", type=Path, default=Path(".peers/bin/python"), help="the peers' interpreter"
    )
    parser.add_argument("--minutes", type=float, default=25.0, help="of this session")
    parser.add_argument("--requests", type=int, default=163, help=f"of a run, {WARM_UP} of them to warm up")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.9, 1.1, 1.4, 2.0, 3.0, 5.0, 8.0])
    parser.add_argument("--arms", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS), metavar="ARM")
    parser.add_argument("--threads", type=int, default=2, help="compute threads of every server")
    parser.add_argument(
        "--slo", type=float, default=3.0, help="promised latency, in those of --promise-of alone"
    )
    parser.add_argument("--promise-of", choices=(REFERENCE, CAPACITY), default=REFERENCE)
    parser.add_argument("--max-lag-ms", type=float, default=MAX_LAG_MS, help="beyond this a run is void")
    parser.add_argument("--name", default="headline", help="of the files in bench/results")
    parser.add_argument("--fresh", action="store_true", help="forget what was found before")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    settings = {name: getattr(options, name) for name in ("requests", "threads", "slo", "promise_of")}
    settings["peers_run"] = "diffusers" if has_diffusers(options.model) else "PyTorch"
    # A server that runs is stopped on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def work() -> None:
        store = ResultsStore(report.RESULTS / "raw" / f"{options.name}.json", settings, fresh=options.fresh)
        session = HeadlineSession(options, store, Console(stderr=True, width=180))
        whole = asyncio.run(session.run())
        console = Console(width=180)
        publish(session.headline(), options.name, console)
        if not whole:
            console.print("not all was measured: the same command goes on from here")

    try:
        return report.run_command("headline", work)
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
