"""Random changes of pictures: bounded, repeatable, and small enough to leave the picture what it was."""

from __future__ import annotations

import torch
from torch import Tensor

from ditserve.model.data.augmentation import SHIFT, distorted


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def disc(size: int = 32) -> Tensor:
    """A dark disc in the middle of white."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    inside = (y - size / 2 + 0.5) ** 2 + (x - size / 2 + 0.5) ** 2 < (size / 4) ** 2
    return torch.where(inside, -1.0, 1.0).expand(3, size, size)


def test_each_picture_changes_its_own_way_and_the_same_way_again() -> None:
    images = disc().repeat(8, 1, 1, 1)
    first = distorted(images, generator())
    assert torch.equal(first, distorted(images, generator()))
    assert not torch.equal(first, distorted(images, generator(1)))
    assert len({tuple(picture.flatten().tolist()) for picture in first}) == 8
    assert torch.equal(images, disc().repeat(8, 1, 1, 1))


def test_pictures_stay_in_range_and_white_stays_light_at_the_border() -> None:
    out = distorted(disc().repeat(64, 1, 1, 1), generator())
    assert out.min() >= -1
    assert out.max() <= 1
    assert out[:, :, 0].mean(1).min() > 0.3


def test_the_drawing_moves_by_little() -> None:
    size = 32
    out = distorted(disc(size).repeat(64, 1, 1, 1), generator())
    dark = (1 - out.mean(1)).clamp_min(0.7) - 0.7  # (N, H, W)
    places = torch.arange(size).float()
    centre = (dark.sum(1) * places).sum(1) / dark.sum((1, 2)) - (size - 1) / 2
    assert centre.abs().max() < (SHIFT * 1.3 + 0.02) * size
    assert centre.std() > 0.5
