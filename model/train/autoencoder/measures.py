"""Measures of pictures beside those that they should be. Pictures are (N, 3, H, W) in [−1, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Grey levels of one unit in [−1, 1].
LEVELS = 127.5


def edge_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the mean absolute error of the differences between neighbours, both ways; a scalar."""
    error = ours - theirs
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def psnr(ours: Tensor, theirs: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB, the mean over pictures."""
    errors = (ours - theirs).square().mean((1, 2, 3))
    return float((10 * torch.log10(4 / errors.clamp(min=1e-10))).mean())


def grain(ours: Tensor, theirs: Tensor) -> float:
    """Return the mean difference between neighbours of `ours`, of 255, where `theirs` is flat.

    A place is flat if its 3×3 surroundings have one colour, within half a grey level. NaN: there is none.
    """
    highest, lowest = F.max_pool2d(theirs, 3, 1, 1), -F.max_pool2d(-theirs, 3, 1, 1)
    flat = ((highest - lowest).amax(1) < 0.5 / LEVELS)[:, :, 1:]  # (N, H, W − 1)
    differences = ours.diff(dim=-1).abs().mean(1) * LEVELS  # (N, H, W − 1)
    return float(differences[flat].mean())
