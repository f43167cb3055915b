"""Overlapping windows over a picture larger than the network's own size, and the blend of their predictions.

MultiDiffusion (Bar-Tal et al. 2023, arXiv 2302.08113): at every step each window is predicted by itself, and
the prediction at a pixel is the weighted mean over the windows that contain it. The weight of a window falls
smoothly to its edges (a raised cosine, never zero), so that no seam is seen. The weights at a pixel sum to
one. Sizes are in latent pixels, height before width, and before both the frames of a clip. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

import numpy as np
import numpy.typing as npt

from ditserve.model.spec.sizes import Size, size_name

Floats = npt.NDArray[np.float32]


def window_starts(side: int, window: int) -> tuple[int, ...]:
    """Return the starts of windows along a side at least as long as a window.

    They are half a window apart, and the last window is flush with the end.

    Example: windows of 16 along a side of 25 begin at 0, 8 and 9.
    """
    last = side - window
    return (*range(0, last, max(1, window // 2)), last)


def window_count(size: Size, window: Size) -> int:
    """Return the number of windows over a picture."""
    return prod(len(window_starts(*lengths)) for lengths in zip(size, window, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """The `n` windows over latents of `size`, row by row: upper left corners, and weights (n, h, w).

    Of a clip they are boxes of frames too, with weights (n, f, h, w).
    """

    size: Size
    window: Size
    corners: tuple[Size, ...]
    weights: Floats

    def __len__(self) -> int:
        return len(self.corners)

    def crop(self, latent: Floats, out: Floats) -> None:
        """Write the windows of a latent (C, H, W) to `out` (n, C, h, w)."""
        for area, window in zip(self._areas(), out, strict=True):
            window[:] = latent[area]

    def blend(self, predictions: Floats) -> Floats:
        """Return one prediction (C, H, W) from those of the windows (n, C, h, w)."""
        # Start at minus zero: added to it, every number stays as it is, and a minus zero keeps its sign.
        blended = np.full((predictions.shape[1], *self.size), -0.0, np.float32)
        for area, weight, prediction in zip(self._areas(), self.weights, predictions, strict=True):
            blended[area] += weight * prediction
        return blended

    def _areas(self) -> list[tuple[slice, ...]]:
        return [(slice(None), *area) for area in self.areas()]

    def areas(self) -> list[tuple[slice, ...]]:
        """Return the place of each window along every axis of a size."""
        return [
            tuple(slice(start, start + side) for start, side in zip(corner, self.window, strict=True))
            for corner in self.corners
        ]


@lru_cache(64)
def windows_over(size: Size, window: Size) -> Windows:
    """Return the windows over latents of `size`.

    Raises:
        ValueError: the window is larger than the latent.
    """
    if len(size) != len(window) or any(side < least for side, least in zip(size, window, strict=True)):
        raise ValueError(f"a latent of {size_name(size)} has no window of {size_name(window)}")
    lengths = list(zip(size, window, strict=True))
    corners = tuple(product(*(window_starts(*sides) for sides in lengths)))
    # (n_y, h) and (n_x, w) → (n_y·n_x, h·w).
    weights = np.ones((1, 1))
    for sides in lengths:
        share = _shares(*sides)
        weights = np.einsum("ip,jq->ijpq", weights, share).reshape(len(weights) * len(share), -1)
    return Windows(size, window, corners, weights.reshape(-1, *window).astype(np.float32))


def _shares(side: int, window: int) -> npt.NDArray[np.float64]:
    """Return for each window along a side its share of every pixel in it, (n, window)."""
    raised = np.sin(np.pi * (np.arange(window) + 0.5) / window) ** 2
    spans = [slice(start, start + window) for start in window_starts(side, window)]
    total = np.zeros(side)
    for span in spans:
        total[span] += raised
    return np.stack([raised / total[span] for span in spans])
