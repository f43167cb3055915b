"""Check whether anything has become slower: compare the cheap ratios with those on record.

    make bench-check
    python -m bench.check [--bundle model/zoo/emoji64] [--record]

Each ratio compares two things that are measured side by side, since absolute times differ from machine to
machine and from hour to hour. This is no gate: it names what is worse by more than its tolerance, and the
status is 0 unless something could not be measured. `--record` keeps the ratios, in bench/results/check.json.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ditserve.bench import engine_overhead, growth, overhead_http, report
from ditserve.bench.machine.matmul_peak import MatmulPeak
from ditserve.bench.machine.step_times import load_networks, step_times
from ditserve.model.spec.bundle import Bundle
from ditserve.service.backends import load_backend
from ditserve.service.backends.sessions import BACKBONES

Figures = dict[str, float]
ROWS = 8
NETWORK_ROWS = (1, 8)
DEPTHS, WORKERS = (1, 1000), (1, 64)


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio; `better` is "more" or "less", `tolerance` the relative change that chance may make."""

    name: str
    better: str
    tolerance: float


@dataclass(frozen=True, slots=True)
class Verdict:
    ratio: Ratio
    recorded: float | None
    now: float

    @property
    def change(self) -> float | None:
        """The relative change, positive for better."""
        if not self.recorded or not self.now:
            return None
        quotient = self.now / self.recorded if self.ratio.better == "more" else self.recorded / self.now
        return quotient - 1.0

    @property
    def word(self) -> str:
        if self.change is None:
            return "not on record"
        if abs(self.change) <= self.ratio.tolerance:
            return "as recorded"
        return "better" if self.change > 0 else "WORSE"


OVERHEAD = Ratio("engine beside the network, share of a step of 8 rows", "less", 0.3)
STRICT = Ratio("strict to free, processor time an image", "less", 0.15)
PEAK = {rows: Ratio(f"ONNX share of the product peak, {rows} row(s)", "more", 0.15) for rows in NETWORK_ROWS}
TORCH = Ratio("torch to ONNX, time of a step of 8 rows", "more", 0.2)
INT8 = Ratio("INT8 to fp32, time of a step of 8 rows", "less", 0.15)
RATE = Ratio("no-op service to plain ASGI echo, requests/s", "more", 0.4)
SERVICE = Ratio("no-op service, processor time a request, to a row of the network", "less", 0.25)
QUEUE = Ratio("submit with 1,000 waiting to submit with 1", "less", 0.4)
WORST = Ratio("submit before 1,000 of one caller to submit with 1", "less", 0.5)
ADMISSION = Ratio("admission beside 64 workers to beside 1", "less", 0.4)
RATIOS = (OVERHEAD, STRICT, *PEAK.values(), TORCH, INT8, RATE, SERVICE, QUEUE, WORST, ADMISSION)


def engine_ratios(bundle: Bundle) -> Figures:
    backend = load_backend("onnx", bundle, threads=1, precision="fp32")
    own = float(np.median(engine_overhead.engine_ms(bundle.manifest, rows=ROWS, steps=400)))
    step = float(np.median(engine_overhead.network_ms(backend, rows=ROWS, passes=10)))
    strict = engine_overhead.strict_cost(backend, rows=ROWS, images=6).ratio
    return {OVERHEAD.name: own / step, STRICT.name: strict}


def network_ratios(bundle: Bundle) -> Figures:
    networks = list(load_networks({"bundle": bundle}, ["onnx", "torch"], threads=1))
    peak = MatmulPeak(threads=1, clock=time.process_time)
    quiet = Console(quiet=True)
    points = step_times(networks, NETWORK_ROWS, rounds=5, peak=peak, clock=time.process_time, console=quiet)
    by_runtime = {(point.runtime, point.rows): point for point in points}
    figures = {ratio.name: by_runtime["onnx", rows].share for rows, ratio in PEAK.items()}
    figures[TORCH.name] = by_runtime["torch", ROWS].row_ms / by_runtime["onnx", ROWS].row_ms
    if BACKBONES["int8"] in bundle.manifest.files:
        int8 = load_backend("onnx", bundle, threads=1, precision="int8")
        times = np.median(engine_overhead.network_ms(int8, rows=ROWS))
        figures[INT8.name] = float(times) / (ROWS * by_runtime["onnx", ROWS].row_ms)
    return figures


