"""Training runs in tests draw no curves."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditserve.model.train import training


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the drawing of curves, which takes most of the time of so short a run."""

    def draw_nothing(folder: Path) -> Path:
        return folder

    monkeypatch.setattr(training, "draw_curve", draw_nothing)
