"""How long a step takes on a GPU by its rows, and how much of that is the GPU's own.

    python -m bench.gpu [NETWORK …] [--runtimes "onnx fp16" …] [--rows 1 2 4 …] [--passes 30]

A pass is timed as the service runs it, arrays of the host going in and coming out; for ONNX Runtime also with everything on the device
already: the rest is copies and the bus. Beside it stands what a call of the conditioner takes on either side. The shares are of the best
product of large matrices in the same precision, which torch reaches without TF32. NETWORKs are bundles, or published sizes such as
DiT-XL/2, which get random weights. Writes bench/results/gpu.{json,png}.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from threading import Lock
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ditserve.bench.machine import inputs, open_bundle
from ditserve.bench.plots import RESULTS, draw_lines
from ditserve.bench.record import Neighbours, save
from ditserve.model.nets.cost import cost
from ditserve.model.spec.bundle import Bundle, BundleError
from ditserve.model.spec.engine_cache import NoGpuError, first_gpu
from ditserve.service.backends import CONDITIONER_ROWS_GPU, BackendUnavailable, load_backend
from ditserve.service.backends.onnx import AuxiliaryGraphs, open_cuda_graph
from ditserve.service.backends.sessions import CPU, CUDA, session_options

NETWORKS = ("model/zoo/emoji", "DiT-XL/2")
SIDE, PRODUCTS = 8192, 10  # of the product that is the peak
RUNTIMES: dict[str, dict[str, Any]] = {
    "onnx fp16": {"precision": "fp16", "providers": (CUDA, CPU)},
    "onnx fp32": {"precision": "fp32", "providers": (CUDA, CPU)},
    "torch": {"device": "cuda"},
    "torch compiled": {"device": "cuda", "compile": True},
}
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Point:
    """Medians: milliseconds of a pass, and with its inputs and output on the device where that could be had; share of the peak."""

    network: str
    runtime: str
    rows: int
    pass_ms: float
    device_ms: float | None
    share: float


def peak(precision: str) -> float:
    """FLOP/s of a product of large matrices."""
    torch.backends.cuda.matmul.allow_tf32 = False
    a, b = torch.randn(2, SIDE, SIDE, device="cuda", dtype=DTYPES[precision])
    times = []
    for _ in range(PRODUCTS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        torch.mm(a, b)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * SIDE**3 / median(times[PRODUCTS // 2 :])


def measure(
    bundle: Bundle, network: str, runtime: str, counts: Sequence[int], passes: int, peaks: dict[str, float]
) -> list[Point]:
    """Every batch size of a network in a runtime.

    Raises:
        BackendUnavailable: the runtime cannot run here.
        BundleError: the bundle has no graph of its precision.
    """
    backend = load_backend(runtime.split()[0], bundle, **RUNTIMES[runtime])
    graph = (
        open_cuda_graph(bundle, backend.precision, (CUDA, CPU), Lock()) if backend.name == "onnx" else None
    )
    flops = 2 * cost(bundle.manifest.config).backbone_macs
    names = [each.name for each in bundle.manifest.state]
    points = []
    for rows in counts:
        x, state = inputs(bundle.manifest, rows)
        whole = timed(partial(backend.denoise, x, state), passes)
        inside = None
        if graph is not None:
            graph.run(["output"], {"x": x, **dict(zip(names, state, strict=True))})
            inside = timed(partial(graph.replay, rows), passes)
        share = rows * flops / (inside or whole) / peaks[backend.precision]
        points.append(Point(network, runtime, rows, 1e3 * whole, inside and 1e3 * inside, share))
    backend.close()
    return points


def conditioners(bundle: Bundle, passes: int) -> dict[str, float]:
    """Milliseconds that a call of the conditioner takes, on the host's processors and on the GPU."""
    found = {}
    timesteps, embeddings = (
        np.full(CONDITIONER_ROWS_GPU, 500.0, np.float32),
        np.zeros((CONDITIONER_ROWS_GPU, bundle.manifest.embedding_size), np.float32),
    )
    for name, providers in (("CPU", (CPU,)), ("GPU", (CUDA, CPU))):
        graphs = AuxiliaryGraphs(bundle, session_options(0), providers)
        found[name] = 1e3 * timed(partial(graphs.modulate, timesteps, embeddings), passes)
    return found


def timed(run: Callable[[], object], passes: int) -> float:
    """Median seconds; a tenth as many runs, three at least, come first and do not count."""
    times = []
    for _ in range(passes + max(3, passes // 10)):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return median(times[-passes:])


def _table(points: Sequence[Point], gpu: str, peaks: dict[str, float]) -> Table:
    told = ", ".join(f"{rate / 1e12:.0f} TFLOP/s {name}" for name, rate in peaks.items())
    table = Table(title=f"steps on {gpu}; peak {told}")
    for column in ("network", "runtime", "rows", "ms a pass", "on the device", "rows/s", "of the peak"):
        table.add_column(column, justify="left" if column in ("network", "runtime") else "right")
    for each in points:
        inside = "" if each.device_ms is None else f"{each.device_ms:.2f}"
        figures = (
            f"{each.pass_ms:.2f}",
            inside,
            f"{1e3 * each.rows / each.pass_ms:.0f}",
            f"{each.share:.1%}",
        )
        table.add_row(each.network, each.runtime, str(each.rows), *figures)
    return table


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument(
        "--runtimes", nargs="+", choices=list(RUNTIMES), default=list(RUNTIMES), metavar="RUNTIME"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--passes", type=int, default=30)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 done, 2 refused with one sentence on stderr."""
    options, console, neighbours = parse(arguments), Console(width=140), Neighbours()
    points: list[Point] = []
    condition: dict[str, dict[str, float]] = {}
    try:
        gpu = first_gpu()
        peaks = {name: peak(name) for name in DTYPES}
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dit-")))
            for k, network in enumerate(options.networks):
                bundle = open_bundle(network, scratch / str(k), half=True)
                name = Path(network).name if Path(network).is_dir() else network
                condition[name] = conditioners(bundle, options.passes)
                console.print(
                    f"{name}: the conditioner takes {condition[name]} ms for {CONDITIONER_ROWS_GPU} rows"
                )
                for runtime in options.runtimes:
                    points += measure(bundle, name, runtime, options.rows, options.passes, peaks)
                    console.print(_table(points[-len(options.rows) :], gpu.name, peaks))
    except (BackendUnavailable, BundleError, NoGpuError, ValueError) as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return 2
    figures = {
        "gpu": asdict(gpu),
        "peak_flops_per_s": peaks,
        "points": [asdict(each) for each in points],
        "conditioner_ms": condition,
    }
    save("gpu", vars(options), neighbours, figures)
    lines = {
        f"{network}, {runtime}": [
            (p.rows, p.share) for p in points if (p.network, p.runtime) == (network, runtime)
        ]
        for network, runtime in dict.fromkeys((p.network, p.runtime) for p in points)
    }
    draw_lines(
        lines, RESULTS / "gpu.png", x="rows of a step", y="share of the matrix-product peak", level=0.7
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
