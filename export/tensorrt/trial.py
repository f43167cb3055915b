"""After a build on a GPU: is the engine right at every noise level, how fast is it, and is INT8 worth keeping.

Judged on the rows the bundle was calibrated on, against its fp32 graph in ONNX Runtime; torch is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from ditserve.export.session import open_session, run
from ditserve.export.verify import CALIBRATION, LIMITS, Band, check, compare, report
from ditserve.model.spec.bundle import BACKBONE, CONDITIONER, EMBEDDER, Bundle

ROWS = 64  # of the calibration set at most, evenly over its trajectories; the null condition doubles them
FASTER = 1.1  # times half precision, below which INT8 is not worth its error

Array = npt.NDArray[Any]


class Engine(Protocol):
    """An engine that can be run: inputs by name and the shape of the output → the output, or its seconds."""

    def __call__(self, inputs: Mapping[str, Array], output_shape: tuple[int, ...], /) -> Array: ...

    def seconds(self, inputs: Mapping[str, Array], output_shape: tuple[int, ...], /) -> float: ...


@dataclass(frozen=True, slots=True)
class Reference:
    """Inputs of the backbone (N, …) by name, what fp32 answers (N, C_out, H, W), and the rows' timesteps (N,)."""

    inputs: Mapping[str, Array]
    output: Array
    timestep: Array
    total: int


def reference_of(bundle: Bundle, threads: int = 0) -> Reference:
    """What the bundle's fp32 graphs answer on its calibration rows.

    Raises:
        BundleError: the bundle lacks a graph, or the rows.
    """
    manifest = bundle.manifest
    rows = load_file(bundle.file(CALIBRATION))
    chosen = np.unique(np.linspace(0, len(rows["x"]) - 1, ROWS).round().astype(np.int64))
    null = np.array([len(factor.classes) for factor in manifest.factors], np.int64)
    labels = rows["labels"][chosen]
    labels = np.concatenate([labels, np.broadcast_to(null, labels.shape)])
    conditions = {factor.name: labels[:, k] for k, factor in enumerate(manifest.factors)}
    if "text" in rows:
        text = rows["text"][chosen]
        conditions["text"] = np.concatenate([text, np.zeros_like(text)])
    t = np.tile(rows["timestep"][chosen], 2).astype(np.float32)
    embedding = np.zeros((len(t), manifest.embedding_size), np.float32)
    if conditions:
        embedding = run(open_session(bundle.file(EMBEDDER), threads=threads), conditions)["embedding"]
    conditioner = open_session(bundle.file(CONDITIONER), threads=threads)
    x = np.tile(rows["x"][chosen].astype(np.float32), (2, 1, 1, 1))
    inputs = {"x": x, **run(conditioner, {"timestep": t, "embedding": embedding})}
    output = run(open_session(bundle.file(BACKBONE), threads=threads), inputs)["output"]
    return Reference(inputs, output, t, manifest.diffusion.timesteps)


def try_engine(
    engine: Engine, precision: str, reference: Reference, buckets: Sequence[int]
) -> dict[str, Any]:
    """Errors per band of noise and milliseconds per batch size, as an engine's record has them.

    Raises:
        ExportError: beyond the limit of its precision.
    """
    largest = max(buckets)
    answers = [
        engine(*_batch(reference, np.arange(start, min(start + largest, len(reference.output)))))
        for start in range(0, len(reference.output), largest)
    ]
    bands: tuple[Band, ...] = compare(
        reference.output, np.concatenate(answers), reference.timestep, reference.total
    )
    check(f"the {precision} engine", bands, LIMITS[precision])
    milliseconds = {
        str(size): round(1e3 * engine.seconds(*_batch(reference, np.arange(size) % len(reference.output))), 4)
        for size in buckets
    }
    return {"executed": True, "error": report(bands), "milliseconds": milliseconds}


def speedup(slow: Mapping[str, float], fast: Mapping[str, float]) -> float:
    """How many times as fast, as the geometric mean over the batch sizes both were timed at."""
    ratios = [math.log(slow[size] / fast[size]) for size in slow if size in fast]
    return math.exp(sum(ratios) / len(ratios))


def _batch(reference: Reference, index: Array) -> tuple[dict[str, Array], tuple[int, ...]]:
    inputs = {name: value[index] for name, value in reference.inputs.items()}
    return inputs, (len(index), *reference.output.shape[1:])
