"""What the scheduling and the planner are worth, in simulated time, before any hardware is bought.

    python -m bench.simulate [--curves gpu cpu] [--processes poisson bursts flash] [--loads .5 .7 .9 1.1 1.4 2]
                             [--workers 1] [--requests 500] [--seeds 11 12 13] [--slo 3] [--ladder ddim] [--refusing 0]
    python -m bench.simulate --claims        how far ahead a worker must claim, and in which order
    python -m bench.simulate --necessity     at and below half load: who is cut, and was there another way

Runs the service's own scheduler, planner and admission (`bench.fleet`) and prints, per arm and load: attainment (answers within
their deadline, over all requests: a refusal counts as a miss), latency as a share of the deadline, goodput, refusals, mean
quality of what was answered (lower is better) and the share of it that got all its steps. Writes bench/results/simulate.{json,png}.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

import numpy as np
from rich.console import Console
from rich.table import Table

from ditserve.bench.arrivals import PROCESSES, Traffic
from ditserve.bench.curves import CURVES, LADDERS
from ditserve.bench.fleet import ORDERS, Arm, Fleet, Sample, Site
from ditserve.bench.necessity import Need, need
from ditserve.bench.outcomes import Outcome, Point
from ditserve.bench.plots import RESULTS, draw_sweep
from ditserve.model.spec.bundle import write_atomic

ARMS = (
    Arm(
        "request batches",
        "request",
        "fifo",
        cap=8,
        admission=False,
        plan=False,
        claims="arrival",
        expire=False,
    ),
    Arm(
        "FIFO steps",
        "step",
        "fifo",
        cap=8,
        admission=False,
        plan=False,
        holds=8,
        claims="arrival",
        expire=False,
    ),
    Arm("FIFO + admission", "step", "fifo", degrade=False, plan=False, holds=8, claims="arrival"),
    Arm("EDF + admission", degrade=False, plan=False),
    Arm("planned at admission", plan=False),
    Arm("planned every step"),
)
CLAIMS = tuple(
    Arm(f"{holds} by {order}", holds=holds, claims=order) for holds in (16, 28, 64) for order in ORDERS
)
PATIENT = 30.0  # an SLO at which queues grow deep
WIDTH = 140  # of a table written to a file


def simulate(arm: Arm, site: Site, traffic: Traffic, load: float, n: int, seed: int) -> Outcome:
    """Offer `n` requests at `load` times what the site can do at its best, at every step count asked for."""
    rate = load * site.curve.peak * site.workers / traffic.mean_steps
    fleet = Fleet(arm, site, seed=seed)
    began = time.thread_time()
    samples = fleet.run(traffic.draw(n, rate, seed))
    return _outcome(samples, fleet, time.thread_time() - began)


def _outcome(samples: Sequence[Sample], fleet: Fleet, seconds: float) -> Outcome:
    served = [sample for sample in samples if sample.finished is not None]
    shares = [(sample.finished or 0.0) - sample.arrived for sample in served]
    latency = np.array(
        [took / (sample.due - sample.arrived) for took, sample in zip(shares, served, strict=True)]
    )
    p50, p95, p99 = np.percentile(latency, (50, 95, 99)) if served else (np.nan,) * 3
    plans = [each for worker in fleet.workers for each in worker.plan_seconds]
    ended = max((sample.finished or sample.arrived for sample in samples), default=0.0)
    kept = sum(sample.kept for sample in samples)
    return Outcome(
        attainment=kept / len(samples),
        goodput_per_s=kept / ended if ended else 0.0,
        p50=float(p50),
        p95=float(p95),
        p99=float(p99),
        refused=float(np.mean([sample.rejected for sample in samples])),
        dropped=float(np.mean([not sample.rejected and not sample.kept for sample in samples])),
        quality=float(np.mean([sample.quality for sample in served])) if served else np.nan,
        full_steps=float(np.mean([sample.steps >= sample.asked.steps for sample in served]))
        if served
        else np.nan,
        queue_peak=float(fleet.queue_peak),
        plan_us=1e6 * float(np.mean(plans)) if plans else 0.0,
        requests_per_s=len(samples) / seconds if seconds else np.inf,
    )


def sweep(options: argparse.Namespace, console: Console) -> list[Point]:
    """Every arm at every load, on every curve and arrival process; a table of each pair."""
    points: list[Point] = []
    for curve in options.curves:
        site = Site(CURVES[curve], LADDERS[options.ladder], options.workers, options.slo)
        for process in options.processes:
            traffic = Traffic(process, refusing=options.refusing)
            here = [
                Point(
                    curve,
                    process,
                    load,
                    arm.name,
                    Outcome.mean(
                        [simulate(arm, site, traffic, load, options.requests, seed) for seed in options.seeds]
                    ),
                )
                for load in options.loads
                for arm in ARMS
            ]
            console.print(
                _table(f"{curve}, {process}, {options.workers} worker(s), SLO {options.slo:g}×", here)
            )
            points += here
    return points


def claims(options: argparse.Namespace, console: Console) -> list[Point]:
    """A deep queue: how far ahead must a worker claim, and in which order?"""
    site = Site(CURVES["gpu"], LADDERS[options.ladder], 2, PATIENT)
    points = [
        Point(
            "gpu",
            "poisson",
            1.4,
            arm.name,
            simulate(arm, site, Traffic(), 1.4, 3 * options.requests, options.seeds[0]),
        )
        for arm in CLAIMS
    ]
    console.print(_table("samples a worker claims, and the order of claims", points))
    return points


def necessity(options: argparse.Namespace, console: Console) -> list[Need]:
    """At and below half load: how many deadlines would be missed without cuts, how many requests are cut, how many in vain."""
    needs = [
        Need.of(
            f"{curve}, SLO {slo:g}×",
            load,
            [
                need(Site(CURVES[curve], LADDERS[options.ladder], 1, slo), load, options.requests, seed)
                for seed in options.seeds
            ],
        )
        for curve in options.curves
        for slo in (3.0, 5.0, 10.0)
        for load in (0.3, 0.4, 0.5)
    ]
    table = Table(title="shares of all requests")
    for column in ("machine", "load", "late without cuts", "cut", "cut in vain", "in time"):
        table.add_column(column, justify="left" if column == "machine" else "right")
    for each in needs:
        table.add_row(
            each.machine,
            f"{each.load:g}",
            *(f"{share:.4f}" for share in (each.late, each.cut, each.vain, each.kept)),
        )
    console.print(table)
    return needs


def _table(title: str, points: Iterable[Point]) -> Table:
    table = Table(title=title)
    for column in (
        "load",
        "arm",
        "attained",
        "p50",
        "p95",
        "p99",
        "goodput/s",
        "refused",
        "dropped",
        "quality",
        "full",
    ):
        table.add_column(column, justify="left" if column == "arm" else "right")
    table.add_column("waiting", justify="right")
    table.add_column("plan µs", justify="right")
    last = None
    for point in points:
        o = point.outcome
        if last not in (None, point.load):
            table.add_section()
        last = point.load
        shares = (o.p50, o.p95, o.p99, o.goodput_per_s, o.refused, o.dropped, o.quality, o.full_steps)
        numbers = (f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in shares)
        table.add_row(
            f"{point.load:g}",
            point.arm,
            f"{o.attainment:.3f}",
            *numbers,
            f"{o.queue_peak:.0f}",
            f"{o.plan_us:.0f}",
        )
    return table


def save(name: str, points: Sequence[Point | Need], options: argparse.Namespace) -> None:
    """`bench/results/<name>.json`: what was asked for, and every point."""
    RESULTS.mkdir(exist_ok=True)
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    data = {"options": settings, "points": [asdict(point) for point in points]}
    write_atomic(RESULTS / f"{name}.json", (json.dumps(data, indent=1) + "\n").encode())


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.simulate", description="Compare policies in simulated time."
    )
    parser.add_argument("--curves", nargs="+", choices=list(CURVES), default=list(CURVES))
    parser.add_argument(
        "--processes", nargs="+", choices=list(PROCESSES), default=["poisson", "bursts", "flash"]
    )
    parser.add_argument("--loads", nargs="+", type=float, default=[0.5, 0.7, 0.9, 1.1, 1.4, 2.0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--requests", type=int, default=500, help="in a run; at least 459 for a p99")
    parser.add_argument("--seeds", nargs="+", type=int, default=[11, 12, 13])
    parser.add_argument(
        "--slo", type=float, default=3.0, help="deadline, in unloaded durations of the request"
    )
    parser.add_argument("--ladder", choices=list(LADDERS), default="ddim")
    parser.add_argument(
        "--refusing", type=float, default=0.0, help="share of requests that rule out fewer steps"
    )
    parser.add_argument(
        "--claims", action="store_true", help="instead: how far ahead and in which order to claim"
    )
    parser.add_argument(
        "--necessity", action="store_true", help="instead: whether cuts at and below half load were needed"
    )
    return parser.parse_args(arguments)


STUDIES: dict[str, Callable[[argparse.Namespace, Console], Sequence[Point | Need]]] = {
    "claims": claims,
    "necessity": necessity,
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for name, study in STUDIES.items():
        if getattr(options, name):
            save(name, study(options, console), options)
            return
    points = sweep(options, console)
    save("simulate", points, options)
    draw_sweep(points, RESULTS / "simulate.png")


if __name__ == "__main__":
    main()
