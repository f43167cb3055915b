"""The record of a benchmark: its figures with the options, the machine and its other users."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from ditserve.bench import report


def test_figures_are_kept_with_what_they_were_found_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    assert report.read("speed") is None
    options = Namespace(seed=3, bundle=Path("model/zoo/emoji64"), others=[Path("a"), Path("b")])
    report.save("speed", options, report.BackgroundLoad(), {"ms": 1.5})
    assert (tmp_path / "results" / "speed.json").is_file()
    kept = report.read("speed")
    assert kept is not None
    assert kept["ms"] == 1.5
    assert kept["options"] == {"seed": 3, "bundle": "model/zoo/emoji64", "others": ["a", "b"]}
    assert kept["machine"]["cores"] >= 1
    assert "numpy" in kept["machine"]["packages"]


def test_neighbours_are_shares_of_the_machine() -> None:
    shares = report.BackgroundLoad().shares()
    assert 0.0 <= shares["share_stolen"] <= 1.0
    assert shares["share_of_others"] >= 0.0


def test_a_package_that_is_not_there_is_left_out() -> None:
    assert list(report.versions(["numpy", "no-such-package"])) == ["numpy"]
