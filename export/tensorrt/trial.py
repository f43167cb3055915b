"""The trial of an engine after its build on a GPU: its error at every noise level, and its speed.

An engine runs on the rows that the bundle was calibrated on, and is compared with the bundle's fp32 graph in
ONNX Runtime. torch is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from ditserve.export.verify import LIMITS, check, compare, open_session, report, run
from ditserve.model.spec.bundle import BACKBONE, CALIBRATION, CONDITIONER, EMBEDDER, Bundle

# The most rows that an engine is tried on, taken evenly from the calibration rows. The null condition doubles
# them.
ROWS = 64
# INT8 is not worth its error if it is less than this many times as fast as half precision.
FASTER = 1.1

Array = npt.NDArray[Any]


class LoadedEngine(Protocol):
    """An engine that can be run on inputs by name, given the shape of its output."""

    def __call__(self, inputs: Mapping[str, Array], output_shape: tuple[int, ...], /) -> Array: ...

    def seconds(self, inputs: Mapping[str, Array], output_shape: tuple[int, ...], /) -> float: ...


@dataclass(frozen=True, slots=True)
class TrialReference:
    """Inputs of the backbone (N, …) by name, the output of fp32 (N, C_out, H, W), and noise (N,), 0..1."""

    inputs: Mapping[str, Array]
    output: Array
    noise: Array


def trial_reference(bundle: Bundle, threads: int = 0) -> TrialReference:
    """Run the bundle's fp32 graphs on its calibration rows; `threads` 0 is one per core.

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
    timestep = np.tile(rows["timestep"][chosen], 2).astype(np.float32)
    embedding = np.zeros((len(timestep), manifest.embedding_size), np.float32)
    if conditions:
        embedding = run(open_session(bundle.file(EMBEDDER), threads=threads), conditions)["embedding"]
    conditioner = open_session(bundle.file(CONDITIONER), threads=threads)
    x = np.concatenate([rows["x"][chosen].astype(np.float32)] * 2)
    inputs = {"x": x, **run(conditioner, {"timestep": timestep, "embedding": embedding})}
    output = run(open_session(bundle.file(BACKBONE), threads=threads), inputs)["output"]
    return TrialReference(inputs, output, manifest.diffusion.noise_schedule().share_told(timestep))


def try_engine(
    engine: LoadedEngine, precision: str, reference: TrialReference, buckets: Sequence[int]
) -> dict[str, Any]:
    """Return the errors by band of noise and the milliseconds by batch size, as an engine's record has them.

    Raises:
        ExportError: an error is beyond the limit of the precision.
    """
    largest, count = max(buckets), len(reference.output)
    outputs = [
        engine(*_batch(reference, np.arange(start, min(start + largest, count))))
        for start in range(0, count, largest)
    ]
    bands = compare(reference.output, np.concatenate(outputs), reference.noise)
    check(f"the {precision} engine", bands, LIMITS[precision])
    milliseconds = {
        str(size): round(1e3 * engine.seconds(*_batch(reference, np.arange(size) % count)), 4)
        for size in buckets
    }
    return {"executed": True, "error": report(bands), "milliseconds": milliseconds}


def speedup(slow: Mapping[str, float], fast: Mapping[str, float]) -> float:
    """Return how many times as fast `fast` is, from milliseconds by batch size: the geometric mean of ratios.

    Times of 2 and 8 against 1 and 8 are ratios of 2 and 1, so the speedup is √2.
    """
    ratios = [math.log(slow[size] / fast[size]) for size in slow if size in fast]
    return math.exp(sum(ratios) / len(ratios))


def _batch(reference: TrialReference, index: Array) -> tuple[dict[str, Array], tuple[int, ...]]:
    inputs = {name: value[index] for name, value in reference.inputs.items()}
    return inputs, (len(index), *reference.output.shape[1:])
