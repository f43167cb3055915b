"""Engines are built by another process; its progress is reported, and its refusal is passed on."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from ditserve.service.backends import BackendUnavailable
from ditserve.service.launch.engine_build import BuildProgress, build_engines

pytestmark = pytest.mark.anyio

BUILDING = """
import json, sys
print("a library's own words")
for event in (
    {"event": "start", "precision": "fp16", "number": 1, "of": 1},
    {"event": "phase", "precision": "fp16", "phase": "Building"},
    {"event": "step", "precision": "fp16", "done": 1, "total": 4},
    {"event": "step", "precision": "fp16", "done": 1, "total": 4},
    {"event": "step", "precision": "fp16", "done": 4, "total": 4},
    {"event": "done", "precision": "fp16", "state": "built", "seconds": 3.5},
):
    print(json.dumps(event))
"""
REFUSING = """
import json, sys
print(json.dumps({"event": "failed", "error": "no NVIDIA GPU answers nvidia-smi"}))
sys.exit(2)
"""
WAITING = """
import json, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
print(json.dumps({"event": "start", "precision": "fp16", "number": 1, "of": 1}), flush=True)
signal.pause()
"""


def builder(text: str) -> tuple[str, ...]:
    return sys.executable, "-c", text


async def test_progress_is_reported_as_it_changes(tmp_path: Path) -> None:
    reports: list[BuildProgress] = []
    assert await build_engines(
        tmp_path, on_progress=reports.append, stop=asyncio.Event(), command=builder(BUILDING)
    )
    assert [progress.share for progress in reports] == [0.0, 0.25, 1.0]
    assert str(reports[1]) == "building the fp16 engine (1 of 1): 25%"


async def test_a_wait_for_another_builder_is_told(tmp_path: Path) -> None:
    first = '{"event": "start",'
    told = '{"event": "waiting", "owner": "process 7 on host"},'
    waiting = BUILDING.replace(first, f"{told}\n    {first}", 1)
    reports: list[BuildProgress] = []
    assert await build_engines(
        tmp_path, on_progress=reports.append, stop=asyncio.Event(), command=builder(waiting)
    )
    assert str(reports[0]) == "waiting for the engines that process 7 on host builds"
    assert str(reports[1]) == "building the fp16 engine (1 of 1): 0%"


async def test_a_refusal_is_the_builders_sentence(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="cannot be built: no NVIDIA GPU answers nvidia-smi"):
        await build_engines(tmp_path, on_progress=print, stop=asyncio.Event(), command=builder(REFUSING))


async def test_what_is_asked_for_is_passed_on() -> None:
    echo = "import json, sys; print(json.dumps({'event': 'failed', 'error': sys.argv[1:]})); sys.exit(2)"
    with pytest.raises(BackendUnavailable) as refused:
        await build_engines(
            Path("b"),
            precision="int8",
            engines=Path("e"),
            on_progress=print,
            stop=asyncio.Event(),
            command=builder(echo),
        )
    assert "['b', '--progress', 'json', '--wait', '--precision', 'int8', '--engines', 'e']" in str(
        refused.value
    )


async def test_the_builder_is_told_to_stop(tmp_path: Path) -> None:
    stop = asyncio.Event()
    assert not await build_engines(
        tmp_path, on_progress=lambda _: stop.set(), stop=stop, command=builder(WAITING)
    )
