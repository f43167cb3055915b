"""Random changes of pictures that leave what they show as it was: place, size, tilt, colour, sharpness and noise."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT = 0.09  # of the width, either way
ZOOM = (0.85, 1.12)
TILT = math.radians(8)
COLOUR = 0.15  # of brightness, contrast and each channel's gain
NOISE = 0.04  # of the range −1 … 1
BLUR = 0.3  # share of pictures blurred


def distorted(images: Tensor, generator: torch.Generator) -> Tensor:
    """(N, 3, H, W) in [−1, 1] → the same, each picture changed at random by `generator`."""
    return _coloured(_blurred(_moved(images, generator), generator), generator)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    n = len(images)
    angle = _uniform((n,), -TILT, TILT, generator)
    zoom = _uniform((n,), *ZOOM, generator)
    shift = _uniform((n, 2, 1), -2 * SHIFT, 2 * SHIFT, generator)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    turn = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)  # (N, 2, 2)
    grid = F.affine_grid(torch.cat([turn, shift], 2), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _blurred(images: Tensor, generator: torch.Generator) -> Tensor:
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < BLUR
    return torch.where(chosen, soft, images)


def _coloured(images: Tensor, generator: torch.Generator) -> Tensor:
    n = len(images)
    gain = 1 + _uniform((n, 3, 1, 1), -COLOUR, COLOUR, generator)
    contrast = 1 + _uniform((n, 1, 1, 1), -COLOUR, COLOUR, generator)
    brightness = _uniform((n, 1, 1, 1), -COLOUR, COLOUR, generator)
    noise = torch.randn(images.shape, generator=generator) * _uniform((n, 1, 1, 1), 0, NOISE, generator)
    return (images * gain * contrast + brightness + noise).clamp(-1, 1)
