"""Measure how long a thread waits to run again, beside threads that encode images or only compute in Python.

    python -m bench.handover [--waits 400] [--work encode python]

The engine's thread gives up the interpreter while a step is computed, and needs it back at once when that is
done. It is measured here by a thread that sleeps for half a millisecond and is late. Python makes another
thread hand over after an interval: its default, and that of a worker, are compared, in turns. Writes
bench/results/handover.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from threading import Event, Thread

import numpy as np
from rich.console import Console

from ditserve.bench import report
from ditserve.service.images import encode
from ditserve.service.worker.main import SWITCH_S

NAP_S = 0.0005
DEFAULT_S = 0.005  # of Python
SIDE = 64  # of the images that are encoded


@dataclass(frozen=True, slots=True)
class Lateness:
    """The microseconds by which a thread runs later than it could, beside some work."""

    work: str
    interval_ms: float
    p50_us: float
    p90_us: float
    p99_us: float


def _nothing(stop: Event) -> None:
    stop.wait()


def _encode(stop: Event) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    while not stop.is_set():
        encode(pixels, "png", metadata={"seed": "1"})


def _compute(stop: Event) -> None:
    while not stop.is_set():
        sum(range(1000))


WORK: dict[str, Callable[[Event], None]] = {"nothing": _nothing, "encode": _encode, "python": _compute}


@contextmanager
def beside(work: str, interval_s: float) -> Iterator[None]:
    """Let a thread work meanwhile, with that interval."""
    stop, before = Event(), sys.getswitchinterval()
    thread = Thread(target=WORK[work], args=(stop,))
    sys.setswitchinterval(interval_s)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(before)


def lateness(work: str, interval_s: float, waits: int) -> Lateness:
    late = []
    with beside(work, interval_s):
        for _ in range(waits):
            began = time.perf_counter()
            time.sleep(NAP_S)
            late.append(1e6 * (time.perf_counter() - began - NAP_S))
    p50, p90, p99 = (float(value) for value in np.percentile(late, [50, 90, 99]))
    return Lateness(work, 1e3 * interval_s, p50, p90, p99)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("handover", __doc__)
    parser.add_argument("--waits", type=int, default=400)
    parser.add_argument("--work", nargs="+", choices=list(WORK), default=list(WORK))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, background = parse(arguments), report.BackgroundLoad()

    def work() -> None:
        found = [
            lateness(name, interval_s, options.waits)
            for name in options.work
            for interval_s in (DEFAULT_S, SWITCH_S)
        ]
        cells = [
            (one.work, f"{one.interval_ms:g}", *(f"{us:.0f}" for us in (one.p50_us, one.p90_us, one.p99_us)))
            for one in found
        ]
        columns = ("beside", "interval, ms", "late by p50 µs", "p90 µs", "p99 µs")
        Console(width=110).print(report.table("a thread that wants to run", columns, cells, text={"beside"}))
        report.save("handover", options, background, {"lateness": [asdict(one) for one in found]})

    return report.run_command("handover", work)


if __name__ == "__main__":
    sys.exit(main())
