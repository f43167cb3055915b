"""The texture of pictures: grain in flat areas, the sharpness of edges, and errors between two pictures.

Pictures are (N, 3, H, W) in [−1, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Side of the blocks that a picture is cut into, to find its flat half.
BLOCK = 4
# Grey levels of one unit in [−1, 1].
LEVELS = 127.5


def grain(images: Tensor) -> float:
    """Return the mean difference between neighbours, of 255, in the flatter half of each picture's blocks.

    Drawings and plain backgrounds have nearly 0; noise that a network
    leaves in flat areas is counted, edges are not.
    """
    across = images.diff(dim=-1).abs().mean(1, keepdim=True)[:, :, 1:]  # (N, 1, H − 1, W − 1)
    down = images.diff(dim=-2).abs().mean(1, keepdim=True)[:, :, :, 1:]
    blocks = F.avg_pool2d((across + down) / 2, min(BLOCK, *across.shape[-2:])).flatten(1)  # (N, blocks)
    flatter = blocks.sort(dim=1).values[:, : max(1, blocks.shape[1] // 2)]
    return float(flatter.mean() * LEVELS)


def edge_energy(images: Tensor) -> float:
    """Return the mean squared second difference of pictures (N, 3, H, W): the energy of their fine detail."""
    kernel = images.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    grey = images.mean(1, keepdim=True)  # (N, 1, H, W)
    return float(F.conv2d(grey, kernel[None, None]).square().mean())


def sharpness(images: Tensor, reference: Tensor) -> float:
    """Return the edge energy of pictures as a share of that of others: below 1 they are softer. 0/0 is 1."""
    ours, theirs = edge_energy(images), edge_energy(reference)
    return ours / theirs if theirs else torch.inf if ours else 1.0


def edge_error(images: Tensor, reference: Tensor) -> Tensor:
    """Return the mean absolute error of the differences between neighbours, both ways; a scalar."""
    error = images - reference
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def ssim(images: Tensor, reference: Tensor) -> float:
    """Return the structural similarity, the mean over pictures and channels: 1 for equal ones.

    It is that of Wang et al. (2004), with Gaussian windows of 11 pixels, or as many as there are, and a
    deviation of 1.5.
    """
    side = min(11, *images.shape[-2:])
    place = torch.arange(side, device=images.device) - (side - 1) / 2
    row = torch.softmax(-place.square() / (2 * 1.5**2), dim=0)
    window = (row[:, None] * row)[None, None]

    def smooth(values: Tensor) -> Tensor:
        return F.conv2d(values.flatten(0, 1)[:, None], window)  # (N·3, 1, H − side + 1, W − side + 1)

    of_mean, of_spread = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    a, b = smooth(images), smooth(reference)
    variances = smooth(images.square()) - a.square() + smooth(reference.square()) - b.square()
    covariance = smooth(images * reference) - a * b
    alike = (2 * a * b + of_mean) * (2 * covariance + of_spread)
    return float((alike / ((a.square() + b.square() + of_mean) * (variances + of_spread))).mean())


def psnr(images: Tensor, reference: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB, the mean over pictures; 100 at most."""
    errors = (images - reference).square().mean((1, 2, 3))
    return float((10 * torch.log10(4 / errors.clamp(min=4e-10))).mean())
