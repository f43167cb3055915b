"""Grain and sharpness of pictures whose texture is known."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter  # type: ignore[import-untyped]

from ditserve.model.data.texture import edge_error, grain, psnr, sharpness, ssim


def drawing() -> torch.Tensor:
    """A black square on white, 32×32."""
    image = torch.ones(2, 3, 32, 32)
    image[:, :, 8:20, 8:20] = -1.0
    return image


def test_a_drawing_has_no_grain_whatever_its_edges() -> None:
    assert grain(drawing()) == 0.0


def test_noise_in_flat_areas_is_grain() -> None:
    """Neighbours that differ by a uniform number of ±a differ by 2a/3 on average."""
    noise = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = [grain(drawing() + noise * levels / 127.5) for levels in (3.0, 6.0)]
    assert 0.7 * 2 < found[0] < 2
    assert found[1] == pytest.approx(2 * found[0], rel=0.05)


def test_a_blurred_picture_is_less_sharp() -> None:
    blurred = torch.nn.functional.avg_pool2d(drawing(), 3, 1, 1, count_include_pad=False)
    assert sharpness(drawing(), drawing()) == 1.0
    assert 0.05 < sharpness(blurred, drawing()) < 0.6
    flat = torch.zeros(1, 3, 8, 8)
    assert sharpness(flat, flat) == 1.0


def test_structural_similarity_is_the_published_one() -> None:
    generator = torch.Generator().manual_seed(0)
    noisy = (drawing() + 0.3 * torch.randn(2, 3, 32, 32, generator=generator)).clamp(-1, 1)
    found = []
    for x, y in zip(drawing().flatten(0, 1).numpy(), noisy.flatten(0, 1).numpy(), strict=True):
        smooth = partial(gaussian_filter, sigma=1.5, radius=5)
        a, b = smooth(x), smooth(y)
        spread = smooth(x * x) - a * a + smooth(y * y) - b * b
        alike = (2 * a * b + 4e-4) * (2 * (smooth(x * y) - a * b) + 36e-4)
        found.append((alike / ((a * a + b * b + 4e-4) * (spread + 36e-4)))[5:-5, 5:-5].mean())
    assert ssim(noisy, drawing()) == pytest.approx(float(np.mean(found)), abs=1e-4)
    assert ssim(drawing(), drawing()) == pytest.approx(1)
    assert ssim(drawing()[..., :8, :8], drawing()[..., :8, :8]) == pytest.approx(1)


def test_errors_between_two_pictures() -> None:
    """A step of 10 grey levels in every second column: half the positions differ, every neighbour does."""
    striped = drawing()
    striped[..., ::2] += 10 / 127.5
    assert psnr(striped, drawing()) == pytest.approx(10 * math.log10(4 / (0.5 * (10 / 127.5) ** 2)), rel=1e-3)
    assert float(edge_error(striped, drawing())) == pytest.approx(10 / 127.5, rel=1e-3)
    assert psnr(drawing(), drawing()) == pytest.approx(100)
