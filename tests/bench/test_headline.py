"""The headline: which cells it consists of, that a sitting goes on where the last one stopped, and what its figures are worth."""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ditserve.bench import headline
from ditserve.bench.adapters import ADAPTERS, Told
from ditserve.bench.answers import Exchange
from ditserve.bench.cells import BASIS, CAPACITY, COMPARED, REFERENCE, Cell, measured, packed, unpacked
from ditserve.bench.consumption import Consumption, family, passes
from ditserve.bench.findings import Findings, Mismatch
from ditserve.bench.headline_tables import View, curves, goals, tables
from ditserve.bench.load import Unreachable
from ditserve.bench.plots import draw_headline
from ditserve.bench.servers import ARMS, Arm, Place, ServerFailed, Serving, serving
from ditserve.bench.workload import Asked, Kind
from tests.service.tiny_bundle import write_bundle

SETTINGS = {"requests": 30, "threads": 1, "slo": 3.0, "promise_of": REFERENCE}
KINDS = [(20, True), (50, True), (20, False), (50, False)]


def test_every_name_is_an_arm() -> None:
    assert {REFERENCE, CAPACITY, *COMPARED} <= set(ARMS)
    assert {arm.adapter for arm in ARMS.values()} == set(ADAPTERS)


def test_no_cell_is_measured_twice_and_neighbouring_seeds_go_there_and_back() -> None:
    cells = [*BASIS, *measured(list(ARMS), (0.7, 1.1), (1, 2))]
    keys = [cell.key for cell in cells]
    assert len(set(keys)) == len(keys)
    there, back = ([c.arm for c in cells if c.situation == "own" and c.seed == seed] for seed in (1, 2))
    assert there == back[::-1] == list(COMPARED)


def test_an_exchange_survives_the_file() -> None:
    done = Exchange(Asked(1.25, Kind(20, True), 0, 0), 1.251, 2.5, 200, Told(10, "unipc-1-10", True))
    refused = Exchange(Asked(1.5, Kind(50, False), 0, 0), 1.5, 1.6, 503)
    for each in (done, refused):
        assert unpacked(json.loads(json.dumps(packed(each)))) == each


def test_findings_are_gone_on_from_but_not_under_other_settings(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    findings = Findings(path, SETTINGS)
    for number, rate in enumerate((2.0, 4.0)):
        cell = Cell("saturated", CAPACITY, seed=number)
        findings.add(cell, {"images_per_s": rate, "void": False})
    findings.add(Cell("offered", "EDF", 0.7, 1), {"exchanges": [], "void": True})
    again = Findings(path, SETTINGS)
    assert again.capacity(CAPACITY) == 3.0
    assert Cell("offered", "EDF", 0.7, 1).key not in again.cells  # void: to be measured again
    with pytest.raises(Mismatch, match="slo"):
        Findings(path, {**SETTINGS, "slo": 5.0})
    assert not Findings(path, {**SETTINGS, "slo": 5.0}, fresh=True).cells


def test_a_load_stays_the_same_traffic_when_capacity_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    findings = Findings(path, SETTINGS)
    assert findings.unit(CAPACITY) == 0.0  # not known yet, and not kept as such
    findings.add(Cell("saturated", CAPACITY, seed=0), {"images_per_s": 2.0, "void": False})
    assert findings.unit(CAPACITY) == 2.0
    findings.add(Cell("saturated", CAPACITY, seed=1), {"images_per_s": 4.0, "void": False})
    assert findings.unit(CAPACITY) == Findings(path, SETTINGS).unit(CAPACITY) == 2.0


def test_machines_are_not_mixed_but_their_figures_can_be_read_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    here = Findings(path, SETTINGS)
    here.add(Cell("saturated", CAPACITY), {"images_per_s": 2.0, "void": False})
    Findings(path, SETTINGS).require_machine()
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "machine": {**stored["machine"], "vectors": "other"}}))
    elsewhere = Findings(path, SETTINGS)
    assert elsewhere.capacity(CAPACITY) == 2.0
    with pytest.raises(Mismatch, match=r"found\.json holds figures of a machine with another vectors"):
        elsewhere.require_machine()


