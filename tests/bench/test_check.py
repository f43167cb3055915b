"""The check against the record: a worse ratio is named, and a failing study does not hide the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from ditserve.bench import check
from ditserve.bench.check import OVERHEAD, RATE, Verdict
from ditserve.model.spec.bundle import Bundle
from tests.service.tiny_bundle import write_bundle


@pytest.mark.parametrize(
    ("recorded", "now", "word"),
    [
        (0.010, 0.011, "as recorded"),
        (0.010, 0.020, "WORSE"),
        (0.010, 0.005, "better"),
        (None, 0.005, "not on record"),
    ],
)
def test_less_is_better_where_it_is_said(recorded: float | None, now: float, word: str) -> None:
    assert Verdict(OVERHEAD, recorded, now).word == word


def test_more_is_better_where_it_is_said() -> None:
    assert [Verdict(RATE, 0.04, now).word for now in (0.01, 0.04, 0.1)] == ["WORSE", "as recorded", "better"]


def test_a_study_that_fails_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(bundle: Bundle) -> check.Figures:
        raise OSError(f"no {bundle.manifest.name} today")

    def sound(bundle: Bundle) -> check.Figures:
        return {RATE.name: 0.05}

    monkeypatch.setattr(check, "STUDIES", (broken, sound))
    write_bundle(tmp_path, weights=False)
    figures, whole = check.measure(Bundle.open(tmp_path), Console(quiet=True))
    assert (figures, whole) == ({RATE.name: 0.05}, False)
    assert "no tiny today" in capsys.readouterr().err
    assert [verdict.word for verdict in check.judge(figures, {RATE.name: 0.05})] == ["as recorded"]
