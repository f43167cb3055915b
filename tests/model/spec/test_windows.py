"""Windows over a wide picture: whatever its size, they cover it and their weights are shares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditserve.model.spec.windows import Windows, window_count, window_starts, windows_over


@st.composite
def _grids(draw: st.DrawFn) -> Windows:
    window = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    size = window[0] + draw(st.integers(0, 30)), window[1] + draw(st.integers(0, 30))
    return windows_over(size, window)


def test_windows_lie_half_a_window_apart_and_the_last_is_flush_with_the_edge() -> None:
    assert window_starts(16, 16) == (0,)
    assert window_starts(64, 16) == (0, 8, 16, 24, 32, 40, 48)
    assert window_starts(22, 16) == (0, 6)
    assert window_starts(25, 16) == (0, 8, 9)
    assert window_starts(3, 1) == (0, 1, 2)
    assert windows_over((24, 32), (16, 16)).corners == ((0, 0), (0, 8), (0, 16), (8, 0), (8, 8), (8, 16))


@given(windows=_grids())
def test_the_weights_of_every_pixel_sum_to_one_and_none_is_zero(windows: Windows) -> None:
    total = np.zeros(windows.size)
    for (y, x), weight in zip(windows.corners, windows.weights, strict=True):
        assert weight.shape == windows.window
        total[y : y + weight.shape[0], x : x + weight.shape[1]] += weight
    np.testing.assert_allclose(total, 1.0, atol=1e-6)
    assert windows.weights.min() > 0
    assert len(windows) == window_count(windows.size, windows.window) == len(windows.weights)


@settings(deadline=None)
@given(windows=_grids(), seed=st.integers(0, 99))
def test_windows_that_agree_blend_to_what_they_agree_on(windows: Windows, seed: int) -> None:
    latent = np.random.default_rng(seed).standard_normal((2, *windows.size), np.float32)
    crops = np.full((len(windows), 2, *windows.window), np.nan, np.float32)
    windows.crop(latent, crops)
    np.testing.assert_allclose(windows.blend(crops), latent, atol=1e-5)


@given(side=st.integers(1, 9), seed=st.integers(0, 9))
def test_a_single_window_is_its_own_prediction_to_the_last_bit(side: int, seed: int) -> None:
    alone = windows_over((side, 2), (side, 2))
    prediction = np.random.default_rng(seed).standard_normal((1, 3, side, 2), np.float32)
    prediction[0, 0] *= -0.0
    assert alone.blend(prediction).tobytes() == prediction[0].tobytes()


def test_a_seam_is_crossed_smoothly() -> None:
    """Two windows that differ: the blend goes from one to the other without a jump."""
    windows = windows_over((1, 24), (1, 16))
    blended = windows.blend(np.stack([np.zeros((1, 1, 16), np.float32), np.ones((1, 1, 16), np.float32)]))
    line = blended[0, 0]
    assert (line[:8] == 0).all()
    assert (line[16:] == 1).all()
    steps = np.diff(line)
    assert (steps >= 0).all()
    assert steps.max() < 0.25


def test_what_is_not_finite_stays_so() -> None:
    windows = windows_over((2, 7), (2, 3))
    predictions = np.zeros((len(windows), 1, 2, 3), np.float32)
    predictions[1, 0, 0, 0] = np.inf
    assert not np.isfinite(windows.blend(predictions)).all()


def test_windows_larger_than_the_picture_are_refused() -> None:
    with pytest.raises(ValueError, match="has no window of 4x4"):
        windows_over((3, 9), (4, 4))
