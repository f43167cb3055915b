"""Measure the share of this machine's matrix-multiply peak that a denoising step reaches.

    python -m bench.machine [NETWORK …] [--threads 1] [--batches 1 2 4 8 16 32] [--rounds 3] [--compiled]

The peak is the best single-precision product of large matrices that torch, NumPy's BLAS and ONNX Runtime
reach with as many threads. A step's operations are those of the backbone alone (`python -m model.describe`),
since the conditioner's results are cached in service. NETWORKs are bundles, or published sizes such as
DiT-S/2, which get random weights. In each round every runtime runs every batch, and right before it the peak
is measured again, so that whatever slows the machine slows both; the share is the median over the rounds.
With one thread both are timed in processor time, which other tenants do not use up; with more, by the clock.
A second table gives each operator's share of ONNX Runtime's time in a step. Writes
bench/results/machine.{json,png}.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from ditserve.bench import report
from ditserve.bench.machine.matmul_peak import MatmulPeak
from ditserve.bench.machine.networks import inputs, opened_bundles
from ditserve.bench.machine.operators import operator_shares, product_share
from ditserve.bench.machine.step_times import RUNTIMES, StepTime, load_networks, step_times
from ditserve.bench.plots import draw_peak_shares
from ditserve.model.spec.bundle import BACKBONE, Bundle

NETWORKS = ("DiT-S/2", str(report.DEFAULT_BUNDLE))
GOAL = 0.7
PROFILED_ROWS = (1, 8)


def profiles(bundles: Mapping[str, Bundle], threads: int) -> dict[str, dict[str, float]]:
    """Return the share of each operator by network and number of rows."""
    profiled = {}
    with TemporaryDirectory(prefix="dit-") as folder:
        for network, bundle in bundles.items():
            names = [tensor.name for tensor in bundle.manifest.state]
            for rows in PROFILED_ROWS:
                x, state = inputs(bundle.manifest, rows)
                data = {"x": x, **dict(zip(names, state, strict=True))}
                graph = bundle.file(BACKBONE)
                shares = operator_shares(graph, data, threads=threads, folder=Path(folder))
                profiled[f"{network}, {rows} row(s)"] = shares
    return profiled


def step_table(points: Sequence[StepTime], peak: MatmulPeak, threads: int) -> Table:
    best = peak.rates[peak.library, peak.side]
    title = (
        f"share of the peak, {threads} thread(s); "
        f"peak {best:.0f} GFLOP/s ({peak.library}, {peak.side}²); goal ≥ {GOAL:.0%}"
    )
    rows = [
        (p.network, p.runtime, str(p.rows), f"{p.row_ms:.2f}", f"{p.gflops_per_s:.1f}", f"{p.share:.1%}")
        for p in points
    ]
    columns = ("network", "runtime", "rows", "ms a row", "GFLOP/s", "of the peak")
    return report.table(title, columns, rows, text={"network", "runtime"})


def operator_table(profiled: Mapping[str, Mapping[str, float]]) -> Table:
    columns = ("operator", *profiled)
    table = report.table("share of ONNX Runtime's time, by operator", columns, [], text={"operator"})
    greatest: dict[str, float] = {}
    for shares in profiled.values():
        for operator, share in shares.items():
            greatest[operator] = max(share, greatest.get(operator, 0.0))
    for operator in sorted(greatest, key=lambda name: -greatest[name]):
        table.add_row(operator, *(f"{shares.get(operator, 0.0):.1%}" for shares in profiled.values()))
    table.add_section()
    table.add_row("all matrix products", *(f"{product_share(shares):.1%}" for shares in profiled.values()))
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("machine", __doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="torch.compile as well: it takes minutes")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, console, background = parse(arguments), Console(), report.BackgroundLoad()
    clock = time.process_time if options.threads == 1 else time.perf_counter
    runtimes = [name for name in RUNTIMES if options.compiled or name != "torch compiled"]

    def work() -> None:
        with opened_bundles(options.networks) as bundles:
            networks = list(load_networks(bundles, runtimes, options.threads))
            peak = MatmulPeak(threads=options.threads, clock=clock)
            points = step_times(
                networks, options.batches, rounds=options.rounds, peak=peak, clock=clock, console=console
            )
            operators = profiles(bundles, options.threads)
        console.print(step_table(points, peak, options.threads))
        console.print(operator_table(operators))
        figures = {
            "peak_gflops_per_s": {f"{library} {side}": r for (library, side), r in peak.rates.items()},
            "points": [asdict(point) for point in points],
            "operators": operators,
        }
        report.save("machine", options, background, figures)
        shares = [(f"{p.network}, {p.runtime}", p.rows, p.share) for p in points]
        draw_peak_shares(shares, report.result_path("machine.png"), goal=GOAL)

    return report.run_command("machine", work)


if __name__ == "__main__":
    sys.exit(main())
