"""Sheets of samples: pixels, pictures side by side, and the classes that a sheet shows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from ditserve.model.nets.autoencoder import Identity
from ditserve.model.nets.dit import DiT
from ditserve.model.sampling.sheet import (
    STRIP,
    captioned_grid,
    draw_sheet,
    picture_grid,
    sheet_captions,
    sheet_labels,
    sheet_samples,
    to_pixels,
)
from ditserve.model.spec.diffusion import Schedule, make_schedule
from ditserve.model.spec.manifest import Factor

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
    factors = (
        Factor(name="label", classes=("cat", "dog", "a very long name", "owl", "ü")),
        Factor(name="style", classes=("flat", "shaded", "line")),
    )
    sheet = draw_sheet(sheet_samples(network(), schedule, steps=2), Identity(), factors)
    (picture,) = sheet.frames
    width, height = picture.size
    assert (width % 5, height) == (0, 3 * (8 + STRIP))
    captions = np.asarray(picture).reshape(3, 8 + STRIP, width, 3)[:, 8:]
    dark = (captions.reshape(3, STRIP, 5, width // 5, 3) < 100).any((1, 3, 4))
    assert dark.all(), "every picture has a caption"


def test_a_long_caption_takes_two_lines_and_is_cut_off_there() -> None:
    pixels = np.full((2, 128, 128, 3), 200, np.uint8)
    short, long = "a fox", "a very long caption that says more of a fox than two lines of a picture can hold"
    assert captioned_grid(pixels, 2, [short, short]).size == (256, 128 + STRIP)
    sheet = np.asarray(captioned_grid(pixels, 2, [short, long]))
    assert sheet.shape[:2] == (128 + 2 * STRIP, 256)
    dark = (sheet[128:].reshape(2, STRIP, 2, 128, 3) < 100).any((1, 3, 4))
    assert dark.tolist() == [[True, True], [False, True]]


def test_captions_are_the_names_of_the_classes() -> None:
    factors = (Factor(name="label", classes=("cat", "dog")), Factor(name="style", classes=("flat",)))
    assert sheet_captions([(1, 0), (0, None)], factors) == ["dog, flat", "cat"]
    assert sheet_captions([()], ()) == [""]
