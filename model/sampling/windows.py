"""Pictures larger than a network's own size, drawn offline in the windows that the service uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditserve.model.sampling.denoise import Denoiser
from ditserve.model.spec.windows import windows_over


@dataclass(frozen=True, slots=True)
class WindowDenoiser(Denoiser):
    """The guided network over overlapping windows of its own size, as a function of (x, noise level).

    Windows are predicted one after the other, so that many take no more memory than one.
    """

    def __call__(self, x: Tensor, level: float) -> Tensor:
        """Return the blended output (N, C_out, H, W) at x (N, C, H, W).

        Raises:
            ValueError: x is smaller than a window.
        """
        size = tuple(x.shape[2:])
        windows = windows_over(size, self.model.config.image_size)
        blended: Tensor | None = None
        for area, weight in zip(windows.areas(), torch.from_numpy(windows.weights), strict=True):
            place = (slice(None), slice(None), *area)
            output = Denoiser.__call__(self, x[place], level)
            if blended is None:
                blended = output.new_zeros((*output.shape[:2], *size))
            blended[place] += weight.to(output.device) * output
        assert blended is not None
        return blended
