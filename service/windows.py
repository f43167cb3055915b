"""Overlapping windows over a picture larger than a network's own: where they lie, and how their predictions become one.

MultiDiffusion (Bar-Tal et al. 2023, arXiv 2302.08113): at every step each window is predicted by itself, and what is predicted of a
pixel is the weighted mean over the windows it lies in. The weight of a window falls smoothly to its edges (a raised cosine, never
zero), so that no seam is seen; the weights at a pixel sum to one. Sizes are in latent pixels, height first. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Size = tuple[int, int]


def starts(side: int, window: int) -> tuple[int, ...]:
    """Where windows begin along a side of at least their length: every half window, the last one flush with the end."""
    last = side - window
    return (*range(0, last, max(1, window // 2)), last)


def count(size: Size, window: Size) -> int:
    """Windows over a picture."""
    return len(starts(size[0], window[0])) * len(starts(size[1], window[1]))


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """The `n` windows over latents of `size`: the upper left corner of each, row by row, and its weights (n, h, w)."""

    size: Size
    window: Size
    corners: tuple[tuple[int, int], ...]
    weights: Floats

    def __len__(self) -> int:
        return len(self.corners)

    def crop(self, latent: Floats, out: Floats) -> None:
        """Write the windows of a latent (C, H, W) to `out` (n, C, h, w)."""
        for place, cut in zip(self._places(), out, strict=True):
            cut[:] = latent[place]

    def blend(self, predictions: Floats) -> Floats:
        """One prediction (C, H, W) of those of the windows (n, C, h, w)."""
        # Minus zero is what adding leaves everything else as it was, the sign of a zero included.
        blended = np.full((predictions.shape[1], *self.size), -0.0, np.float32)
        for place, weight, prediction in zip(self._places(), self.weights, predictions, strict=True):
            blended[place] += weight * prediction
        return blended

    def _places(self) -> list[tuple[slice, slice, slice]]:
        height, width = self.window
        return [(slice(None), slice(y, y + height), slice(x, x + width)) for y, x in self.corners]


@lru_cache(64)
def windows_over(size: Size, window: Size) -> Windows:
    """The windows over latents of `size`. Raises `ValueError` where they are larger than it."""
    if size[0] < window[0] or size[1] < window[1]:
        raise ValueError(f"a latent of {size[0]}x{size[1]} has no window of {window[0]}x{window[1]}")
    rows, columns = starts(size[0], window[0]), starts(size[1], window[1])
    shares = [_shares(side, each) for side, each in zip(size, window, strict=True)]  # (n_y, h), (n_x, w)
    weights = np.einsum("ih,jw->ijhw", *shares).reshape(-1, *window)
    return Windows(size, window, tuple((y, x) for y in rows for x in columns), weights.astype(np.float32))


def _shares(side: int, window: int) -> npt.NDArray[np.float64]:
    """Of each window along a side, its share of every pixel of it, (n, window)."""
    raised = np.sin(np.pi * (np.arange(window) + 0.5) / window) ** 2
    places = [slice(start, start + window) for start in starts(side, window)]
    total = np.zeros(side)
    for place in places:
        total[place] += raised
    return np.stack([raised / total[place] for place in places])
