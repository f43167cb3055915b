"""Volumes as files, and the clip of a volume that turns."""

from __future__ import annotations

import json
from io import BytesIO

import numpy as np
import numpy.typing as npt

from ditserve.service.worker.volumes import VIEWS, encode_volume, turntable, view

Pixels = npt.NDArray[np.uint8]


def volume_of(inside: npt.NDArray[np.bool_], colour: tuple[int, int, int] = (255, 255, 255)) -> Pixels:
    return np.where(inside[..., None], np.array(colour, np.uint8), np.uint8(0)).astype(np.uint8)


def ball(side: int = 24) -> npt.NDArray[np.bool_]:
    z, y, x = np.mgrid[0:side, 0:side, 0:side] - (side - 1) / 2
    inside: npt.NDArray[np.bool_] = z**2 + y**2 + x**2 < (side / 3) ** 2
    return inside


def test_the_numbers_come_back_from_the_file() -> None:
    volume = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), np.uint8)
    data = encode_volume(volume, metadata={"seed": "7"})
    with np.load(BytesIO(data), allow_pickle=False) as file:
        np.testing.assert_array_equal(file["volume"], volume)
        assert json.loads(str(file["metadata"])) == {"seed": "7"}
    assert data == encode_volume(volume, metadata={"seed": "7"})


def test_a_ball_looks_the_same_from_everywhere_and_a_slab_does_not() -> None:
    views = turntable(volume_of(ball())).astype(int)
    assert views.shape == (VIEWS, 24, 24, 3)
    assert views[0, 12, 12].min() > 200
    assert views[0, 0, 0].max() == 0
    assert max(np.abs(one - views[0]).mean() for one in views) < 6
    slab = np.zeros((16, 16, 16), bool)
    slab[:, :, 6:10] = True
    front, side = view(volume_of(slab), 0.0), view(volume_of(slab), np.pi / 2)
    assert (front[8].max(axis=-1) > 0).sum() == 4
    assert (side[8].max(axis=-1) > 0).sum() == 16


def test_what_is_in_front_hides_what_is_behind() -> None:
    volume = volume_of(np.zeros((20, 8, 8), bool))
    volume[:8], volume[12:] = (255, 0, 0), (0, 0, 255)
    red, _, blue = view(volume, 0.0)[4, 4].astype(int)
    assert red > blue
    red, _, blue = view(volume, np.pi)[4, 4].astype(int)
    assert blue > red


def test_nothing_is_black_and_any_shape_is_turned() -> None:
    for shape in ((1, 1, 1), (3, 5, 9), (9, 5, 3)):
        assert turntable(volume_of(np.zeros(shape, bool)), views=4).shape == (4, *shape[1:], 3)
        assert turntable(volume_of(np.zeros(shape, bool)), views=4).max() == 0
