"""Transforms of pictures: the centre crop that brings every picture to one size, and random distortions.

The centre crop is that of ADM (Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis"). The
distortions are small enough to leave what a picture shows as it was: they change its position, size, tilt,
colour, sharpness and noise.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ditserve.model.spec.sizes import Size

SHIFT = 0.09  # of the width, either way
ZOOM = (0.85, 1.12)
TILT = math.radians(8)
COLOUR = 0.15  # of brightness, contrast and each channel's gain
NOISE = 0.04  # of the range −1 … 1
BLUR = 0.3  # share of pictures blurred


def centre_crop(picture: npt.NDArray[np.uint8], size: Size) -> npt.NDArray[np.uint8]:
    """Return the centre of a picture uint8 (h, w, 3), resampled to `size` (H, W).

    The picture is halved with a box filter while both sides stay at least as large as asked. Then it is
    resampled (bicubic) so that it just covers `size`, and the middle is cut out. A picture that has this size
    already is returned as it is. Every frame of a clip (F, h, w, 3) is cut in this way, to (F, H, W).
    """
    *_, height, width = size
    if picture.shape[:-1] == size:
        return picture
    if picture.ndim == 4:
        return np.stack([centre_crop(frame, (height, width)) for frame in picture])
    image = Image.fromarray(picture)
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if covering != image.size:
        image = image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image)[top : top + height, left : left + width]


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return pictures (N, 3, H, W) in [−1, 1], each changed at random; same shape and range."""
    return _recolour(_blur(_move(images, generator), generator), generator)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _move(images: Tensor, generator: torch.Generator) -> Tensor:
    n = len(images)
    angle = _uniform((n,), -TILT, TILT, generator)
    zoom = _uniform((n,), *ZOOM, generator)
    shift = _uniform((n, 2, 1), -2 * SHIFT, 2 * SHIFT, generator)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    rotation = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)  # (N, 2, 2)
    grid = F.affine_grid(torch.cat([rotation, shift], 2), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _blur(images: Tensor, generator: torch.Generator) -> Tensor:
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < BLUR
    return torch.where(chosen, soft, images)


def _recolour(images: Tensor, generator: torch.Generator) -> Tensor:
    n = len(images)
    gain = 1 + _uniform((n, 3, 1, 1), -COLOUR, COLOUR, generator)
    contrast = 1 + _uniform((n, 1, 1, 1), -COLOUR, COLOUR, generator)
    brightness = _uniform((n, 1, 1, 1), -COLOUR, COLOUR, generator)
    noise = torch.randn(images.shape, generator=generator) * _uniform((n, 1, 1, 1), 0, NOISE, generator)
    return (images * gain * contrast + brightness + noise).clamp(-1, 1)
