"""The interval after which a thread hands over: the command's figures, and the interval it leaves behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ditserve.bench import handover, report


def test_the_command_compares_both_intervals_and_changes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    before = sys.getswitchinterval()
    handover.main(["--waits", "3"])
    assert sys.getswitchinterval() == before
    assert "a thread that wants to run" in capsys.readouterr().out
    kept = report.read("handover")
    assert kept is not None
    assert [(one["work"], one["interval_ms"]) for one in kept["lateness"]] == [
        (work, interval) for work in ("nothing", "encode", "python") for interval in (5.0, 0.5)
    ]