def service_ratios(bundle: Bundle) -> Figures:
    options = overhead_http.parse([f"--bundle={bundle.path}", "--rounds=3", "--requests=300"])
    rounds = asyncio.run(overhead_http.measure(options, Console(quiet=True)))
    medians = overhead_http.medians(rounds)
    spent = sum(overhead_http.processor_times(medians).values())
    backend = load_backend("onnx", bundle, threads=1, precision="fp32")
    row = float(np.median(engine_overhead.network_ms(backend, rows=ROWS, passes=5))) / ROWS
    return {RATE.name: medians["ratio"]["per_s"], SERVICE.name: spent / row}


def growth_ratios(bundle: Bundle) -> Figures:
    del bundle
    times = asyncio.run(growth.queue_times(DEPTHS, 60))
    by_size = {(measured.event, measured.size): measured.microseconds for measured in times}
    few, many = DEPTHS
    decisions = [growth.admission_time(workers, 20).microseconds for workers in WORKERS]
    return {
        QUEUE.name: by_size["submit", many] / by_size["submit", few],
        WORST.name: by_size["submit before all of one caller", many] / by_size["submit", few],
        ADMISSION.name: decisions[1] / decisions[0],
    }


STUDIES: tuple[Callable[[Bundle], Figures], ...] = (
    engine_ratios,
    network_ratios,
    service_ratios,
    growth_ratios,
)


def measure(bundle: Bundle, console: Console) -> tuple[Figures, bool]:
    """Return the ratios that could be measured, and whether all of them could."""
    figures: Figures = {}
    whole = True
    for study in STUDIES:
        with console.status(study.__name__.replace("_", " ")):
            try:
                figures |= study(bundle)
            except Exception:
                # A study that fails must not hide the others.
                traceback.print_exc()
                whole = False
    return figures, whole


def judge(figures: Figures, recorded: Figures) -> Iterator[Verdict]:
    """Yield a verdict on every ratio that was measured."""
    for ratio in RATIOS:
        if ratio.name in figures:
            yield Verdict(ratio, recorded.get(ratio.name), figures[ratio.name])


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    columns = ("ratio", "better is", "recorded", "now", "change", "")
    text = {"ratio", "better is", ""}
    table = report.table("ratios against bench/results/check.json", columns, [], text=text)
    for verdict in verdicts:
        recorded = "" if verdict.recorded is None else f"{verdict.recorded:.3g}"
        change = "" if verdict.change is None else f"{verdict.change:+.0%}"
        style = "red" if verdict.word == "WORSE" else None
        row = (verdict.ratio.name, verdict.ratio.better, recorded, f"{verdict.now:.3g}", change, verdict.word)
        table.add_row(*row, style=style)
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("check", __doc__)
    parser.add_argument("--bundle", type=Path, default=report.DEFAULT_BUNDLE)
    parser.add_argument("--record", action="store_true", help="keep what is found, to be held against later")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if something could not be measured."""
    options, console, background = parse(arguments), Console(), report.BackgroundLoad()
    unmeasured = False

    def work() -> None:
        nonlocal unmeasured
        figures, whole = measure(Bundle.open(options.bundle), console)
        unmeasured = not whole
        recorded = (report.read("check") or {}).get("ratios", {})
        console.print(verdict_table(list(judge(figures, recorded))))
        others = background.shares()["share_of_others"]
        console.print(f"other processes used {others:.0%} of the machine meanwhile")
        if options.record and whole:
            report.save("check", options, background, {"ratios": figures})

    return report.run_command("check", work) or int(unmeasured)


if __name__ == "__main__":
    sys.exit(main())
