"""Compare scheduling and planning strategies in simulated time, before any hardware is bought.

    python -m bench.simulate [--curves gpu cpu] [--processes poisson bursts flash]
        [--loads .5 .7 .9 1.1 1.4 2] [--workers 1] [--requests 500] [--seeds 11 12 13]
        [--slo 3] [--ladder ddim] [--refusing 0] [--clips 0]
    python -m bench.simulate --promises      how many accepted deadlines are broken, on noisy hosts too
    python -m bench.simulate --fairness      how long short requests take beside what others do
    python -m bench.simulate --autoscaling   workers that follow a daily curve; writes autoscaling.{md,png}
    python -m bench.simulate --claims        how far ahead a worker must claim, and in which order

It runs the service's own scheduler, planner and admission, and prints by strategy and load: attainment
(answers within their deadline, over all requests: a refusal is a miss), latency as a share of the deadline,
goodput, refusals, mean quality of the answers (lower is better) and the share of them that got all their
steps. Writes bench/results/simulate.{json,png}.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from ditserve.bench import report
from ditserve.bench.load.workload import PROCESSES, Traffic
from ditserve.bench.plots import Panel, draw_panels
from ditserve.bench.simulate import autoscaling
from ditserve.bench.simulate.fairness import (
    SCENARIOS,
    fairness_table,
    shares_by_priority,
    study_fairness,
)
from ditserve.bench.simulate.outcome import SimulationOutcome, simulate
from ditserve.bench.simulate.promises import HOSTS, markdown, study_promises
from ditserve.bench.simulate.scenario import (
    CLAIM_STRATEGIES,
    CURVES,
    LADDERS,
    PATIENT_SLO,
    STRATEGIES,
    SimulatedCluster,
)

BRIEF_S = 8.0  # of the runs with 64 workers
FILE_WIDTH = 140  # columns of a table that is written to a file
COLUMNS = (
    *("load", "arm", "attained", "p50", "p95", "p99", "goodput/s", "refused", "dropped"),
    *("quality", "full", "waiting", "plan µs"),
)
PANELS = (
    ("attainment", "answered in time, of all requests"),
    ("quality", "mean distance to full quality"),
    ("refused", "refused"),
)


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One strategy (`arm`) under one load."""

    curve: str
    process: str
    load: float
    arm: str
    outcome: SimulationOutcome


def sweep(options: argparse.Namespace, console: Console) -> list[SweepPoint]:
    """Simulate every strategy at every load, and print a table for each curve and arrival process."""
    points: list[SweepPoint] = []
    for curve in options.curves:
        cluster = SimulatedCluster(CURVES[curve], LADDERS[options.ladder], options.workers, options.slo)
        for process in options.processes:
            traffic = Traffic(process, refusing=options.refusing, clips=options.clips)
            pair = []
            for load in options.loads:
                for strategy in STRATEGIES:
                    outcomes = [
                        simulate(strategy, cluster, traffic, load, n=options.requests, seed=seed)
                        for seed in options.seeds
                    ]
                    mean = SimulationOutcome.mean(outcomes)
                    pair.append(SweepPoint(curve, process, load, strategy.name, mean))
            title = f"{curve}, {process}, {options.workers} worker(s), SLO {options.slo:g}×"
            console.print(outcome_table(title, pair))
            points += pair
    return points


def claims(options: argparse.Namespace, console: Console) -> list[SweepPoint]:
    """Simulate a deep queue with every number of claimed samples and every order of claims."""
    cluster = SimulatedCluster(CURVES["gpu"], LADDERS[options.ladder], 2, PATIENT_SLO)
    n, seed = 3 * options.requests, options.seeds[0]
    points = [
        SweepPoint(
            "gpu", "poisson", 1.4, strategy.name, simulate(strategy, cluster, Traffic(), 1.4, n=n, seed=seed)
        )
        for strategy in CLAIM_STRATEGIES
    ]
    console.print(outcome_table("samples a worker claims, and the order of claims", points))
    return points


