"""The engine's own time stays small, and a strict engine's images do not depend on the other rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ditserve.bench import engine_overhead, report
from tests.service.tiny_bundle import MANIFEST, write_bundle


@pytest.fixture(autouse=True)
def _results_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")


def test_a_step_of_eight_rows_costs_little() -> None:
    times = engine_overhead.engine_ms(MANIFEST, rows=8, steps=100)
    assert len(times) == 5
    assert np.median(times) < 5.0  # milliseconds; this is for machines busy with something else


def test_the_command_says_what_strict_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle(tmp_path, weights=False)
    engine_overhead.main([str(tmp_path), "--strict", "4", "--images", "5"])
    assert "another order: True" in capsys.readouterr().out


def test_the_command_compares_with_the_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle(tmp_path, weights=False)
    engine_overhead.main([str(tmp_path), "--steps", "40"])
    assert "8 rows of tiny" in capsys.readouterr().out
    kept = report.read("engine_overhead")
    assert kept is not None
    assert kept["share"] == pytest.approx(kept["p50_ms"] / kept["network_ms"])
