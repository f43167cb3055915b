"""The time of a step of a network's graph in ONNX Runtime, by its rows, and of the conditioner.

A pass is timed as the service runs it, with arrays of the host going in and coming out, and with all of them
on the device already. Networks of published sizes get random weights, which needs the packages of the export.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

import numpy as np

from ditserve.bench.gpu.measuring import Measuring, main
from ditserve.bench.gpu.parts.correctness import ALLOWED, relative_error
from ditserve.bench.gpu.parts.device import peak
from ditserve.bench.gpu.parts.steps import TimedNetwork, networks
from ditserve.bench.gpu.timing import timed
from ditserve.bench.machine.networks import inputs, random_bundle, row_flops
from ditserve.model.spec.bundle import Bundle
from ditserve.service.backends import CONDITIONER_ROWS_GPU, load_backend
from ditserve.service.backends.onnx import AuxiliaryGraphs, open_cuda_graph
from ditserve.service.backends.runners import CudaGraphRunner
from ditserve.service.backends.sessions import (
    BACKBONES,
    CPU,
    CUDA,
    open_session,
    provider_entries,
    require_providers,
    run_session,
    session_options,
)

PASSES, TOY_PASSES = 30, 2
CAPTURED_ROWS = 4
# Place of the conditioner → its providers; none are those of the backbone.
PLACES: dict[str, tuple[str, ...]] = {"the CPU": (CPU,), "the device": ()}


def measure(part: Measuring) -> None:
    providers = (CPU,) if part.toy else (CUDA, CPU)
    # Refused before anything is exported for it.
    require_providers(providers)
    own = TimedNetwork(part.bundle.name, None, (1, 3) if part.toy else (1, 16, 64, 256))
    others = [] if part.toy else [network for network in networks(part) if network.name != own.name]
    for network in (own, *others):
        precisions = ("fp32",) if part.toy else ("fp16", "fp32") if network is own else ("fp16",)
        names = {
            (precision, rows): f"{network.name} onnx {precision} {rows}"
            for precision in precisions
            for rows in network.rows
        }
        places = {f"{network.name} conditioner on {title}": where for title, where in PLACES.items()}
        if not part.missing(*names.values(), *places):
            continue
        with _opened(part, network) as bundle:
            for precision in precisions:
                _step_times(part, bundle, network, precision, providers)
            for point, where in places.items():
                part.point(point, partial(_conditioner, bundle, part, where or providers))


@contextmanager
def _opened(part: Measuring, network: TimedNetwork) -> Iterator[Bundle]:
    """Open the bundle of the part, or write one with random weights for as long as it is needed."""
    if network.config is None:
        yield Bundle.open(part.bundle)
        return
    with TemporaryDirectory(prefix="dit-gpu-") as folder:
        yield random_bundle(network.config, Path(folder), half=True)


def _step_times(
    part: Measuring, bundle: Bundle, network: TimedNetwork, precision: str, providers: tuple[str, ...]
) -> None:
    rate = part.point(f"peak {precision}", partial(peak, part, precision)).get("tflops")
    backend = load_backend("onnx", bundle, precision=precision, providers=providers)
    graph = open_cuda_graph(bundle, precision, providers, Lock()) if CUDA in providers else None
    flops, passes = row_flops(bundle), TOY_PASSES if part.toy else PASSES
    names = [tensor.name for tensor in bundle.manifest.state]

    def figures(rows: int) -> dict[str, Any]:
        x, state = inputs(bundle.manifest, rows)
        # ONNX Runtime waits for its device by itself.
        pass_ms = device_ms = timed(partial(backend.denoise, x, state), "cpu", passes).pass_ms
        if graph is not None:
            graph.run(["output"], {"x": x, **dict(zip(names, state, strict=True))})
            device_ms = timed(partial(graph.replay, rows), "cpu", passes).pass_ms
        return {
            "network": network.name,
            "precision": precision,
            "rows": rows,
            "pass_ms": pass_ms,
            "device_ms": device_ms,
            "rows_per_s": 1e3 * rows / pass_ms,
            "share": rows * flops / device_ms / 1e9 / rate if rate else None,
        }

    for rows in network.rows:
        part.point(f"{network.name} onnx {precision} {rows}", partial(figures, rows))
    if graph is not None:
        name = f"{network.name} onnx {precision} captured"
        part.point(name, partial(_captured, bundle, precision, providers, graph))
    backend.close()


def _captured(
    bundle: Bundle, precision: str, providers: tuple[str, ...], graph: CudaGraphRunner
) -> dict[str, Any]:
    """Return the error of captured kernels against the same graph whose kernels are launched one by one."""
    entries = provider_entries(bundle, precision, providers)
    session = open_session(bundle, BACKBONES[precision], session_options(1), entries)
    x, state = inputs(bundle.manifest, CAPTURED_ROWS)
    names = [tensor.name for tensor in bundle.manifest.state]
    arrays = {"x": x, **dict(zip(names, state, strict=True))}
    (captured,), (plain,) = graph.run(["output"], arrays), run_session(session, ["output"], arrays)
    error = relative_error(captured, plain)
    allowed, _ = ALLOWED[precision]
    return {"error_of": error, "allowed": allowed, "passed": error <= allowed}


def _conditioner(bundle: Bundle, part: Measuring, providers: tuple[str, ...]) -> dict[str, Any]:
    """Return the milliseconds of a call of the conditioner."""
    graphs = AuxiliaryGraphs(bundle, session_options(0), providers)
    timesteps = np.full(CONDITIONER_ROWS_GPU, 500.0, np.float32)
    embeddings = np.zeros((CONDITIONER_ROWS_GPU, bundle.manifest.embedding_size), np.float32)
    call: Callable[[], object] = partial(graphs.modulate, timesteps, embeddings)
    passes = TOY_PASSES if part.toy else PASSES
    return {"rows": CONDITIONER_ROWS_GPU, "pass_ms": timed(call, "cpu", passes).pass_ms}


if __name__ == "__main__":
    main("graphs", measure)
