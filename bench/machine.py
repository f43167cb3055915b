"""How much of what this machine can multiply a denoising step really uses.

    python -m bench.machine [NETWORK …] [--threads 1] [--batches 1 2 4 8 16 32] [--rounds 3] [--compiled]

The peak is the best single-precision product of large matrices that torch, NumPy's BLAS and ONNX Runtime reach with as many threads;
a step's operations are those of the backbone alone (`python -m model.describe`), since the conditioner's are cached in service.
NETWORKs are bundles, or published sizes such as DiT-S/2, which get random weights. In each round every runtime runs every batch, and
right before it the peak is measured again, so that what slows the machine slows both; the share is the median over the rounds. With
one thread both are timed in processor time, which other tenants do not use up; with more, by the clock. Beside that stands
where ONNX Runtime spends a step, by operator. Writes bench/results/machine.{json,png}.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ditserve.bench.operators import operator_shares, product_share
from ditserve.bench.peak import Peak
from ditserve.bench.plots import RESULTS, draw_lines
from ditserve.bench.random_bundle import random_bundle
from ditserve.bench.record import Neighbours, save
from ditserve.model.nets.cost import cost
from ditserve.model.spec.bundle import BACKBONE, MANIFEST, Bundle, BundleError, Manifest
from ditserve.model.spec.dit_config import published_config
from ditserve.service.backends import Backend, BackendUnavailable, load_backend

Floats = npt.NDArray[np.float32]

NETWORKS = ("DiT-S/2", "model/zoo/emoji")
GOAL = 0.7
PROFILED = (1, 8)  # rows
LONG_S = 0.5  # a pass that takes longer is timed once a round, a shorter one thrice
CHOSEN: dict[str, dict[str, Any]] = {
    "onnx": {"precision": "fp32"},
    "torch": {},
    "torch compiled": {"compile": True},
}


@dataclass(frozen=True, slots=True)
class Arm:
    """A network in a runtime."""

    network: str
    runtime: str
    backend: Backend
    flops: int  # of a row

    @property
    def name(self) -> str:
        return f"{self.network}, {self.runtime}"


@dataclass(frozen=True, slots=True)
class Point:
    """Of one batch size, medians over the rounds: milliseconds a row, GFLOP/s, and the share of the peak of that moment."""

    network: str
    runtime: str
    rows: int
    row_ms: float
    gflops_per_s: float
    share: float


def inputs(manifest: Manifest, rows: int, *, seed: int = 0) -> tuple[Floats, tuple[Floats, ...]]:
    """Latents and condition state of so many rows, drawn at random."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, manifest.config.in_channels, *manifest.config.image_size), np.float32)
    return x, tuple(0.1 * random.standard_normal((rows, *each.shape), np.float32) for each in manifest.state)


def open_bundle(name: str, folder: Path, *, half: bool = False) -> Bundle:
    """The bundle in the folder `name`, or one of that size written to `folder`, also in `half` precision.

    Raises:
        ValueError: neither a bundle nor a published size.
    """
    if (Path(name) / MANIFEST).is_file():
        return Bundle.open(name)
    return random_bundle(published_config(name), folder, half=half)


def arms(bundles: Mapping[str, Bundle], runtimes: Sequence[str], threads: int) -> Iterator[Arm]:
    for network, bundle in bundles.items():
        flops = 2 * cost(bundle.manifest.config).backbone_macs
        for runtime in runtimes:
            backend = load_backend(runtime.split()[0], bundle, threads=threads, **CHOSEN[runtime])
            yield Arm(network, runtime, backend, flops)


def measure(
    chosen: Sequence[Arm],
    batches: Sequence[int],
    *,
    rounds: int,
    peak: Peak,
    clock: Callable[[], float],
    console: Console,
) -> list[Point]:
    """Every arm at every batch, in turns."""
    fed = {(arm.name, rows): inputs(arm.backend.manifest, rows) for arm in chosen for rows in batches}
    for arm in chosen:  # the first run of a size pays for its memory, or compiles it
        for rows in batches:
            arm.backend.denoise(*fed[arm.name, rows])
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in fed}
    peaks: dict[tuple[str, int], list[float]] = {key: [] for key in fed}
    for _ in track(range(rounds), "rounds", console=console, transient=True):
        for arm in chosen:
            for rows in batches:
                peaks[arm.name, rows].append(peak.now())
                seconds[arm.name, rows].append(_best(arm.backend, fed[arm.name, rows], clock))
    return [
        _point(arm, rows, np.array(seconds[arm.name, rows]), np.array(peaks[arm.name, rows]))
        for arm in chosen
        for rows in batches
    ]


