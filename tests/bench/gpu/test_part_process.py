"""The process of a part: what is kept of it when it crashes, hangs, or lacks something."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ditserve.bench.gpu.part_process import MeasuredSetting, run_part
from ditserve.bench.gpu.result_files import PartResult, read_part

# A part of three points, of which the second does what the test asks for.
PART = """
import os, signal, subprocess, sys, time
from pathlib import Path
from ditserve.bench.gpu.measuring import main

def second():
    TROUBLE
    return {"value": 2}

def measure(part):
    part.point("first", lambda: {"value": 1})
    part.point("second", second)
    part.point("third", lambda: {"value": 3})

main("trial", measure)
"""


@pytest.fixture
def setting(tmp_path: Path) -> MeasuredSetting:
    return MeasuredSetting(tmp_path, "cpu", tmp_path, True, {"device": "cpu"})


def run(setting: MeasuredSetting, trouble: str, limit_s: float = 120.0) -> PartResult:
    command = [sys.executable, "-c", PART.replace("TROUBLE", trouble)]
    return run_part("trial", setting, limit_s, command=command)


def values(result: PartResult) -> dict[str, int]:
    return {name: point["value"] for name, point in result.points.items() if "value" in point}


def test_a_point_that_fails_is_its_sentence_and_the_part_goes_on(setting: MeasuredSetting) -> None:
    result = run(setting, "raise MemoryError('no room for 64 rows')")
    assert result.done
    assert values(result) == {"first": 1, "third": 3}
    assert result.errors == {"second": "MemoryError: no room for 64 rows"}


def test_a_crash_loses_one_point(setting: MeasuredSetting) -> None:
    result = run(setting, "os.kill(os.getpid(), signal.SIGKILL)")
    assert result.done
    assert values(result) == {"first": 1, "third": 3}
    assert result.errors == {"second": "ended by SIGKILL"}


def test_an_error_after_which_cuda_is_lost_ends_the_process(setting: MeasuredSetting) -> None:
    result = run(setting, "raise RuntimeError('CUDA error: an illegal memory access was encountered')")
    assert values(result) == {"first": 1, "third": 3}
    assert "CUDA error: an illegal memory access" in result.errors["second"]


def test_a_hang_ends_with_its_children_at_the_limit_and_the_next_run_goes_on(
    setting: MeasuredSetting, tmp_path: Path
) -> None:
    child = tmp_path / "child"
    hang = f"Path({str(child)!r}).write_text(str(subprocess.Popen(['sleep', '600']).pid)); time.sleep(600)"
    # A loaded machine may take long to start the process.
    result = run(setting, hang, limit_s=30.0)
    assert result.status == "out of time at second"
    assert values(result) == {"first": 1}
    # One that has ended has no command line any more, or no entry at all.
    command_line = Path(f"/proc/{child.read_text()}/cmdline")
    assert not command_line.exists() or command_line.read_bytes() == b""
    told: list[str] = []
    command = [sys.executable, "-c", PART.replace("TROUBLE", "pass")]
    again = run_part("trial", setting, 120.0, on_point=told.append, command=command)
    assert again.done
    assert values(again) == {"first": 1, "second": 2, "third": 3}
    assert told == ["second", "third"]


def test_results_of_another_device_are_measured_again(setting: MeasuredSetting, tmp_path: Path) -> None:
    assert run(setting, "pass").done
    other = MeasuredSetting(tmp_path, "cuda", tmp_path, False, {"device": "NVIDIA H200"})
    assert read_part(tmp_path, "trial", other.identity).points == {}
    assert read_part(tmp_path, "trial", setting.identity).done


def test_a_package_that_is_missing_is_named(setting: MeasuredSetting) -> None:
    command = [sys.executable, "-c", "import no_such_package.part"]
    result = run_part("trial", setting, 60.0, command=command)
    assert result.status == "not here: the package no_such_package"
