"""Our generators beside those of others: both ask the same service, and what is missing or goes wrong is said in a sentence."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from ditserve.bench import crosscheck, record
from tests.service.tiny_bundle import write_bundle

WRK = """#!/bin/sh
echo '{"per_s": 500.0, "p50_ms": 20.0, "p95_ms": 30.0, "wrong": 0}' >&2
"""
ARTILLERY = """#!{python}
import json, sys, urllib.request
_, _, _, _, out, script = sys.argv
script = json.load(open(script))
(ask,) = (step["post"] for step in script["scenarios"][0]["flow"])
target, headers = script["config"]["target"] + ask["url"], {{"content-type": "application/json", **ask["headers"]}}
answer = urllib.request.urlopen(urllib.request.Request(target, json.dumps(ask["json"]).encode(), headers))
found = {{"counters": {{"vusers.created": {created}, "http.codes." + str(answer.status): 1}}}}
found["summaries"] = {{"http.response_time": {{"p50": 150, "p95": 200}}}}
json.dump({{"aggregate": found}}, open(out, "w"))
"""


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a short run; wrk is one that others would not recognise."""
    program(tmp_path / "wrk", WRK)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    bundle = tmp_path / "tiny"
    bundle.mkdir()
    write_bundle(bundle, weights=False)
    return [
        f"--bundle={bundle}",
        "--rounds=2",
        "--requests=2",
        "--seconds=0.1",
        f"--artillery={tmp_path / 'artillery'}",
    ]


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def test_tools_measure_in_turns(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program(tmp_path / "artillery", ARTILLERY.format(python=sys.executable, created=1))
    assert crosscheck.main(words) == 0, capsys.readouterr().err
    assert "Artillery" in capsys.readouterr().out
    kept = json.loads((tmp_path / "crosscheck.json").read_text())
    tools = [each["tool"] for each in kept["rounds"]]
    assert tools == [
        "ditserve.bench.wire",
        "wrk",
        "wrk",
        "ditserve.bench.wire",
        "ditserve.bench.load",
        "Artillery",
        "Artillery",
        "ditserve.bench.load",
    ]
    medians = {each["tool"]: each["p50_ms"] for each in kept["medians"]}
    assert (medians["wrk"], medians["Artillery"]) == (20.0, 150.0)
    assert medians["ditserve.bench.load"] > 0.0


def test_an_unanswered_request_is_no_measurement(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program(tmp_path / "artillery", ARTILLERY.format(python=sys.executable, created=2))
    assert crosscheck.main([*words, "--rounds=1"]) == 2
    assert "Artillery: 1 requests were not answered" in capsys.readouterr().err


def test_a_tool_that_is_not_there_is_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert crosscheck.main(words) == 2
    assert "there is no" in capsys.readouterr().err
