"""The picture of a run's log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ditserve.model.train import curve


def test_a_log_is_drawn_whatever_is_missing_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {"step": 1, "loss": 1.0, "smooth_loss": 1.0, "grad_norm": 2.0, "lr": 1e-3},
        {"step": 2, "loss": None, "smooth_loss": 1.0, "grad_norm": None, "lr": 1e-3},
        {"step": 3, "loss": 0.5, "grad_norm": 1.0},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curve.main([str(tmp_path)]) == 0
    assert str(tmp_path / "curve.png") in capsys.readouterr().out
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size == (700, 700)


def test_the_signals_of_a_run_have_panels_of_their_own(tmp_path: Path) -> None:
    signals = {"attention_entropy": 0.9, "activation_rms": 1.0, "router_busiest": 1.5}
    line = {"step": 1, "loss": 1.0, "grad_norm": 2.0, "lr": 1e-3}
    for lines, height in (([line], 700), ([line, {"step": 2, **signals}], 1400)):
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
        with Image.open(curve.draw_curve(tmp_path)) as picture:
            assert picture.size == (700, height)


def test_a_folder_without_a_log_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert curve.main([str(tmp_path)]) == 2
    assert f"{tmp_path / 'log.jsonl'} has no lines yet" in capsys.readouterr().err
