"""The measure of agreement: per band of noise levels, and strict about numbers that are not finite."""

from __future__ import annotations

import numpy as np
import pytest

from ditserve.export.errors import ExportError
from ditserve.export.verify import BANDS, ParityLimits, check, compare, report, worst

LIMITS = ParityLimits(relative_l2=0.01, cosine=0.999)


def test_each_row_counts_in_the_band_of_its_noise() -> None:
    reference = np.ones((4, 3), np.float32)
    candidate = reference.copy()
    candidate[3] += 0.5
    bands = compare(reference, candidate, np.array([0.0, 0.09, 0.1, 1.0]))
    assert [(band.low, band.high, band.rows) for band in bands] == [(0, 0.1, 2), (0.1, 0.2, 1), (0.9, 1, 1)]
    assert [band.relative_l2 for band in bands] == [0.0, 0.0, pytest.approx(0.5)]
    assert worst(bands).low == 0.9
    assert worst(bands).max_abs == pytest.approx(0.5)


@pytest.mark.parametrize("total", [1, 7, 10, 999, 1000])
def test_bands_cover_the_whole_noise_once(total: int) -> None:
    rows = np.zeros((total, 1), np.float32)
    bands = compare(rows, rows, np.linspace(0, 1, total))
    assert sum(band.rows for band in bands) == total
    assert len(bands) <= BANDS
    assert [band.low for band in bands] == sorted({band.low for band in bands})
    assert all(band.high == pytest.approx(band.low + 0.1) for band in bands)


@pytest.mark.parametrize(
    ("spoil", "words"), [(np.nan, "not finite"), (np.inf, "not finite"), (1.0, "relative L2")]
)
def test_a_bad_band_is_refused_in_one_sentence_that_says_where(spoil: float, words: str) -> None:
    reference = np.ones((2, 8), np.float32)
    candidate = reference.copy()
    candidate[1, 0] = spoil + 1
    with pytest.raises(
        ExportError, match=rf"^backbone\.onnx .*{words}.* 0\.5\.\.0\.6 of its range"
    ) as refused:
        check("backbone.onnx", compare(reference, candidate, np.array([0.0, 0.55])), LIMITS)
    assert "\n" not in str(refused.value)


def test_a_sign_flip_is_refused_by_cosine_even_where_size_would_pass() -> None:
    reference = np.ones((1, 8), np.float32)
    bands = compare(reference, -reference, np.array([0.0]))
    with pytest.raises(ExportError, match="cosine"):
        check("graph", bands, ParityLimits(relative_l2=10.0, cosine=0.9))


def test_report_is_plain_data() -> None:
    rows = np.ones((1, 2), np.float32)
    (entry,) = report(compare(rows, rows, np.array([0.005])))
    assert entry == {
        "low": 0,
        "high": 0.1,
        "rows": 1,
        "relative_l2": 0.0,
        "max_abs": 0.0,
        "cosine": pytest.approx(1.0),
    }
