"""The service without a network: real processes answer, and their cost is compared with an echo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ditserve.bench import overhead_http, report
from ditserve.bench.overhead_http import ECHO, NOOP, OverheadRound
from tests.service.tiny_bundle import write_bundle


def test_the_command_measures_both_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    bundle = tmp_path / "tiny"
    bundle.mkdir()
    write_bundle(bundle, weights=False)
    words = [f"--bundle={bundle}", "--rounds=1", "--requests=20", "--connections=2"]
    assert overhead_http.main(words) == 0
    assert "requests/s" in capsys.readouterr().out
    kept = json.loads((tmp_path / "overhead_http.json").read_text())
    assert [measured["server"] for measured in kept["rounds"]] == [NOOP, ECHO]
    assert set(kept["rounds"][0]["processor_ms"]) == {"API", "worker", "Valkey"}


def test_ratios_are_taken_within_each_round() -> None:
    def of(server: str, per_s: float) -> OverheadRound:
        return OverheadRound(server, 1.0, 2.0, 3.0, per_s, 1.0, {"server": 0.1})

    rounds = [of(NOOP, 100), of(ECHO, 1000), of(NOOP, 300), of(ECHO, 1500), of(NOOP, 30), of(ECHO, 100)]
    assert overhead_http.medians(rounds)["ratio"]["per_s"] == pytest.approx(0.2)
