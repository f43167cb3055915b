"""One part of a measurement as a process, under a limit of time, started again after a point that ended it.

Only the standard library is needed here.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ditserve.bench.gpu.result_files import DONE, ERROR, PartResult, read_part
from ditserve.commands import process_words

GRACE_S = 5.0  # from SIGTERM to SIGKILL
OUT_OF_TIME = "out of time"
_MISSING = re.compile(r"^(?:ModuleNotFoundError|ImportError): No module named '([\w.]+)'")
_LOG_BYTES = 4000


@dataclass(frozen=True, slots=True)
class MeasuredSetting:
    """Everything that the parts are told: where results go, and what is measured on what.

    `identity` is what results depend on: those of another are measured again.
    """

    out: Path
    device: str
    bundle: Path
    toy: bool
    identity: Mapping[str, str]

    def words(self) -> list[str]:
        words = ["--out", str(self.out), "--device", self.device, "--bundle", str(self.bundle)]
        return [*words, "--setting", json.dumps(dict(self.identity)), *(["--toy"] if self.toy else [])]


def run_part(
    part: str,
    setting: MeasuredSetting,
    limit_s: float,
    *,
    on_point: Callable[[str], None] = lambda point: None,
    command: Sequence[str] | None = None,
) -> PartResult:
    """Run the process of a part until it is done or the time is over; return its result.

    A point during which the process ended is its last error, and another process goes on behind it.
    """
    began = time.monotonic()
    before = read_part(setting.out, part, setting.identity)
    if before.done:
        return before
    # What failed in an earlier run is tried again, and what was measured stays.
    points = {name: point for name, point in before.points.items() if ERROR not in point}
    PartResult(part, dict(setting.identity), seconds=before.seconds, points=points).write(setting.out)
    command = command or process_words(f"ditserve.bench.gpu.parts.{part}")
    while True:
        left_s = limit_s - (time.monotonic() - began)
        status = _run_once([*command, *setting.words()], setting.out / f"{part}.log", left_s, on_point)
        result = read_part(setting.out, part, setting.identity)
        if not result.done and result.running and status != OUT_OF_TIME:
            result.points[result.running], result.running = {ERROR: status}, ""
            result.write(setting.out)
            continue
        if not result.done:
            result.status = f"{status} at {result.running}" if result.running else status
        result.seconds = before.seconds + time.monotonic() - began
        result.write(setting.out)
        return result


def _run_once(command: Sequence[str], log: Path, limit_s: float, on_point: Callable[[str], None]) -> str:
    """Run a process to its end, or until the limit; return "done" or the reason why it is not."""
    with log.open("wb") as errors:
        # A session of its own, so that what it starts can be ended with it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
    reader = threading.Thread(target=_read_points, args=(process, on_point), daemon=True)
    reader.start()
    try:
        status = process.wait(max(0.0, limit_s))
    except subprocess.TimeoutExpired:
        return OUT_OF_TIME
    finally:
        _end(process)
        reader.join(GRACE_S)
    return DONE if status == 0 else _reason(status, log)


def _read_points(process: subprocess.Popen[bytes], on_point: Callable[[str], None]) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            try:
                on_point(str(json.loads(line)["point"]))
            except (ValueError, KeyError, TypeError):
                # A line that a library printed.
                continue


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started in its session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _reason(status: int, log: Path) -> str:
    """Return why a process ended, by its exit status and the last line of its log."""
    lines = log.read_bytes()[-_LOG_BYTES:].decode(errors="replace").strip().splitlines()
    last = lines[-1].strip() if lines else ""
    if missing := _MISSING.match(last):
        return f"not here: the package {missing[1].partition('.')[0]}"
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"ended with status {status}: {last or 'it gave no reason'}"
