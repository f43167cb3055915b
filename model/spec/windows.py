"""Overlapping windows over a picture larger than the network's own size, and the blend of their predictions.

MultiDiffusion (Bar-Tal et al. 2023, arXiv 2302.08113): at every step each window is predicted by itself, and
the prediction at a pixel is the weighted mean over the windows that contain it. The weight of a window falls
smoothly to its edges (a raised cosine, never zero), so that no seam is seen. The weights at a pixel sum to
one. Sizes are in latent pixels, height first. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Size = tuple[int, int]  # height and width in latent pixels


def window_starts(side: int, window: int) -> tuple[int, ...]:
    """Return the starts of windows along a side at least as long as a window.

    They are half a window apart, and the last window is flush with the end.

    Example: windows of 16 along a side of 25 begin at 0, 8 and 9.
    """
    last = side - window
    return (*range(0, last, max(1, window // 2)), last)


def window_count(size: Size, window: Size) -> int:
    """Return the number of windows over a picture."""
    return len(window_starts(size[0], window[0])) * len(window_starts(size[1], window[1]))


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """The `n` windows over latents of `size`, row by row: upper left corners, and weights (n, h, w)."""

    size: Size
    window: Size
    corners: tuple[tuple[int, int], ...]
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

    def _areas(self) -> list[tuple[slice, slice, slice]]:
        height, width = self.window
        return [(slice(None), slice(y, y + height), slice(x, x + width)) for y, x in self.corners]


@lru_cache(64)
def windows_over(size: Size, window: Size) -> Windows:
    """Return the windows over latents of `size`.

    Raises:
        ValueError: the window is larger than the latent.
    """
    if size[0] < window[0] or size[1] < window[1]:
        raise ValueError(f"a latent of {size[0]}x{size[1]} has no window of {window[0]}x{window[1]}")
    rows, columns = window_starts(size[0], window[0]), window_starts(size[1], window[1])
    shares = [_shares(*lengths) for lengths in zip(size, window, strict=True)]  # (n_y, h), (n_x, w)
    weights = np.einsum("ih,jw->ijhw", *shares).reshape(-1, *window)
    return Windows(size, window, tuple((y, x) for y in rows for x in columns), weights.astype(np.float32))


def _shares(side: int, window: int) -> npt.NDArray[np.float64]:
    """Return for each window along a side its share of every pixel in it, (n, window)."""
    raised = np.sin(np.pi * (np.arange(window) + 0.5) / window) ** 2
    spans = [slice(start, start + window) for start in window_starts(side, window)]
    total = np.zeros(side)
    for span in spans:
        total[span] += raised
    return np.stack([raised / total[span] for span in spans])