def offered(latency: float, told: Told) -> dict[str, Any]:
    asked = [Asked(k * 1.0, Kind(*KINDS[k % 4]), 0, k) for k in range(200)]
    lines = [packed(Exchange(each, each.at, each.at + latency, 200, told)) for each in asked]
    return {"exchanges": lines, "void": False, "rows_per_pass": 3.0}


@pytest.fixture
def view(tmp_path: Path) -> View:
    """Ours answers in 1 s and the best peer in 4; a promise is 3 s for everybody."""
    findings = Findings(tmp_path / "found.json", SETTINGS)
    for arm, seconds in ((REFERENCE, 1.0), (CAPACITY, 0.5)):
        findings.add(Cell("alone", arm), {"alone": [[*kind, seconds] for kind in KINDS], "void": False})
        findings.add(Cell("saturated", arm), {"images_per_s": 1 / seconds, "void": False})
    full = Told(20, "dpmpp-2m-20", False)
    for seed in (1, 2, 3):
        for arm, latency in (("planner", 1.0), ("EDF", 1.0), ("LitServe", 4.0)):
            for load in (0.5, 0.7, 1.1, 1.4):
                findings.add(Cell("offered", arm, load, seed), offered(latency, full))
    model = tmp_path / "model"
    (model / "bundle").mkdir(parents=True)
    write_bundle(model / "bundle", weights=False)
    sitting = headline.Sitting(options(model), findings, Console(quiet=True))
    return View(findings, sitting.summary, list(ARMS), (0.5, 0.7, 1.1, 1.4), (1, 2, 3))


def options(model: Path, *more: str) -> argparse.Namespace:
    return headline.parse([str(model), "--requests=30", "--threads=1", *more])


