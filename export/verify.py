"""Verification of graphs: run one in ONNX Runtime, measure its error by band of noise, refuse a large error.

This module needs no torch, so that a TensorRT engine can be verified on a machine without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from ditserve.export.errors import ExportError
from ditserve.model.spec.heap import compact_heap

BANDS = 10
# The report, in the folder of the bundle.
PARITY = "parity.json"

Arrays = Mapping[str, npt.NDArray[Any]]
Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Band:
    """Errors of the rows with noise in [low, high) of the range: relative L2, largest difference, cosine."""

    low: float
    high: float
    rows: int
    relative_l2: float
    max_abs: float
    cosine: float


@dataclass(frozen=True, slots=True)
class ParityLimits:
    """The largest relative L2 and the smallest cosine that a band may have."""

    relative_l2: float
    cosine: float


# Precision of the candidate → the limits of every band against fp32.
LIMITS: dict[str, ParityLimits] = {
    "fp32": ParityLimits(relative_l2=1e-4, cosine=0.999999),
    "fp16": ParityLimits(relative_l2=1e-2, cosine=0.9999),
    "bf16": ParityLimits(relative_l2=4e-2, cosine=0.999),
    "int8": ParityLimits(relative_l2=6e-2, cosine=0.998),
    "fp8": ParityLimits(relative_l2=6e-2, cosine=0.998),
}


def open_session(
    path: Path, *, threads: int = 1, options: Mapping[str, str] | None = None
) -> ort.InferenceSession:
    """Open a CPU session of the graph in `path`; `options` are session configuration entries."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    settings.log_severity_level = 3
    for key, value in (options or {}).items():
        settings.add_session_config_entry(key, value)
    with compact_heap():
        return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, inputs: Arrays, *, batch: int = 16) -> dict[str, npt.NDArray[Any]]:
    """Return all outputs by name for inputs (N, …) by name, computed `batch` rows at a time."""
    names = [output.name for output in session.get_outputs()]
    parts = []
    for start in range(0, len(next(iter(inputs.values()))), batch):
        rows = {name: np.ascontiguousarray(value[start : start + batch]) for name, value in inputs.items()}
        parts.append(session.run(names, rows))
    return {name: np.concatenate([part[k] for part in parts]) for k, name in enumerate(names)}


def compare(reference: Floats, candidate: Floats, noise: Floats) -> tuple[Band, ...]:
    """Return the errors of `candidate` against `reference`, both (N, …), by band of their noise (N,), 0..1.

    The noise range is cut into `BANDS` equal bands; a band without rows is left out. With 10 bands, a row
    at 0.55 counts in the band from 0.5 to 0.6.
    """
    expected_rows = reference.reshape(len(reference), -1).astype(np.float64)
    actual_rows = candidate.reshape(len(candidate), -1).astype(np.float64)
    band_of_row = np.minimum((noise * BANDS).astype(np.int64), BANDS - 1)
    bands = []
    for k in range(BANDS):
        rows = band_of_row == k
        if not rows.any():
            continue
        expected, actual = expected_rows[rows].ravel(), actual_rows[rows].ravel()
        norm = max(float(np.linalg.norm(expected)), 1e-30)
        bands.append(
            Band(
                low=k / BANDS,
                high=(k + 1) / BANDS,
                rows=int(rows.sum()),
                relative_l2=float(np.linalg.norm(expected - actual)) / norm,
                max_abs=float(np.abs(expected - actual).max()),
                cosine=float(expected @ actual) / max(norm * float(np.linalg.norm(actual)), 1e-30),
            )
        )
    return tuple(bands)


def check(subject: str, bands: Sequence[Band], limits: ParityLimits) -> None:
    """Raise if any band is worse than `limits`.

    Raises:
        ExportError: one sentence that names `subject`, the band and the number.
    """
    for band in bands:
        where = f"at noise {band.low:g}..{band.high:g} of its range"
        if not np.isfinite([band.relative_l2, band.max_abs, band.cosine]).all():
            raise ExportError(f"{subject} gives numbers that are not finite {where}")
        if band.relative_l2 > limits.relative_l2:
            raise ExportError(
                f"{subject} is off by {band.relative_l2:.2e} (relative L2) {where}; "
                f"{limits.relative_l2:.0e} is allowed"
            )
        if band.cosine < limits.cosine:
            raise ExportError(f"{subject} has cosine {band.cosine:.6f} {where}; {limits.cosine} is needed")


def worst(bands: Sequence[Band]) -> Band:
    """Return the band with the largest relative error."""
    return max(bands, key=lambda band: band.relative_l2)


def report(bands: Sequence[Band]) -> list[dict[str, float]]:
    """Return the bands as plain data, with four significant digits."""
    return [
        {
            key: float(f"{value:.4g}") if isinstance(value, float) and key != "cosine" else value
            for key, value in asdict(band).items()
        }
        for band in bands
    ]
