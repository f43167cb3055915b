"""Growth: every event is measured at every size, against a real queue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ditserve.bench import growth, report


def test_the_command_measures_every_event_at_every_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(growth, "FLEETS", ((2, 40, "flash"),))
    assert growth.main(["--depths", "1", "5", "--workers", "1", "2", "--calls", "3"]) == 0
    assert "submit before all of one caller" in capsys.readouterr().out
    kept = json.loads((tmp_path / "growth.json").read_text())
    events = {(time["event"], time["size"]) for time in kept["queue_us"]}
    assert {(event, size) for event in ("submit", "load", "claim", "finish") for size in (1, 5)} <= events
    assert [time["size"] for time in kept["admission_us"]] == [1, 2]
    assert 0 < kept["fleets"][0]["attainment"] <= 1
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