def _best(backend: Backend, fed: tuple[Floats, tuple[Floats, ...]], clock: Callable[[], float]) -> float:
    """Seconds of a pass: the best of a few, as for the peak."""
    times: list[float] = []
    while len(times) < 3 and (not times or times[-1] < LONG_S):
        began = clock()
        backend.denoise(*fed)
        times.append(clock() - began)
    return min(times)


def _point(arm: Arm, rows: int, seconds: npt.NDArray[np.float64], peaks: npt.NDArray[np.float64]) -> Point:
    rates = rows * arm.flops / seconds / 1e9
    return Point(
        network=arm.network,
        runtime=arm.runtime,
        rows=rows,
        row_ms=float(1e3 * np.median(seconds) / rows),
        gflops_per_s=float(np.median(rates)),
        share=float(np.median(rates / peaks)),
    )


def profiles(bundles: Mapping[str, Bundle], threads: int, folder: Path) -> dict[str, dict[str, float]]:
    """Network and rows → where ONNX Runtime spends a step."""
    found = {}
    for network, bundle in bundles.items():
        for rows in PROFILED:
            x, state = inputs(bundle.manifest, rows)
            fed = {"x": x} | {
                each.name: array for each, array in zip(bundle.manifest.state, state, strict=True)
            }
            graph = bundle.file(BACKBONE)
            found[f"{network}, {rows} row(s)"] = operator_shares(graph, fed, threads=threads, folder=folder)
    return found


def _table(points: Sequence[Point], peak: Peak, threads: int) -> Table:
    best = peak.rates[peak.library, peak.side]
    table = Table(
        title=f"share of the peak, {threads} thread(s); peak {best:.0f} GFLOP/s ({peak.library}, {peak.side}²); goal ≥ {GOAL:.0%}"
    )
    for column in ("network", "runtime", "rows", "ms a row", "GFLOP/s", "of the peak"):
        table.add_column(column, justify="left" if column in ("network", "runtime") else "right")
    for each in points:
        figures = (f"{each.row_ms:.2f}", f"{each.gflops_per_s:.1f}", f"{each.share:.1%}")
        table.add_row(each.network, each.runtime, str(each.rows), *figures)
    return table


def _operator_table(found: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(title="share of ONNX Runtime's time, by operator")
    table.add_column("operator")
    for name in found:
        table.add_column(name, justify="right")
    operators = dict.fromkeys(each for shares in found.values() for each in shares)
    for operator in sorted(operators, key=lambda each: -max(s.get(each, 0.0) for s in found.values())):
        table.add_row(operator, *(f"{shares.get(operator, 0.0):.1%}" for shares in found.values()))
    table.add_section()
    table.add_row("all matrix products", *(f"{product_share(shares):.1%}" for shares in found.values()))
    return table


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.machine", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="torch.compile as well: it takes minutes")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 done, 2 refused with one sentence on stderr."""
    options, console, neighbours = parse(arguments), Console(), Neighbours()
    clock = time.process_time if options.threads == 1 else time.perf_counter
    runtimes = [name for name in CHOSEN if options.compiled or name != "torch compiled"]
    try:
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dit-")))
            places = {name: scratch / str(k) for k, name in enumerate(options.networks)}
            bundles = {name: open_bundle(name, place) for name, place in places.items()}
            chosen = list(arms(bundles, runtimes, options.threads))
            peak = Peak(threads=options.threads, clock=clock)
            points = measure(
                chosen, options.batches, rounds=options.rounds, peak=peak, clock=clock, console=console
            )
            operators = profiles(bundles, options.threads, scratch)
    except (BackendUnavailable, BundleError, ValueError) as error:
        print(f"bench.machine: {error}", file=sys.stderr)
        return 2
    console.print(_table(points, peak, options.threads))
    console.print(_operator_table(operators))
    rates = {f"{library} {side}": rate for (library, side), rate in peak.rates.items()}
    figures = {
        "peak_gflops_per_s": rates,
        "points": [asdict(each) for each in points],
        "operators": operators,
    }
    save("machine", vars(options), neighbours, figures)
    lines = {
        arm.name: [(p.rows, p.share) for p in points if (p.network, p.runtime) == (arm.network, arm.runtime)]
        for arm in chosen
    }
    draw_lines(
        lines, RESULTS / "machine.png", x="rows of a step", y="share of the matrix-product peak", level=GOAL
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
