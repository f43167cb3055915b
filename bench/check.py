"""Has it become slower? The cheap ratios, measured anew and held against those on record: `make bench-check`.

    python -m bench.check [--bundle model/zoo/emoji] [--record]

Ratios of two things measured side by side, since absolute times differ from machine to machine and from hour to hour. No gate: what
is worse by more than its tolerance is named, and the status is 0 unless something could not be measured. `--record` keeps what was
found, in bench/results/check.json.
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

from ditserve.bench import engine_overhead, growth, machine, overhead_http
from ditserve.bench.peak import Peak
from ditserve.bench.record import Neighbours, read, save
from ditserve.model.spec.bundle import Bundle
from ditserve.service.backends import load_backend
from ditserve.service.backends.sessions import BACKBONES

Figures = dict[str, float]
ROWS = 8
NETWORK_ROWS = (1, 8)
DEPTHS, WORKERS = (1, 1000), (1, 64)


@dataclass(frozen=True, slots=True)
class Ratio:
    """`tolerance`: the relative change that neighbours and chance alone may make."""

    name: str
    better: str  # "more" or "less"
    tolerance: float


@dataclass(frozen=True, slots=True)
class Verdict:
    ratio: Ratio
    recorded: float | None
    now: float

    @property
    def change(self) -> float | None:
        """Relative, positive for better."""
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


def of_engine(bundle: Bundle) -> Figures:
    backend = load_backend("onnx", bundle, threads=1, precision="fp32")
    own = float(np.median(engine_overhead.overhead(bundle.manifest, rows=ROWS, steps=400)))
    step = float(np.median(engine_overhead.network(backend, rows=ROWS, passes=10)))
    strict = engine_overhead.price(backend, rows=ROWS, images=6).ratio
    return {OVERHEAD.name: own / step, STRICT.name: strict}


def of_network(bundle: Bundle) -> Figures:
    runtimes = ["onnx", "torch"]
    arms = list(machine.arms({"bundle": bundle}, runtimes, threads=1))
    peak = Peak(threads=1, clock=time.process_time)
    points = machine.measure(
        arms, NETWORK_ROWS, rounds=5, peak=peak, clock=time.process_time, console=Console(quiet=True)
    )
    found = {(each.runtime, each.rows): each for each in points}
    figures = {ratio.name: found["onnx", rows].share for rows, ratio in PEAK.items()}
    figures[TORCH.name] = found["torch", ROWS].row_ms / found["onnx", ROWS].row_ms
    if BACKBONES["int8"] in bundle.manifest.files:
        int8 = load_backend("onnx", bundle, threads=1, precision="int8")
        times = np.median(engine_overhead.network(int8, rows=ROWS))
        figures[INT8.name] = float(times) / (ROWS * found["onnx", ROWS].row_ms)
    return figures


def of_service(bundle: Bundle) -> Figures:
    options = overhead_http.parse([f"--bundle={bundle.path}", "--rounds=3", "--requests=300"])
    found = overhead_http.summary(asyncio.run(overhead_http.run(options, Console(quiet=True))))
    spent = sum(value for name, value in found[overhead_http.NOOP].items() if "processor" in name)
    backend = load_backend("onnx", bundle, threads=1, precision="fp32")
    row = float(np.median(engine_overhead.network(backend, rows=ROWS, passes=5))) / ROWS
    return {RATE.name: found["ratio"]["per_s"], SERVICE.name: spent / row}


def of_growth(bundle: Bundle) -> Figures:
    del bundle
    found = {(each.event, each.size): each.microseconds for each in asyncio.run(growth.queue(DEPTHS, 60))}
    few, many = DEPTHS
    decisions = [growth.admission(workers, 20).microseconds for workers in WORKERS]
    return {
        QUEUE.name: found["submit", many] / found["submit", few],
        WORST.name: found["submit before all of one caller", many] / found["submit", few],
        ADMISSION.name: decisions[1] / decisions[0],
    }


STUDIES: tuple[Callable[[Bundle], Figures], ...] = (of_engine, of_network, of_service, of_growth)


def run(bundle: Bundle, console: Console) -> tuple[Figures, bool]:
    """What could be measured, and whether all of it could."""
    figures: Figures = {}
    whole = True
    for study in STUDIES:
        with console.status(study.__name__.removeprefix("of_")):
            try:
                figures |= study(bundle)
            except Exception:  # one that fails must not hide the others
                traceback.print_exc()
                whole = False
    return figures, whole


def judge(figures: Figures, recorded: Figures) -> Iterator[Verdict]:
    for ratio in RATIOS:
        if ratio.name in figures:
            yield Verdict(ratio, recorded.get(ratio.name), figures[ratio.name])


def _table(verdicts: Sequence[Verdict]) -> Table:
    table = Table(title="ratios against bench/results/check.json")
    for column in ("ratio", "better is", "recorded", "now", "change", ""):
        table.add_column(column, justify="right" if column in ("recorded", "now", "change") else "left")
    for each in verdicts:
        recorded = "" if each.recorded is None else f"{each.recorded:.3g}"
        change = "" if each.change is None else f"{each.change:+.0%}"
        style = "red" if each.word == "WORSE" else None
        table.add_row(
            each.ratio.name, each.ratio.better, recorded, f"{each.now:.3g}", change, each.word, style=style
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0, or 1 if something could not be measured."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.check", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--bundle", type=Path, default=Path("model/zoo/emoji"))
    parser.add_argument("--record", action="store_true", help="keep what is found, to be held against later")
    options, console, neighbours = parser.parse_args(arguments), Console(), Neighbours()
    figures, whole = run(Bundle.open(options.bundle), console)
    recorded = (read("check") or {}).get("ratios", {})
    console.print(_table(list(judge(figures, recorded))))
    told = neighbours.told()
    console.print(f"other processes used {told['share_of_others']:.0%} of the machine meanwhile")
    if options.record and whole:
        save("check", vars(options), neighbours, {"ratios": figures})
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
