"""The pictures of the device beside those of the CPU, and the contract of a backend, for every runtime.

The reference is torch on the CPU in fp32. A row must not depend on its company nor on its place, nor a
picture on the cache; errors are relative to the size of what is compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from ditserve.bench.engine_overhead import sample_requests
from ditserve.bench.gpu.measuring import Measuring, main
from ditserve.model.spec.bundle import Bundle
from ditserve.service.backends import Backend, load_backend
from ditserve.service.engine.conditions import ConditionCaches
from ditserve.service.engine.engine import Engine
from ditserve.service.engine.scheduler import Scheduler
from ditserve.service.planning.costs import CostModel
from ditserve.service.planning.ladder import Ladder
from ditserve.service.planning.planner import Planner

Floats = npt.NDArray[np.float32]
Rows = tuple[Floats, tuple[Floats, ...]]

# Precision → the relative error that is allowed of a row alone, and of a finished picture beside the CPU's.
ALLOWED = {"fp32": (1e-5, 1e-3), "fp16": (5e-3, 1e-2), "bf16": (3e-2, 6e-2), "fp8": (5e-2, 1.5e-1)}
CUDA_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
ROWS = 8
PICTURES, TOY_PICTURES = 4, 2


def runtimes(part: Measuring) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the name of each runtime, its backend, and the backend's options."""
    providers = CUDA_PROVIDERS if part.device.startswith("cuda") else CUDA_PROVIDERS[1:]
    for precision in ("fp32",) if part.toy else ("fp32", "fp16"):
        yield f"onnx {precision}", "onnx", {"precision": precision, "providers": providers}
    for precision in ("fp32", "bf16", "fp8") if part.toy else ALLOWED:
        yield f"torch {precision}", "torch", {"precision": precision, "device": part.device}
    if not part.toy:
        yield "torch fp16 compiled", "torch", {"precision": "fp16", "device": part.device, "compile": True}
        yield "tensorrt", "tensorrt", {}


def measure(part: Measuring) -> None:
    bundle = Bundle.open(part.bundle)
    reference: dict[str, Floats] = {}
    for name, backend_name, options in runtimes(part):
        checks = {f"{name}: {title}": check for title, check in CHECKS.items()}
        picture = f"{name}: picture beside the CPU's"
        if not part.missing(*checks, picture):
            continue
        backend: Backend | None = None
        reason: Exception | None = None
        try:
            backend = load_backend(backend_name, bundle, **options)
        except Exception as error:
            reason = error
        if backend is None:
            assert reason is not None
            part.point(f"{name}: opened", partial(_raise, reason))
            continue
        for point, check in checks.items():
            part.point(point, partial(_checked, check, backend))
        if not reference:
            exact = load_backend("torch", bundle)
            reference = pictures(exact, part)
            exact.close()
        part.point(picture, partial(_beside, reference, backend, part))
        backend.close()


def _raise(error: Exception) -> dict[str, Any]:
    raise error


def _checked(check: Callable[[Backend, Rows], float], backend: Backend) -> dict[str, Any]:
    of_row, of_picture = ALLOWED.get(backend.precision, ALLOWED["fp16"])
    allowed = of_picture if check is cache_on_and_off else of_row
    return _judged(check(backend, random_rows(backend)), allowed)


def _beside(reference: dict[str, Floats], backend: Backend, part: Measuring) -> dict[str, Any]:
    found = pictures(backend, part)
    error = max(relative_error(found[name], exact) for name, exact in reference.items())
    return _judged(error, ALLOWED.get(backend.precision, ALLOWED["fp16"])[1])


def _judged(error: float, allowed: float) -> dict[str, Any]:
    return {"error_of": error, "allowed": allowed, "passed": bool(error <= allowed)}


def relative_error(found: Floats, exact: Floats) -> float:
    """Return |found − exact| / |exact|, infinite where a number is not finite."""
    error = float(np.linalg.norm(found - exact) / max(float(np.linalg.norm(exact)), 1e-12))
    return error if np.isfinite(error) else float("inf")