def test_the_goals_are_held_against_what_was_found(view: View) -> None:
    found = {goal: value for goal, value, _ in goals(view)}
    assert [value for value in found.values() if value is not None] == pytest.approx(
        [2.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    )
    assert found["goodput at 1.1 over the best peer's, at least 3"] is None  # the peer's is nothing at all
    assert found["p99 at 0.7 of each its own capacity, the same, at least 1.5"] is None  # not measured


def test_tables_and_figure_hold_what_was_measured(view: View, tmp_path: Path) -> None:
    console = Console(width=200, file=io.StringIO())
    for table in tables(view):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "load 1.1: 2.20 requests/s" in text
    assert "every arm at 0.7 of its own" not in text
    written = headline.report(tables(view), "found").splitlines()
    title = written.index("## load 1.1: 2.20 requests/s offered to everyone")
    head, rule, *rows = written[title + 2 :]
    assert head.startswith("| arm | in time |")
    assert rule.startswith("|---|---:|")
    assert [row.split(" | ")[:2] for row in rows[:3]] == [
        ["| planner", "100.0 %"],
        ["| EDF", "100.0 %"],
        ["| LitServe", "0.0 %"],
    ]
    draw_headline(curves(view), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_an_arm_is_shown_where_the_reference_was_not_measured(view: View) -> None:
    view.findings.cells = {key: cell for key, cell in view.findings.cells.items() if CAPACITY in key}
    unloaded, *_ = tables(view)
    assert [column.header for column in unloaded.columns][1] == "20 steps, s"
    assert list(unloaded.columns[0].cells) == [CAPACITY]


@pytest.mark.anyio
async def test_a_sitting_ends_in_time_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bundle").mkdir()
    write_bundle(tmp_path / "bundle", weights=False)
    path = tmp_path / "found.json"

    @asynccontextmanager
    async def fake(arm: Arm, place: Place) -> AsyncIterator[Serving]:
        yield Serving("http://nowhere", os.getpid(), ADAPTERS[arm.adapter])

    async def cell(self: headline.Sitting, each: Cell) -> dict[str, Any]:
        measured_cells.append(each.key)
        if each.situation == "alone":
            return {"alone": [[*kind, 1.0] for kind in KINDS], "void": False}
        if each.situation == "saturated":
            return {"images_per_s": 100.0, "void": False}
        if each.arm == "EDF":
            raise Unreachable("the server is gone")
        return offered(1.0, Told(20, "dpmpp-2m-20", False))

    measured_cells: list[str] = []
    monkeypatch.setattr(headline, "serving", fake)
    monkeypatch.setattr(headline.Sitting, "_cell", cell)

    async def sit(minutes: float) -> tuple[bool, Findings]:
        given = options(
            tmp_path, f"--minutes={minutes}", "--arms", "planner", "EDF", "LitServe", "--seeds", "1"
        )
        findings = Findings(path, SETTINGS)
        return await headline.Sitting(given, findings, Console(quiet=True)).run(), findings

    whole, _ = await sit(0.0)
    assert (whole, measured_cells) == (False, [])
    whole, findings = await sit(60.0)
    assert whole
    assert len(measured_cells) == len(set(measured_cells))
    assert findings.tuned["LitServe"] in {(1, 0.0, 1), (4, 0.01, 1), (4, 0.05, 1), (8, 0.05, 1)}
    failed = {key for key, each in findings.cells.items() if "failed" in each}
    assert failed == {key for key in measured_cells if "EDF" in key}
    measured_cells.clear()
    whole, _ = await sit(60.0)
    assert set(measured_cells) == failed  # what failed is tried again, and nothing else


@pytest.mark.anyio
@pytest.mark.parametrize("capacity", [4.0, None])
async def test_an_own_load_needs_the_arm_s_own_capacity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capacity: float | None
) -> None:
    (tmp_path / "bundle").mkdir()
    write_bundle(tmp_path / "bundle", weights=False)
    rates: dict[str, float] = {}

    async def cell(self: headline.Sitting, each: Cell) -> dict[str, Any]:
        rates[each.situation] = self._rate(each)
        if each.situation == "own":
            return offered(1.0, Told(20, "dpmpp-2m-20", False))
        if capacity is None:
            raise ServerFailed("no such model")
        return {"images_per_s": capacity, "void": False}

    monkeypatch.setattr(headline.Sitting, "_cell", cell)
    findings = Findings(tmp_path / "found.json", SETTINGS)
    findings.add(Cell("alone", REFERENCE), {"alone": [[*kind, 1.0] for kind in KINDS], "void": False})
    sitting = headline.Sitting(options(tmp_path), findings, Console(quiet=True))
    assert await sitting._measure(Cell("own", "LitServe", 0.5, 1))
    assert rates.get("own") == (capacity and 0.5 * capacity)


@pytest.mark.anyio
async def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    arm = Arm("broken", ("-c", "raise SystemExit('no such model')"), "peer")
    with pytest.raises(ServerFailed, match="no such model"):
        async with serving(arm, Place(tmp_path, Path(sys.executable), 1)):
            pass


@pytest.mark.anyio
async def test_a_family_is_counted_whole_and_passes_are_read() -> None:
    child = await asyncio.create_subprocess_exec("sleep", "60")
    try:
        assert {os.getpid(), child.pid} <= set(family(os.getpid()))
        assert Consumption.of(os.getpid()).resident_mib > Consumption.of(child.pid).resident_mib > 0
    finally:
        child.kill()
        await child.wait()
    text = 'dit_batch_rows_sum{stop_reason="cap"} 30.0\ndit_batch_rows_count{stop_reason="cap"} 10.0\n'
    assert passes(text + 'dit_batch_rows_sum{stop_reason="idle"} 6.0\n') == (36.0, 10.0)
