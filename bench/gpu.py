"""Measure the time of a step on a GPU by its rows, and the part of it that is the GPU's own.

    python -m bench.gpu [NETWORK …] [--runtimes "onnx fp16" …] [--rows 1 2 4 …] [--passes 30]

A pass is timed as the service runs it, with arrays of the host going in and coming out; for ONNX Runtime also
with everything on the device already: the difference is copies and the bus. Each network's conditioner is
timed on the CPU and on the GPU. The shares are of the best product of large matrices in the same precision,
which torch reaches without TF32. NETWORKs are bundles, or published sizes such as DiT-XL/2, which get random
weights. Writes bench/results/gpu.{json,png}.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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

from ditserve.bench import report
from ditserve.bench.machine.networks import inputs, opened_bundles, row_flops
from ditserve.bench.plots import draw_peak_shares
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.engine_cache import first_gpu
from ditserve.service.backends import CONDITIONER_ROWS_GPU, load_backend
from ditserve.service.backends.onnx import AuxiliaryGraphs, open_cuda_graph
from ditserve.service.backends.sessions import CPU, CUDA, session_options

NETWORKS = (str(report.DEFAULT_BUNDLE), "DiT-XL/2")
GOAL = 0.7
PRODUCT_SIDE, PRODUCTS = 8192, 10  # of the matrices whose product is the peak
RUNTIMES: dict[str, dict[str, Any]] = {
    "onnx fp16": {"precision": "fp16", "providers": (CUDA, CPU)},
    "onnx fp32": {"precision": "fp32", "providers": (CUDA, CPU)},
    "torch": {"device": "cuda"},
    "torch compiled": {"device": "cuda", "compile": True},
}
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class GpuStepTime:
    """Median milliseconds of a pass, and with inputs and output on the device; share of the peak."""

    network: str
    runtime: str
    rows: int
    pass_ms: float
    device_ms: float | None
    share: float


def gpu_peak(precision: str) -> float:
    """Return the FLOP/s of a product of large matrices."""
    torch.backends.cuda.matmul.allow_tf32 = False
    a, b = torch.randn(2, PRODUCT_SIDE, PRODUCT_SIDE, device="cuda", dtype=DTYPES[precision])
    times = []
    for _ in range(PRODUCTS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        torch.mm(a, b)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * PRODUCT_SIDE**3 / median(times[PRODUCTS // 2 :])


def gpu_step_times(
    bundle: Bundle,
    network: str,
    runtime: str,
    batches: Sequence[int],
    *,
    passes: int,
    peaks: Mapping[str, float],
) -> list[GpuStepTime]:
    """Time a network in a runtime at every batch size.

    Raises:
        BackendUnavailable: the runtime cannot run here.
        BundleError: the bundle has no graph of its precision.
    """
    backend = load_backend(runtime.split()[0], bundle, **RUNTIMES[runtime])
    graph = None
    if backend.name == "onnx":
        graph = open_cuda_graph(bundle, backend.precision, (CUDA, CPU), Lock())
    flops = row_flops(bundle)
    names = [tensor.name for tensor in bundle.manifest.state]
    points = []
    for rows in batches:
        x, state = inputs(bundle.manifest, rows)
        pass_s = median_seconds(partial(backend.denoise, x, state), passes)
        device_s = None
        if graph is not None:
            graph.run(["output"], {"x": x, **dict(zip(names, state, strict=True))})
            device_s = median_seconds(partial(graph.replay, rows), passes)
        share = rows * flops / (device_s or pass_s) / peaks[backend.precision]
        device_ms = None if device_s is None else 1e3 * device_s
        points.append(GpuStepTime(network, runtime, rows, 1e3 * pass_s, device_ms, share))
    backend.close()
    return points


def conditioner_ms(bundle: Bundle, passes: int) -> dict[str, float]:
    """Return the milliseconds of a call of the conditioner on the CPU and on the GPU."""
    timesteps = np.full(CONDITIONER_ROWS_GPU, 500.0, np.float32)
    embeddings = np.zeros((CONDITIONER_ROWS_GPU, bundle.manifest.embedding_size), np.float32)
    milliseconds = {}
    for name, providers in (("CPU", (CPU,)), ("GPU", (CUDA, CPU))):
        graphs = AuxiliaryGraphs(bundle, session_options(0), providers)
        milliseconds[name] = 1e3 * median_seconds(partial(graphs.modulate, timesteps, embeddings), passes)
    return milliseconds


def median_seconds(run: Callable[[], object], passes: int) -> float:
    """Return the median seconds of `passes` runs, after a tenth as many uncounted ones, three at least."""
    times = []
    for _ in range(passes + max(3, passes // 10)):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return median(times[-passes:])


def step_table(points: Sequence[GpuStepTime], gpu: str, peaks: Mapping[str, float]) -> Table:
    rates = ", ".join(f"{rate / 1e12:.0f} TFLOP/s {name}" for name, rate in peaks.items())
    rows = [
        (
            point.network,
            point.runtime,
            str(point.rows),
            f"{point.pass_ms:.2f}",
            "" if point.device_ms is None else f"{point.device_ms:.2f}",
            f"{1e3 * point.rows / point.pass_ms:.0f}",
            f"{point.share:.1%}",
        )
        for point in points
    ]
    columns = ("network", "runtime", "rows", "ms a pass", "on the device", "rows/s", "of the peak")
    return report.table(f"steps on {gpu}; peak {rates}", columns, rows, text={"network", "runtime"})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("gpu", __doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument(
        "--runtimes", nargs="+", choices=list(RUNTIMES), default=list(RUNTIMES), metavar="RUNTIME"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--passes", type=int, default=30)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, console, background = parse(arguments), Console(width=140), report.BackgroundLoad()

    def work() -> None:
        gpu = first_gpu()
        peaks = {name: gpu_peak(name) for name in DTYPES}
        points: list[GpuStepTime] = []
        conditioner: dict[str, dict[str, float]] = {}
        with opened_bundles(options.networks, half=True) as bundles:
            for network, bundle in bundles.items():
                name = Path(network).name if Path(network).is_dir() else network
                conditioner[name] = conditioner_ms(bundle, options.passes)
                rows = CONDITIONER_ROWS_GPU
                console.print(f"{name}: the conditioner takes {conditioner[name]} ms for {rows} rows")
                for runtime in options.runtimes:
                    points += gpu_step_times(
                        bundle, name, runtime, options.rows, passes=options.passes, peaks=peaks
                    )
                    console.print(step_table(points[-len(options.rows) :], gpu.name, peaks))
        figures = {
            "gpu": asdict(gpu),
            "peak_flops_per_s": peaks,
            "points": [asdict(point) for point in points],
            "conditioner_ms": conditioner,
        }
        report.save("gpu", options, background, figures)
        shares = [(f"{p.network}, {p.runtime}", p.rows, p.share) for p in points]
        draw_peak_shares(shares, report.result_path("gpu.png"), goal=GOAL)

    return report.run_command("gpu", work)


if __name__ == "__main__":
    sys.exit(main())
