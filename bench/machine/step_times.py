"""The time of a denoising step by its rows, and its share of the matrix-multiply peak."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from ditserve.bench.machine.matmul_peak import MatmulPeak
from ditserve.bench.machine.networks import Floats, inputs, row_flops
from ditserve.model.spec.bundle import Bundle
from ditserve.service.backends import Backend, load_backend

LONG_PASS_S = 0.5  # a longer pass is timed once a round, a shorter one three times
RUNTIMES: dict[str, dict[str, Any]] = {
    "onnx": {"precision": "fp32"},
    "torch": {},
    "torch compiled": {"compile": True},
}


@dataclass(frozen=True, slots=True)
class NetworkUnderTest:
    """A network in a runtime, and its operations a row."""

    network: str
    runtime: str
    backend: Backend
    flops: int

    @property
    def name(self) -> str:
        return f"{self.network}, {self.runtime}"


@dataclass(frozen=True, slots=True)
class StepTime:
    """Medians at one batch size: milliseconds a row, GFLOP/s, and the share of the peak at the time."""

    network: str
    runtime: str
    rows: int
    row_ms: float
    gflops_per_s: float
    share: float


def load_networks(
    bundles: Mapping[str, Bundle], runtimes: Sequence[str], threads: int
) -> Iterator[NetworkUnderTest]:
    for network, bundle in bundles.items():
        for runtime in runtimes:
            backend = load_backend(runtime.split()[0], bundle, threads=threads, **RUNTIMES[runtime])
            yield NetworkUnderTest(network, runtime, backend, row_flops(bundle))


def step_times(
    networks: Sequence[NetworkUnderTest],
    batches: Sequence[int],
    *,
    rounds: int,
    peak: MatmulPeak,
    clock: Callable[[], float] = time.process_time,
    console: Console,
) -> list[StepTime]:
    """Time every network at every batch size, in turns, each right after the peak of that moment."""
    data = {
        (network.name, rows): inputs(network.backend.manifest, rows)
        for network in networks
        for rows in batches
    }
    for network in networks:
        for rows in batches:
            # The first pass of a size allocates its memory, or compiles it.
            network.backend.denoise(*data[network.name, rows])
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in data}
    peaks: dict[tuple[str, int], list[float]] = {key: [] for key in data}
    for _ in track(range(rounds), "rounds", console=console, transient=True):
        for network in networks:
            for rows in batches:
                key = network.name, rows
                peaks[key].append(peak.now())
                seconds[key].append(_best_pass(network.backend, data[key], clock))
    return [
        _medians(network, rows, np.array(seconds[network.name, rows]), np.array(peaks[network.name, rows]))
        for network in networks
        for rows in batches
    ]


def _best_pass(
    backend: Backend, data: tuple[Floats, tuple[Floats, ...]], clock: Callable[[], float]
) -> float:
    """Return the seconds of the best of a few passes, as for the peak."""
    times: list[float] = []
    while len(times) < 3 and (not times or times[-1] < LONG_PASS_S):
        began = clock()
        backend.denoise(*data)
        times.append(clock() - began)
    return min(times)


def _medians(
    network: NetworkUnderTest, rows: int, seconds: npt.NDArray[np.float64], peaks: npt.NDArray[np.float64]
) -> StepTime:
    rates = rows * network.flops / seconds / 1e9
    return StepTime(
        network=network.network,
        runtime=network.runtime,
        rows=rows,
        row_ms=float(1e3 * np.median(seconds) / rows),
        gflops_per_s=float(np.median(rates)),
        share=float(np.median(rates / peaks)),
    )
