"""Promises on a real machine: a short run beside burning neighbours, and what the figures mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ditserve.bench import promises
from ditserve.bench.promises import Cell, Outcome


def test_above_capacity_beside_neighbours_promises_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "promises.md"
    machine = ["--workers=1", "--neighbours=2", "--loads=3", "--seconds=3", "--deadline-s=2", "--steps=25"]
    assert promises.main([*machine, "--seeds", "1", "2", f"--report={written}"]) == 0
    out, text = capsys.readouterr().out, written.read_text()
    assert out.endswith(text + "\n")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| 1 ")]
    open_loop, returning = (dict(zip(promises.COLUMNS, row, strict=False)) for row in rows)
    assert int(open_loop["refused"].rstrip("%")) > 20
    # The goal, 3 %, is measured on a machine that does nothing else (docs/benchmarks.md): other tests run
    # beside this one. Where promises did not follow the machine's pace, 52 to 64 % were broken.
    assert float(open_loop["broken of the accepted"].rstrip("%")) <= 30.0
    assert int(returning["refused"].rstrip("%")) < 100


def test_a_cell_counts_what_was_accepted_and_what_was_in_time() -> None:
    outcomes = (
        Outcome(200, in_time=True, steps=50, ended_s=3.9),
        Outcome(200, in_time=True, steps=50, ended_s=4.0),
        Outcome(200, in_time=True, steps=25, ended_s=6.0),
        Outcome(200, in_time=False, steps=50),
        Outcome(504, in_time=False),
        Outcome(503, in_time=False),
        Outcome(200, in_time=True, steps=50, ended_s=9.0, returns=1, on_first=True),
        Outcome(503, in_time=False, returns=5),
    )
    cell = Cell(1, 8, 3.0, since_s=4.0, until_s=9.0, closed_per_s=1.0, steps=50, outcomes=outcomes)
    assert (cell.refused, cell.accepted, cell.in_time) == (2, 6, 4)
    assert cell.broken == pytest.approx(2 / 6)
    assert cell.in_time_per_s == pytest.approx(3 / 5)
    assert cell.used == pytest.approx(125 / 250)
    assert cell.degraded == pytest.approx(1 / 4)
    assert cell.taken_on_return == 0.5
    twice = replace(cell, outcomes=2 * outcomes, runs=2)
    assert (twice.broken, twice.in_time_per_s, twice.used) == (cell.broken, cell.in_time_per_s, cell.used)
