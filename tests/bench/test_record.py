"""What is kept beside the figures of a benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditserve.bench import record


def test_figures_are_kept_with_what_they_were_found_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    assert record.read("speed") is None
    options = {"seed": 3, "bundle": Path("model/zoo/emoji")}
    path = record.save("speed", options, record.Neighbours(), {"ms": 1.5})
    assert path == tmp_path / "results" / "speed.json"
    kept = record.read("speed")
    assert kept is not None
    assert kept["ms"] == 1.5
    assert kept["options"] == {"seed": 3, "bundle": "model/zoo/emoji"}
    assert kept["machine"]["cores"] >= 1
    assert "numpy" in kept["machine"]["packages"]


def test_neighbours_are_shares_of_the_machine() -> None:
    told = record.Neighbours().told()
    assert 0.0 <= told["share_stolen"] <= 1.0
    assert told["share_of_others"] >= 0.0


def test_a_package_that_is_not_there_is_left_out() -> None:
    assert list(record.versions(["numpy", "no-such-package"])) == ["numpy"]
