"""How far two outputs are apart, per band of noise levels, and whether that is near enough to ship."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ditserve.export.errors import ExportError

BANDS = 10
CALIBRATION = "calibration.safetensors"  # the rows that a bundle is judged and calibrated on


@dataclass(frozen=True, slots=True)
class Band:
    """Errors of the rows with timesteps in [low, high]: relative L2, maximal absolute difference, cosine."""

    low: int
    high: int
    rows: int
    relative_l2: float
    max_abs: float
    cosine: float


@dataclass(frozen=True, slots=True)
class Limits:
    """What a band may show at most (relative L2) and at least (cosine)."""

    relative_l2: float
    cosine: float


# what was changed → what that may cost, in any band
LIMITS: dict[str, Limits] = {
    "fp32": Limits(relative_l2=1e-4, cosine=0.999999),
    "fp16": Limits(relative_l2=1e-2, cosine=0.9999),
    "bf16": Limits(relative_l2=4e-2, cosine=0.999),
    "int8": Limits(relative_l2=6e-2, cosine=0.998),
}


def compare(
    reference: npt.NDArray[np.floating[Any]],
    candidate: npt.NDArray[np.floating[Any]],
    timesteps: npt.NDArray[np.floating[Any]],
    total: int,
) -> tuple[Band, ...]:
    """Errors of `candidate` against `reference`, both (N, …), in `BANDS` equal bands of 0..total-1; empty bands are left out."""
    a = reference.reshape(len(reference), -1).astype(np.float64)
    b = candidate.reshape(len(candidate), -1).astype(np.float64)
    place = np.minimum(timesteps.astype(np.int64) * BANDS // total, BANDS - 1)
    bands = []
    for k in range(BANDS):
        rows = place == k
        if not rows.any():
            continue
        p, q = a[rows].ravel(), b[rows].ravel()
        size = max(float(np.linalg.norm(p)), 1e-30)
        bands.append(
            Band(
                low=-(-k * total // BANDS),
                high=-(-(k + 1) * total // BANDS) - 1,
                rows=int(rows.sum()),
                relative_l2=float(np.linalg.norm(p - q)) / size,
                max_abs=float(np.abs(p - q).max()),
                cosine=float(p @ q) / max(size * float(np.linalg.norm(q)), 1e-30),
            )
        )
    return tuple(bands)


def check(what: str, bands: Sequence[Band], limits: Limits) -> None:
    """Raise if any band is worse than `limits`.

    Raises:
        ExportError: one sentence naming `what`, the band and the number.
    """
    for band in bands:
        place = f"at timesteps {band.low}..{band.high}"
        if not np.isfinite([band.relative_l2, band.max_abs, band.cosine]).all():
            raise ExportError(f"{what} gives numbers that are not finite {place}")
        if band.relative_l2 > limits.relative_l2:
            raise ExportError(
                f"{what} is off by {band.relative_l2:.2e} (relative L2) {place}; {limits.relative_l2:.0e} is allowed"
            )
        if band.cosine < limits.cosine:
            raise ExportError(f"{what} has cosine {band.cosine:.6f} {place}; {limits.cosine} is needed")


def worst(bands: Sequence[Band]) -> Band:
    """The band with the largest relative error."""
    return max(bands, key=lambda band: band.relative_l2)


def report(bands: Sequence[Band]) -> list[dict[str, float]]:
    """The bands as plain data, four significant digits."""
    return [
        {
            key: float(f"{value:.4g}") if isinstance(value, float) and key != "cosine" else value
            for key, value in asdict(b).items()
        }
        for b in bands
    ]
