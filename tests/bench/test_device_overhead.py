"""The host's part of steps on a device: the command's figures, and what a turn sends and asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditserve.bench import device_overhead, report
from ditserve.service.backends.resident import MOST_STEPS
from tests.service.tiny_bundle import MANIFEST, write_bundle


def test_a_turn_is_two_copies_there_one_back_and_one_wait() -> None:
    time = device_overhead.host_time(MANIFEST, 0.001, rows=16, turns=20, joins=False)
    assert (time.steps, time.uploads, time.downloads, time.waits) == (MOST_STEPS, 2, 1, 1)
    assert time.p50_us < 1000  # this is for machines busy with something else
    slow = device_overhead.host_time(MANIFEST, 20.0, rows=16, turns=20, joins=False)
    assert slow.steps == 1
    assert slow.p50_us > time.p50_us


def test_the_command_tells_steps_with_and_without_newcomers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    write_bundle(tmp_path, weights=False)
    device_overhead.main([str(tmp_path), "--turns", "10", "--step-ms", "1"])
    assert "the host's time of a step of 16 rows" in capsys.readouterr().out
    kept = report.read("device_overhead")
    assert kept is not None
    assert [time["joins"] for time in kept["times"]] == [False, True]
