"""Sheets of samples: pixels, pictures side by side, and the classes that a sheet shows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from ditserve.model.nets.autoencoder import Identity
from ditserve.model.nets.dit import DiT
from ditserve.model.sampling.sheet import picture_grid, sample_sheet, sheet_labels, to_pixels
from ditserve.model.spec.diffusion import Schedule, make_schedule

Make = Callable[..., DiT]


@pytest.fixture
def schedule() -> Schedule:
    return make_schedule("cosine", prediction="x0")


def test_pixels_and_picture_grid() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).reshape(5, 1, 1, 1).expand(5, 3, 2, 2)
    pixels = to_pixels(x)
    assert pixels[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]
    picture = np.asarray(picture_grid(pixels, 3))
    assert picture.shape == (4, 6, 3)
    assert picture[0, ::2, 0].tolist() == [0, 0, 128]
    assert picture[2, ::2, 0].tolist() == [255, 255, 255]  # the last is padding


def test_class_sheets() -> None:
    assert sheet_labels((3, 2)) == ([(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)], 3)
    assert sheet_labels((100,), 4) == ([(0,), (25,), (50,), (75,)], 4)
    assert sheet_labels((2, 1, 9)) == ([(0, 0, None), (1, 0, None)], 2)
    assert sheet_labels((), 2) == ([(), ()], 2)


def test_sheet_of_a_model(network: Make, schedule: Schedule) -> None:
    assert sample_sheet(network(), schedule, Identity(), steps=2).size == (5 * 8, 3 * 8)