def random_rows(backend: Backend) -> Rows:
    """Return latents (8, C, H, W) and the condition state of random timesteps and classes."""
    random, manifest = np.random.default_rng(0), backend.manifest
    count = backend.conditioner_rows
    classes = [len(factor.classes) for factor in manifest.factors]
    embeddings = backend.embed(random.integers(0, classes, (count, len(classes))))
    state = backend.modulate(random.integers(0, 1000, count).astype(np.float32), embeddings)
    shape = (ROWS, manifest.config.in_channels, *manifest.config.image_size)
    return random.standard_normal(shape, np.float32), tuple(tensor[:ROWS] for tensor in state)


def row_alone(backend: Backend, rows: Rows) -> float:
    """Return the error of rows that run alone against the same in company."""
    x, state = rows
    together = backend.denoise(x, state)
    singles = [
        backend.denoise(x[k : k + 1], tuple(tensor[k : k + 1] for tensor in state)) for k in range(ROWS)
    ]
    return relative_error(np.concatenate(singles), together)


def row_elsewhere(backend: Backend, rows: Rows) -> float:
    """Return 0 if every row is the same to the last bit at another place, else infinity."""
    x, state = rows
    order = np.random.default_rng(1).permutation(ROWS)
    moved = backend.denoise(x[order], tuple(np.ascontiguousarray(tensor[order]) for tensor in state))
    return _none(np.array_equal(moved, backend.denoise(x, state)[order]))


def row_of_no_number(backend: Backend, rows: Rows) -> float:
    """Return 0 if a row that is not a number changes no other."""
    x, state = rows
    clean, spoilt = backend.denoise(x, state), x.copy()
    spoilt[2] = np.nan
    output, others = backend.denoise(spoilt, state), [k for k in range(ROWS) if k != 2]
    return _none(not np.isfinite(output[2]).any() and np.array_equal(output[others], clean[others]))


def inputs_kept(backend: Backend, rows: Rows) -> float:
    """Return 0 if a call changes neither its inputs nor the output of the call before."""
    kept = [array.copy() for array in (rows[0], *rows[1])]
    first = backend.denoise(*rows)
    held = first.copy()
    backend.denoise(rows[0] + 1.0, rows[1])
    same = all(np.array_equal(one, other) for one, other in zip(kept, (rows[0], *rows[1]), strict=True))
    return _none(same and np.array_equal(first, held))


def cache_on_and_off(backend: Backend, rows: Rows) -> float:
    """Return the error of pictures without a cache of modulations against the same with one.

    Where rows live on the device they do so with the cache alone: this compares captured steps with the
    host's own.
    """
    del rows
    cached, plain = (_drawn(backend, TOY_PICTURES, cache) for cache in (1 << 26, 0))
    return max(relative_error(plain[name], latent) for name, latent in cached.items())


CHECKS: dict[str, Callable[[Backend, Rows], float]] = {
    "row alone": row_alone,
    "row at another place": row_elsewhere,
    "row of no number": row_of_no_number,
    "inputs and outputs kept": inputs_kept,
    "cache on and off": cache_on_and_off,
}


def _none(right: bool) -> float:
    return 0.0 if right else float("inf")


def pictures(backend: Backend, part: Measuring) -> dict[str, Floats]:
    return _drawn(backend, TOY_PICTURES if part.toy else PICTURES, 1 << 26)


def _drawn(backend: Backend, count: int, cache_bytes: int) -> dict[str, Floats]:
    """Return the latents of a few requests of several solvers, drawn together."""
    engine = Engine(
        backend=backend,
        conditions=ConditionCaches(backend, modulation_bytes=cache_bytes),
        scheduler=Scheduler(max_rows=ROWS, buckets=backend.buckets),
        planner=Planner(Ladder(())),
        ladder=Ladder(()),
        costs=CostModel(fixed_s=10.0, per_row_s=0.001),
        schedule=backend.manifest.diffusion.noise_schedule(),
        clock=time.monotonic,
    )
    for request in islice(sample_requests(len(backend.manifest.factors), time.monotonic()), count):
        engine.add(request)
    latents: dict[str, Floats] = {}
    while not engine.idle:
        latents |= {sample.id: sample.latent for sample in engine.step().finished}
    return latents


if __name__ == "__main__":
    main("correctness", measure)
