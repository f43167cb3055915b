"""What a server and all its processes use, and how full its forward passes are, from outside (Linux)."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from ditserve.bench.site import processor_seconds, resident_bytes

MIB = 1 << 20
_ROWS = re.compile(r"^dit_batch_rows_(sum|count)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        children[parent].append(int(stat.parent.name))
    found = [pid]
    for each in found:
        found += children[each]
    return found


@dataclass(frozen=True, slots=True)
class Consumption:
    """Processor seconds so far, and memory now; pages that processes share count once for each."""

    processor_s: float
    resident_mib: float

    @classmethod
    def of(cls, pid: int) -> Consumption:
        processor_s = resident = 0.0
        for each in family(pid):
            try:
                processor_s += processor_seconds(each)
                resident += resident_bytes(each)
            except (FileNotFoundError, ProcessLookupError):
                continue
        return cls(processor_s, resident / MIB)


def passes(metrics: str) -> tuple[float, float]:
    """Rows and forward passes so far, from our service's `/metrics`."""
    totals = {"sum": 0.0, "count": 0.0}
    for part, value in _ROWS.findall(metrics):
        totals[part] += float(value)
    return totals["sum"], totals["count"]
