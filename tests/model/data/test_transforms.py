"""The centre crop agrees with its formula by hand; distortions are bounded, repeatable and small."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from ditserve.model.data.transforms import SHIFT, centre_crop, distort


def picture(height: int, width: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40))
def test_any_size_from_any_size(height: int, width: int, h: int, w: int) -> None:
    cropped = centre_crop(picture(height, width), (h, w))
    assert cropped.shape == (h, w, 3)
    assert cropped.dtype == np.uint8


def test_a_picture_of_that_size_is_left_alone() -> None:
    x = picture(16, 24)
    assert centre_crop(x, (16, 24)) is x


def test_the_middle_is_cut_out() -> None:
    x = picture(16, 25)
    assert np.array_equal(centre_crop(x, (16, 16)), x[:, 4:20])
    assert np.array_equal(centre_crop(x.transpose(1, 0, 2), (16, 16)), x.transpose(1, 0, 2)[4:20])


def test_halving_is_the_mean_of_four() -> None:
    x = picture(32, 32)
    mean = x.reshape(16, 2, 16, 2, 3).mean((1, 3))
    # Each axis is rounded.
    assert np.abs(centre_crop(x, (16, 16)) - mean).max() <= 1
    assert np.abs(centre_crop(x, (8, 8)) - x.reshape(8, 4, 8, 4, 3).mean((1, 3))).max() <= 2


@pytest.mark.parametrize(("height", "width"), [(100, 140), (37, 20), (9, 13), (64, 65), (200, 33)])
def test_the_bicubic_part_against_its_kernel(height: int, width: int) -> None:
    """The last resampling is bicubic (a = −0.5, widened when shrinking): here one matrix for each axis."""
    side = 16
    x = picture(height, width)
    image = Image.fromarray(x)
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    tall, wide = round(image.height * scale), round(image.width * scale)
    values = np.asarray(image).astype(float)
    across = np.einsum("lk,jkc->jlc", bicubic(image.width, wide), values).round().clip(0, 255)
    down = np.einsum("ij,jlc->ilc", bicubic(image.height, tall), across).round().clip(0, 255)
    top, left = (tall - side) // 2, (wide - side) // 2
    assert np.abs(centre_crop(x, (side, side)) - down[top : top + side, left : left + side]).max() <= 1


def bicubic(size: int, target: int) -> npt.NDArray[np.float64]:
    """Return the weights (target, size) of bicubic resampling, Keys 1981."""
    ratio = size / target
    support = max(ratio, 1.0)
    centre = (np.arange(target) + 0.5) * ratio
    distance = np.abs((np.arange(size) + 0.5 - centre[:, None]) / support)
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return np.asarray(weights / weights.sum(1, keepdims=True))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def disc(size: int = 32) -> Tensor:
    """Return a picture (3, H, W) of a dark disc in the middle of white."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    inside = (y - size / 2 + 0.5) ** 2 + (x - size / 2 + 0.5) ** 2 < (size / 4) ** 2
    return torch.where(inside, -1.0, 1.0).expand(3, size, size)


def test_each_picture_changes_its_own_way_and_the_same_way_again() -> None:
    images = disc().repeat(8, 1, 1, 1)
    first = distort(images, generator())
    assert torch.equal(first, distort(images, generator()))
    assert not torch.equal(first, distort(images, generator(1)))
    assert len({tuple(picture.flatten().tolist()) for picture in first}) == 8
    assert torch.equal(images, disc().repeat(8, 1, 1, 1))


def test_pictures_stay_in_range_and_white_stays_light_at_the_border() -> None:
    out = distort(disc().repeat(64, 1, 1, 1), generator())
    assert out.min() >= -1
    assert out.max() <= 1
    assert out[:, :, 0].mean(1).min() > 0.3


def test_the_drawing_moves_by_little() -> None:
    size = 32
    out = distort(disc(size).repeat(64, 1, 1, 1), generator())
    dark = (1 - out.mean(1)).clamp_min(0.7) - 0.7  # (N, H, W)
    columns = torch.arange(size).float()
    centre = (dark.sum(1) * columns).sum(1) / dark.sum((1, 2)) - (size - 1) / 2
    assert centre.abs().max() < (SHIFT * 1.3 + 0.02) * size
    assert centre.std() > 0.5