def promises() -> str:
    """Simulate quiet and noisy hosts at several loads; return the table."""
    outcomes = [
        study_promises(workers, host, load, returning=returning)
        for workers in (1, 2, 4)
        for host in HOSTS
        for load, returning in ((0.5, False), (1.5, False), (3.0, False), (3.0, True))
    ]
    outcomes += [study_promises(4, host, 3.0, apis=apis) for host in HOSTS for apis in (2, 4)]
    outcomes += [study_promises(64, host, 1.5, seconds=BRIEF_S) for host in HOSTS]
    return markdown(outcomes)


def fairness() -> str:
    """Simulate short requests beside other work; return the table."""
    outcomes = [study_fairness(scenario, curve) for scenario in SCENARIOS for curve in CURVES]
    return fairness_table(outcomes, shares_by_priority("tiny"))


def autoscale() -> str:
    """Simulate a day under every signal; draw the workers over the hours, and return the table."""
    outcomes = [autoscaling.study_autoscaling(signal) for signal in autoscaling.SIGNALS]
    lines = {outcome.signal: outcome.steps_of_numbers() for outcome in outcomes}
    panel = Panel("workers that serve", lines)
    target = report.result_path("autoscaling.png")
    draw_panels([[panel]], target, size=(8, 3.6), legend_columns=4, dpi=80, x="hours")
    return autoscaling.markdown(outcomes)


def outcome_table(title: str, points: Iterable[SweepPoint]) -> Table:
    table = report.table(title, COLUMNS, [], text={"arm"})
    last = None
    for point in points:
        o = point.outcome
        if last not in (None, point.load):
            table.add_section()
        last = point.load
        shares = (o.p50, o.p95, o.p99, o.goodput_per_s, o.refused, o.dropped, o.quality, o.full_steps)
        numbers = (f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in shares)
        counts = (f"{o.queue_peak:.0f}", f"{o.plan_us:.0f}")
        table.add_row(f"{point.load:g}", point.arm, f"{o.attainment:.3f}", *numbers, *counts)
    return table


def panel_rows(points: Sequence[SweepPoint]) -> list[list[Panel]]:
    """Return one row of panels for each curve and arrival process, with one line for each strategy."""
    rows = []
    for curve, process in dict.fromkeys((point.curve, point.process) for point in points):
        pair = [point for point in points if (point.curve, point.process) == (curve, process)]
        row = []
        for field, title in PANELS:
            lines = {
                arm: [(p.load, getattr(p.outcome, field)) for p in pair if p.arm == arm]
                for arm in dict.fromkeys(point.arm for point in pair)
            }
            row.append(Panel(f"{curve}, {process}: {title}", lines))
        rows.append(row)
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("simulate", __doc__)
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
        "--clips",
        type=float,
        default=0.0,
        help="share of requests for clips, of 8 times the tokens of a still",
    )
    parser.add_argument(
        "--claims", action="store_true", help="instead: how far ahead and in which order to claim"
    )
    parser.add_argument(
        "--promises", action="store_true", help="instead: how many accepted deadlines are broken"
    )
    parser.add_argument(
        "--fairness", action="store_true", help="instead: how long short requests take beside others"
    )
    parser.add_argument(
        "--autoscaling", action="store_true", help="instead: how workers follow a daily curve"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)

    def work() -> None:
        if options.promises:
            report.result_path("promises.md").write_text(promises())
            return
        if options.autoscaling:
            report.result_path("autoscaling.md").write_text(autoscale())
            return
        if options.fairness:
            report.result_path("fairness.md").write_text(fairness())
            return
        name, study = ("claims", claims) if options.claims else ("simulate", sweep)
        points = study(options, console)
        # Simulated time does not depend on the machine, so the record leaves it out.
        record = {"options": report.plain(options), "points": [asdict(point) for point in points]}
        report.write_json(report.result_path(f"{name}.json"), record)
        if name == "simulate":
            rows = panel_rows(points)
            size = (12, 3.2 * len(rows))
            draw_panels(rows, report.result_path("simulate.png"), size=size, legend_columns=6, dpi=80)

    return report.run_command("simulate", work)


if __name__ == "__main__":
    sys.exit(main())
