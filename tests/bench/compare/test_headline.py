"""The headline: its runs, its sessions that continue one another, and its tables and goals."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ditserve.bench import headline, report
from ditserve.bench.compare import session, speed
from ditserve.bench.compare.results_store import Headline, ResultsMismatch, ResultsStore
from ditserve.bench.compare.runs import (
    BASIS,
    CAPACITY,
    COMPARED,
    REFERENCE,
    Run,
    packed,
    planned_runs,
    unpacked,
)
from ditserve.bench.compare.session import HeadlineSession
from ditserve.bench.compare.systems import SYSTEMS, ServerFailed, ServerSetup, SystemUnderTest, running_server
from ditserve.bench.compare.tables import document, goals, tables
from ditserve.bench.load import generator
from ditserve.bench.load.adapters import ADAPTERS, Drawing, DrawnWith
from ditserve.bench.load.generator import ServerUnreachable
from ditserve.bench.load.summary import Exchange
from ditserve.bench.load.workload import OfferedRequest, RequestKind
from tests.prompted_bundle import PROMPTS
from tests.service.tiny_bundle import write_bundle

DRAWING = Drawing("ddim", "leading", 2.0, ({"label": 0},))
SETTINGS = {"requests": 30, "threads": 1, "slo": 3.0, "promise_of": REFERENCE}
KINDS = [(20, True), (50, True), (20, False), (50, False)]


def test_every_name_is_a_system() -> None:
    assert {REFERENCE, CAPACITY, *COMPARED} <= set(SYSTEMS)
    assert {system.adapter for system in SYSTEMS.values()} == set(ADAPTERS)


def test_no_run_is_made_twice_and_neighbouring_seeds_go_there_and_back() -> None:
    runs = [*BASIS, *planned_runs(list(SYSTEMS), (0.7, 1.1), (1, 2))]
    keys = [run.key for run in runs]
    assert len(set(keys)) == len(keys)
    there, back = ([r.system for r in runs if r.situation == "own" and r.seed == seed] for seed in (1, 2))
    assert there == back[::-1] == list(COMPARED)


def test_an_exchange_survives_the_file() -> None:
    done = Exchange(
        OfferedRequest(1.25, RequestKind(20, True), 0, 0), 1.251, 2.5, 200, DrawnWith(10, "unipc-1-10", True)
    )
    refused = Exchange(OfferedRequest(1.5, RequestKind(50, False), 0, 0), 1.5, 1.6, 503)
    for exchange in (done, refused):
        assert unpacked(json.loads(json.dumps(packed(exchange)))) == exchange


def test_results_are_gone_on_from_but_not_under_other_settings(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    store = ResultsStore(path, SETTINGS)
    for number, rate in enumerate((2.0, 4.0)):
        run = Run("saturated", CAPACITY, seed=number)
        store.add(run, {"images_per_s": rate, "void": False})
    store.add(Run("offered", "EDF", 0.7, 1), {"exchanges": [], "void": True})
    again = ResultsStore(path, SETTINGS)
    assert again.capacity(CAPACITY) == 3.0
    assert Run("offered", "EDF", 0.7, 1).key not in again.runs  # void: to be measured again
    with pytest.raises(ResultsMismatch, match="slo"):
        ResultsStore(path, {**SETTINGS, "slo": 5.0})
    assert not ResultsStore(path, {**SETTINGS, "slo": 5.0}, fresh=True).runs


def test_a_load_stays_the_same_traffic_when_capacity_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    store = ResultsStore(path, SETTINGS)
    assert store.unit(CAPACITY) == 0.0  # not known yet, and not kept as such
    store.add(Run("saturated", CAPACITY, seed=0), {"images_per_s": 2.0, "void": False})
    assert store.unit(CAPACITY) == 2.0
    store.add(Run("saturated", CAPACITY, seed=1), {"images_per_s": 4.0, "void": False})
    assert store.unit(CAPACITY) == ResultsStore(path, SETTINGS).unit(CAPACITY) == 2.0


def test_machines_are_not_mixed_but_their_figures_can_be_read_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    here = ResultsStore(path, SETTINGS)
    here.add(Run("saturated", CAPACITY), {"images_per_s": 2.0, "void": False})
    ResultsStore(path, SETTINGS).require_machine()
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "machine": {**stored["machine"], "vectors": "other"}}))
    elsewhere = ResultsStore(path, SETTINGS)
    assert elsewhere.capacity(CAPACITY) == 2.0
    with pytest.raises(ResultsMismatch, match=r"found\.json holds figures of a machine with another vectors"):
        elsewhere.require_machine()


def offered(latency: float, drawn_with: DrawnWith) -> dict[str, Any]:
    requests = [OfferedRequest(k * 1.0, RequestKind(*KINDS[k % 4]), 0, k) for k in range(200)]
    lines = [
        packed(Exchange(request, request.at, request.at + latency, 200, drawn_with)) for request in requests
    ]
    return {"exchanges": lines, "void": False, "rows_per_pass": 3.0}


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    """Results in which ours answers in 1 s and the best peer in 4; the promise to everybody is 3 s."""
    store = ResultsStore(tmp_path / "found.json", SETTINGS)
    for system, seconds in ((REFERENCE, 1.0), (CAPACITY, 0.5)):
        store.add(Run("alone", system), {"alone": [[*kind, seconds] for kind in KINDS], "void": False})
        store.add(Run("saturated", system), {"images_per_s": 1 / seconds, "void": False})
    full = DrawnWith(20, "dpmpp-2m-20", False)
    for seed in (1, 2, 3):
        for system, latency in (("planner", 1.0), ("EDF", 1.0), ("LitServe", 4.0)):
            for load in (0.5, 0.7, 1.1, 1.4):
                store.add(Run("offered", system, load, seed), offered(latency, full))
    return store


@pytest.fixture
def results(store: ResultsStore, tmp_path: Path) -> Headline:
    made = open_session(store, tmp_path / "model", "--loads", "0.5", "0.7", "1.1", "1.4")
    return made.headline()


def open_session(store: ResultsStore, model: Path, *more: str) -> HeadlineSession:
    model.mkdir(parents=True, exist_ok=True)
    write_bundle(model, weights=False)
    options = headline.parse([str(model), "--requests=30", "--threads=1", *more])
    return HeadlineSession(options, store, Console(quiet=True))


def test_the_goals_are_held_against_what_was_found(results: Headline) -> None:
    found = {goal: value for goal, value, _ in goals(results)}
    known = {goal: value for goal, value in found.items() if value is not None}
    assert list(known.values()) == pytest.approx([2.0, 1.0, 1.0, 1.0])
    assert {"answered in time at 1.1, at least 0.99", "not degraded at 0.5, all"} < known.keys()
    assert found["goodput at 1.1 over the best peer's, at least 4"] is None  # the peer's is nothing at all
    assert found["answered in time at 8, at least 0.9"] is None  # not measured


def test_tables_and_figure_hold_what_was_measured(
    results: Headline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    console = Console(width=200, file=io.StringIO())
    headline.publish(results, "shown", console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "load 1.1: 2.20 requests/s" in text
    assert "every arm at 0.7 of its own" not in text
    written = (tmp_path / "shown.md").read_text().splitlines()
    title = written.index("## load 1.1: 2.20 requests/s offered to everyone")
    head, rule, *rows = written[title + 2 :]
    assert head.startswith("| arm | in time |")
    assert rule.startswith("|---|---:|")
    assert [row.split(" | ")[:2] for row in rows[:3]] == [
        ["| planner", "100.0 %"],
        ["| EDF", "100.0 %"],
        ["| LitServe", "0.0 %"],
    ]
    assert (tmp_path / "shown.png").stat().st_size > 0
    assert document(tables(Headline.read(tmp_path / "shown.json")), "shown").splitlines() == written


def test_a_system_is_shown_where_the_reference_was_not_measured(store: ResultsStore, tmp_path: Path) -> None:
    store.runs = {key: run for key, run in store.runs.items() if CAPACITY in key}
    unloaded, *_ = tables(open_session(store, tmp_path / "model").headline())
    assert [column.header for column in unloaded.columns][1] == "20 steps, s"
    assert list(unloaded.columns[0].cells) == [CAPACITY]


@pytest.mark.parametrize("name", ["headline", "headline-avx2", "headline-zen4"])
def test_the_published_tables_are_those_of_the_published_numbers(name: str) -> None:
    published = (report.RESULTS / f"{name}.md").read_text()
    assert document(tables(Headline.read(report.RESULTS / f"{name}.json")), name) == published


@pytest.mark.anyio
async def test_a_session_ends_in_time_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "raw" / "found.json"

    async def execute(self: HeadlineSession, run: Run) -> dict[str, Any]:
        made.append(run.key)
        if run.situation == "alone":
            return {"alone": [[*kind, 1.0] for kind in KINDS], "void": False}
        if run.situation == "saturated":
            return {"images_per_s": 100.0, "void": False}
        if run.system == "EDF":
            raise ServerUnreachable("the server is gone")
        return offered(1.0, DrawnWith(20, "dpmpp-2m-20", False))

    made: list[str] = []
    monkeypatch.setattr(HeadlineSession, "_execute", execute)

    async def run_session(minutes: float) -> tuple[bool, ResultsStore]:
        store = ResultsStore(path, SETTINGS)
        words = [f"--minutes={minutes}", "--arms", "planner", "EDF", "LitServe", "--seeds", "1"]
        return await open_session(store, tmp_path, *words).run(), store

    whole, _ = await run_session(0.0)
    assert (whole, made) == (False, [])
    whole, store = await run_session(60.0)
    assert whole
    assert len(made) == len(set(made))
    assert store.tuned["LitServe"] in {(1, 0.0, 1), (4, 0.01, 1), (4, 0.05, 1), (8, 0.05, 1)}
    failed = {key for key, run in store.runs.items() if "failed" in run}
    assert failed == {key for key in made if "EDF" in key}
    made.clear()
    whole, _ = await run_session(60.0)
    assert set(made) == failed  # what failed is tried again, and nothing else


@pytest.mark.anyio
@pytest.mark.parametrize("capacity", [4.0, None])
async def test_an_own_load_needs_the_system_s_own_capacity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capacity: float | None
) -> None:
    rates: dict[str, float] = {}

    async def execute(self: HeadlineSession, run: Run) -> dict[str, Any]:
        rates[run.situation] = self._rate(run)
        if run.situation == "own":
            return offered(1.0, DrawnWith(20, "dpmpp-2m-20", False))
        if capacity is None:
            raise ServerFailed("no such model")
        return {"images_per_s": capacity, "void": False}

    monkeypatch.setattr(HeadlineSession, "_execute", execute)
    store = ResultsStore(tmp_path / "found.json", SETTINGS)
    store.add(Run("alone", REFERENCE), {"alone": [[*kind, 1.0] for kind in KINDS], "void": False})
    assert await open_session(store, tmp_path)._measure(Run("own", "LitServe", 0.5, 1))
    assert rates.get("own") == (capacity and 0.5 * capacity)


def test_one_command_compares_servers_of_a_bundle_that_draws_from_texts(
    prompted_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real servers, and no more runs than one of each: the promise, the unit of load, and one overload."""
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(session, "REQUESTS", {"saturated": 8, "alone": 4, "tuning": 4})
    monkeypatch.setattr(session, "SATURATED_REQUESTS", 8)
    monkeypatch.setattr(session, "WARM_UP", 1)
    monkeypatch.setattr(session, "MAX_DRIFT", 1e9)
    monkeypatch.setattr(speed, "MEASURE_S", 0.1)
    monkeypatch.setattr(session, "LEAST_PROMISES", 0)
    monkeypatch.setattr(generator.unloaded, "__defaults__", (1,))
    monkeypatch.setattr(session, "batch_tunings", lambda *_: ())
    basis, run = (Run("alone", REFERENCE), Run("saturated", CAPACITY)), Run("offered", "planner", 8.0, 1)
    assert set(basis) < set(BASIS)
    monkeypatch.setattr(session, "BASIS", basis)
    monkeypatch.setattr(session, "planned_runs", lambda *_: [run])
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    words = ["--requests=12", "--threads=1", "--seeds=1", "--loads", "8", "--arms", "planner", REFERENCE]
    words += [f"--prompts={prompts}", f"--peers={sys.executable}", "--max-lag-ms=1e9", "--name=toy"]
    assert headline.main([str(prompted_bundle), *words]) == 0
    found = Headline.read(tmp_path / "results" / "toy.json")
    assert set(found.results.runs) == {made.key for made in (*basis, run)}
    assert not any("failed" in figures for figures in found.results.runs.values())
    assert found.offered("planner", 8.0) is not None
    text = (tmp_path / "results" / "toy.md").read_text()
    assert "| PyTorch + lock |" in text
    assert (tmp_path / "results" / "toy.png").stat().st_size > 0
    assert headline.main([str(prompted_bundle / "autoencoder"), *words]) == 2


@pytest.mark.anyio
async def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    system = SystemUnderTest("broken", ("-c", "raise SystemExit('no such model')"), "peer")
    with pytest.raises(ServerFailed, match="no such model"):
        async with running_server(system, ServerSetup(tmp_path, DRAWING, Path(sys.executable), 1)):
            pass
