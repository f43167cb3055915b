"""The cost of serving where more is asked than can be done: real processes, and a network that waits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ditserve.bench import overhead_overload, report
from ditserve.bench.overhead_overload import measured_round
from ditserve.bench.promises import Outcome


def test_the_command_measures_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    words = ["--workers=1", "--rate=20", "--seconds=2", "--rounds=1", "--steps=4", "--warm-up-s=1"]
    assert overhead_overload.main([*words, "--pass-ms=20", "--row-ms=20"]) == 0
    assert "API: processor ms a request" in capsys.readouterr().out
    (measured,) = json.loads((tmp_path / "overhead_overload.json").read_text())["rounds"]
    assert measured["requests"] == 40
    # A worker whose network waited for nothing would draw all of them at once.
    assert measured["in_time"] < 40
    spent = measured["processor_ms"]
    assert 0 < spent["workers' event loops"] < spent["workers"]


def test_a_round_counts_what_each_request_cost() -> None:
    outcomes = [Outcome(200, True), Outcome(200, False), Outcome(503, False), Outcome(429, False)]
    measured = measured_round(outcomes, {"API": 1.0, "Valkey": 2.0}, {"API": 1.2, "Valkey": 2.1})
    assert (measured.requests, measured.refused, measured.in_time) == (4, 2, 1)
    assert measured.processor_ms == pytest.approx({"API": 50.0, "Valkey": 25.0})
